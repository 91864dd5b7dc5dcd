"""Image operations on a whole batch, each sample with its own parameters and nothing drawn here.

Images are float32 (n, 3, height, width) in 0..1, parameters (n,). Each operation equals torchvision's or
scikit-image's for one sample, and none looks at another sample. Those that say so change the images they are given:
new memory for each step costs a CPU more than the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, with torchvision's rounding

# Optical density of red, green, blue of haematoxylin, eosin and DAB.
_STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
_DARKEST = 1e-6  # as scikit-image's
# sRGB to XYZ, divided by D65's white (0.95047, 1, 1.08883), whose Lab is then L = 100, a = b = 0.
_XYZ_OF_RGB = (
    (0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883),
)


def _kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function whose tensors are made once and stay on their device.

    The compiler would warn of the cache; what it compiles has them made within its kernels, from numbers.
    """
    cached = lru_cache(maxsize=256)(make)

    @wraps(cached)
    def kept(*args: Any) -> Tensor:
        return make(*args) if torch.compiler.is_compiling() else cached(*args)

    return kept


def _inverse(matrix: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    """Of a small matrix of numbers, in float64."""
    return tuple(tuple(row) for row in np.linalg.inv(np.array(matrix, dtype=np.float64)).tolist())


_UNMIXING = _inverse(_STAINS)
_RGB_OF_XYZ = _inverse(_XYZ_OF_RGB)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = −0.5, as PIL and antialiased torch resampling use it."""
    x = x.abs()
    near, far = x.clamp(max=1), x.clamp(1, 2)  # each part of the kernel is 0 where the other one begins
    return (1.5 * near - 2.5) * near * near + 1 - 0.5 * (far - 1) * (far - 2).square()


class Taps(NamedTuple):
    """For each of a picture's rows to be made, the rows it is a weighted sum of, and their weights."""

    position: Tensor
    """int64 (…, rows, taps)"""
    weight: Tensor
    """float32 (…, rows, taps)"""


def _weighted_rows(table: Tensor, position: Tensor, weight: Tensor) -> Tensor:
    """Rows (M, W), each the sum of some rows of table (N, W) by weight; position and weight (M, taps).

    An embedding bag is just that, and has a fast kernel on every device: kernels have few taps, and matrices that hold
    them would be nearly all zeros.
    """
    return F.embedding_bag(position, table, mode="sum", per_sample_weights=weight)


def resample_taps(start: Tensor, length: Tensor, flip: Tensor, size_out: int, longest: int) -> Taps:
    """What makes size_out pixels of the `length` (at most longest) from `start` on, bicubic and antialiased.

    start, length int64 and flip bool, all (…). Pixels outside the interval get weight 0, as if it had been cut out
    first; a flip reverses the order.
    """
    start, length, flip = (x[..., None, None] for x in (start, length, flip))
    out = torch.arange(size_out, device=start.device)[:, None]
    scale = length / size_out
    support = 2 * scale.clamp(min=1)
    centre = (torch.where(flip, size_out - 1 - out, out) + 0.5) * scale
    first = (centre - support).floor_()
    # How many pixels there can be under the kernel is known without looking at the lengths.
    taps = torch.arange(math.ceil(4 * max(longest / size_out, 1)) + 1, device=start.device)
    position = first + taps
    weight = _cubic((first + 0.5 - centre + taps) / scale.clamp(min=1))
    inside = torch.minimum(position.clamp(min=0), length - 1)
    weight = weight.masked_fill_(inside != position, 0)
    return Taps(inside.long() + start, weight.div_(weight.sum(dim=-1, keepdim=True)))


def resample(images: Tensor, chosen: Tensor, down: Taps, across: Taps) -> Tensor:
    """Crops (n, 3, s, s), columns before rows, of the images that chosen (n,) int64 numbers.

    images float32 (B, S, S, 3). Not clamped: bicubic overshoots at edges.
    """
    num, size, side = len(chosen), down.position.shape[1], images.shape[1]
    table = images.reshape(-1, 3 * side)
    position = down.position + side * chosen[:, None, None]
    rows = _weighted_rows(table, position.flatten(0, 1), down.weight.flatten(0, 1))
    columns = transposed(rows.view(num, size, 3 * side)).view(-1, size)
    crop, channel = torch.arange(num, device=images.device), torch.arange(3, device=images.device)
    position = (crop[:, None] * (3 * side) + channel)[..., None, None] + 3 * across.position[:, None]
    weight = across.weight[:, None].expand(position.shape)
    crops = _weighted_rows(columns, position.flatten(0, 2), weight.flatten(0, 2))
    return crops.view(num, 3, size, size)


def transposed(matrices: Tensor) -> Tensor:
    """Contiguous transposes (…, b, a) of contiguous matrices (…, a, b).

    Shuffling the channels of a picture of one pixel is just that, and a CPU does it with vector instructions: several
    times faster than `mT.contiguous()`.
    """
    rows, columns = matrices.shape[-2:]
    pixel = matrices.reshape(-1, 1, 1, rows * columns).permute(0, 3, 1, 2)
    return F.channel_shuffle(pixel, rows).view(*matrices.shape[:-2], columns, rows)


def _per_image(parameter: Tensor) -> Tensor:
    return parameter[:, None, None, None]


@_kept
def constant(value: Any, device: torch.device) -> Tensor:
    """A number, or nested tuples of them, in float32 on a device; nothing is sent there, which would wait for it."""
    if isinstance(value, tuple):
        return torch.stack([constant(part, device) for part in value])
    return torch.full((), value, dtype=torch.float32, device=device)


def on_all(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """As `on_chosen`, without picking: that would wait for a GPU, which has all images done sooner."""
    return torch.where(_per_image(chosen), operation(images.clone(), *parameters), images)


def on_chosen(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Puts the images that chosen (n,) bool names through an operation with their parameters, in place."""
    picked = chosen.nonzero().flatten()
    if len(picked) in (0, len(images)):
        return operation(images, *parameters) if len(picked) else images
    changed = operation(*(tensor.index_select(0, picked) for tensor in (images, *parameters)))
    for place, image in zip(picked.tolist(), changed, strict=True):  # `index_copy_` goes number by number
        images[place] = image
    return images


def luma(images: Tensor) -> Tensor:
    """Grey value (n, 1, height, width) of each pixel."""
    red, green, blue = images.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scales all channels, in place; 1 changes nothing."""
    return images.mul_(_per_image(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Moves pixels away from the image's mean grey value (or towards it, below 1), in place."""
    # The mean of the grey values is the grey value of the means; and torch vectorises two steps with a number for each
    # image, not `lerp` with two.
    mean = luma(images.mean(dim=(2, 3), keepdim=True))
    factor = _per_image(factor)
    return images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Moves pixels away from their own grey value (or towards it, below 1), in place."""
    factor = _per_image(factor)
    grey = luma(images).mul_(1 - factor)
    return images.mul_(factor).add_(grey).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of HSV by `shift` (−0.5..0.5 of a full turn), keeping saturation and value, in place.

    The HSV way and not a rotation matrix in YIQ, because the reference recipe's torchvision does so.
    """
    red, green, blue = images.unbind(dim=1)
    high = torch.maximum(red, green)
    low = torch.minimum(red, green)
    torch.maximum(high, blue, out=high)
    torch.minimum(low, blue, out=low)
    chroma = high - low
    # The hue's distance from red in sixths of a turn, times chroma, is chroma − r + g + b with r, g, b above the
    # lowest: on each of the six edges one of them is 1 (of chroma), one 0. Its sign is that of green − blue.
    hue = low.neg_().add_(chroma).sub_(red).add_(green).add_(blue)
    six = (6 * chroma).clamp_(min=1e-12)  # a grey pixel's hue is 0
    hue = hue.div_(six).copysign_(green - blue)
    hue = hue.add_(1 + shift[:, None, None]).frac_()  # of a turn, 0..1
    # https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB: red is |6·hue − 3| − 1 cut to 0..1, green 2 − |6·hue − 2|,
    # blue 2 − |6·hue − 4|, times chroma, above value − chroma.
    of_red = high - 2 * chroma
    for out, offset, base, sign in ((red, 3, of_red, 1), (green, 2, high.add_(chroma), -1), (blue, 4, high, -1)):
        torch.addcmul(base, six, (hue - offset / 6).abs_().clamp_(1 / 6, 2 / 6), value=sign, out=out)
    return images


def jitter_colours(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in this order and in place."""
    images = adjust_contrast(adjust_brightness(images, brightness), contrast)
    return adjust_hue(adjust_saturation(images, saturation), hue)


def jitter_colours_in_order(images: Tensor, order: Tensor, *parameters: Tensor) -> Tensor:
    """The same four, numbered in this order, each image's in the order of its own row of int64 (n, 4); in place."""
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for place in order.unbind(dim=1):
        for number, (operation, parameter) in enumerate(zip(operations, parameters, strict=True)):
            images = on_chosen(images, place == number, operation, parameter)
    return images


def turn_all_hues(images: Tensor, shift: Tensor) -> Tensor:
    """As `adjust_hue`, with the three channels in one operation each; where the shift is 0, images are as they were."""
    high, low = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    chroma = high - low
    six = (6 * chroma).clamp_(min=1e-12)
    hue = _across_channels(images, (-1.0, 1.0, 1.0)).sub_(low).add_(chroma).div_(six)
    hue = hue.copysign_(images[:, 1:2] - images[:, 2:3]).add_(_per_image(1 + shift)).frac_()
    thirds, base, sign = (
        constant(channel, images.device)[:, None, None]
        for channel in ((3 / 6, 2 / 6, 4 / 6), (-2.0, 1.0, 1.0), (1.0, -1.0, -1.0))
    )
    turned = (hue - thirds).abs_().clamp_(1 / 6, 2 / 6).mul_(six * sign).addcmul_(chroma, base).add_(high)
    return torch.where(_per_image(shift != 0), turned, images)


def _across_channels(images: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """The weighted sum (n, 1, height, width) of the channels."""
    return (constant(weights, images.device) @ images.flatten(2)).view(len(images), 1, *images.shape[2:])


def jitter_all_colours(
    images: Tensor, order: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor
) -> Tensor:
    """As `jitter_colours_in_order`, in few operations on all images at once.

    Brightness, contrast and saturation are all a blend with black, the mean grey or the own grey, and so a product of
    colours and a matrix: three rounds of blends, of whatever kind is an image's turn, before the hue and three after it
    do what four rounds of all four operations would. A turn that an image does not take blends by 1, which changes
    nothing.
    """
    slots = torch.arange(3, device=images.device)
    place = (order == 3).int().argmax(dim=1, keepdim=True)  # of the hue
    kind = order.gather(1, slots + (slots >= place))  # of each blend, int64 (n, 3)
    factor = torch.stack([brightness, contrast, saturation], dim=1).gather(1, kind)
    before, after = torch.where(slots < place, factor, 1), torch.where(slots < place, 1, factor)
    factors, kinds = torch.cat([before, after], dim=1), kind.repeat(1, 2)  # (n, 6)
    rest, grey = 1 - factors, constant(_LUMA, images.device)
    one = constant(((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)), images.device)
    matrices = factors[..., None, None] * one + (rest * (kinds == 2))[..., None, None] * grey  # (n, 6, 3, 3)
    of_mean = (rest * (kinds == 1))[..., None] * grey  # (n, 6, 3)
    colours = images.flatten(2)
    for turn in range(6):
        offset = (colours.mean(dim=2) * of_mean[:, turn]).sum(dim=1)[:, None, None]
        colours = torch.baddbmm(offset, matrices[:, turn], colours).clamp_(0, 1)
        if turn == 2:
            colours = turn_all_hues(colours.view(images.shape), hue).flatten(2)
    return colours.view(images.shape)


def to_grey(images: Tensor) -> Tensor:
    """Takes the colour out, keeping three channels, in place."""
    return images.copy_(luma(images))


def solarise(images: Tensor) -> Tensor:
    """Inverts what is 0.5 or brighter."""
    return torch.where(images >= 0.5, 1 - images, images)


def jitter_stains(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scales and shifts each stain's density: haematoxylin, eosin, DAB; scale and shift (n, 3), 1 and 0 change nothing.

    Densities are natural logarithms, −ln(pixel) = density @ stain colours. Unlike scikit-image's, negative ones (of
    colours that no mixture of stains has) are kept, so that doing nothing is exact. Source: Tellez et al., arXiv
    1902.06543; stain colours of Ruifrok and Johnston, as in scikit-image.
    """
    colours, unmixing = constant(_STAINS, images.device), constant(_UNMIXING, images.device)
    # Unmix, scale and mix again are one 3×3 matrix a sample, applied to columns of pixels.
    matrix = colours.T @ (scale[:, :, None] * unmixing.T)
    density = images.clamp(min=_DARKEST).log().flatten(2)
    mixed = torch.baddbmm((shift @ colours)[:, :, None], matrix, density, beta=-1)
    return mixed.exp_().clamp_(max=1).view_as(images)


def rgb_to_lab(images: Tensor) -> Tensor:
    """CIELAB (n, 3, height, width) under D65 of sRGB images; L in 0..100."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    xyz = _mix_channels(linear, _XYZ_OF_RGB)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """SRGB in 0..1 of CIELAB under D65; what lies outside is cut off."""
    lightness, a, b = lab.unbind(dim=1)
    y = (lightness + 16) / 116
    f = torch.stack([y + a / 500, y, (y - b / 200).clamp(min=0)], dim=1)
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787)
    linear = _mix_channels(xyz, _RGB_OF_XYZ)
    bright = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, bright, linear * 12.92).clamp(0, 1)


def match_lab(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gives each image a mean and a standard deviation (n, 3) of L, a, b (Reinhard's colour transfer, in CIELAB).

    A channel without any deviation keeps none.
    """
    lab = rgb_to_lab(images)
    own_std, own_mean = torch.std_mean(lab, dim=(2, 3), keepdim=True, correction=0)
    scaled = (lab - own_mean) * (std[:, :, None, None] / own_std.clamp(min=1e-3))
    return lab_to_rgb(scaled + mean[:, :, None, None])


def _mix_channels(images: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    return torch.einsum("oc,nchw->nohw", constant(matrix, images.device), images)


def gaussian_kernels(sigma: Tensor, size: int) -> Tensor:
    """Kernels (…, size) for standard deviations (…) in pixels, summing to 1; size is odd."""
    x = torch.arange(size, device=sigma.device) - size // 2
    return torch.softmax(-0.5 * (x / sigma[..., None]).square(), dim=-1)


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolves each image with its own kernel (n, size) along both axes, borders reflected."""
    return transposed(_blur_down(transposed(_blur_down(images, kernels)), kernels))


def _blur_down(images: Tensor, kernels: Tensor) -> Tensor:
    num, channels, height, width = images.shape
    size = kernels.shape[1]
    planes = torch.arange(0, num * channels * height, height, device=images.device)[:, None, None]
    weight = kernels[:, None, None].expand(num, channels, height, size).reshape(-1, size)
    table, rows = images.reshape(-1, width), _reflected(height, size, images.device)
    return _weighted_rows(table, (rows + planes).flatten(0, 1), weight).view(images.shape)


@_kept
def _reflected(height: int, size: int, device: torch.device) -> Tensor:
    """The rows, int64 (height, size), under a kernel of that size on each row of an image with reflected borders."""
    rows = torch.arange(height, device=device)[:, None] + torch.arange(size, device=device) - size // 2
    return height - 1 - (height - 1 - rows.abs()).abs()
