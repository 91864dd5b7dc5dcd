"""Image operations on a whole batch, each sample with its own parameters and nothing drawn here.

Images are float32 (n, 3, height, width) in 0..1, parameters (n,). Each operation equals torchvision's or
scikit-image's for one sample, and none looks at another sample.
"""

from collections.abc import Sequence

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


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = −0.5, as PIL and antialiased torch resampling use it."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def resample_weights(start: Tensor, length: Tensor, flip: Tensor, size_in: int, size_out: int) -> Tensor:
    """Matrices that resample `length` pixels from `start` on to size_out pixels, bicubic and antialiased.

    start, length int64 and flip bool, all of one shape (…); returns float32 (…, size_out, size_in) whose rows sum to 1.
    Pixels outside the interval get weight 0, as if it had been cut out first; a flip reverses the rows.
    """
    start, length, flip = (x[..., None, None] for x in (start, length, flip))
    out = torch.arange(size_out, device=start.device)[:, None]
    position = torch.arange(size_in, device=start.device) - start
    scale = length / size_out
    centre = (torch.where(flip, size_out - 1 - out, out) + 0.5) * scale
    weights = _cubic((position + 0.5 - centre) / scale.clamp(min=1)) * ((position >= 0) & (position < length))
    return weights / weights.sum(dim=-1, keepdim=True)


def resample(images: Tensor, weights_y: Tensor, weights_x: Tensor) -> Tensor:
    """V crops of each of B images by two batched matrix products, weights_y @ image @ weights_xᵀ.

    images float32 (B, S, 3, S), rows before channels so that neither product copies them; weights_y, weights_x
    (V, B, s, S). Returns (V, B, 3, s, s), not clamped: bicubic overshoots at edges.
    """
    num_views, num_images, size_out, size_in = weights_y.shape
    rows = weights_y.transpose(0, 1).reshape(num_images, num_views * size_out, size_in) @ images.flatten(2)
    rows = rows.view(num_images * num_views, size_out * 3, size_in)
    crops = rows @ weights_x.transpose(0, 1).flatten(0, 1).mT
    return crops.view(num_images, num_views, size_out, 3, size_out).permute(1, 0, 3, 2, 4)


def _per_image(parameter: Tensor) -> Tensor:
    return parameter[:, None, None, None]


def transpose(images: Tensor, chosen: Tensor) -> Tensor:
    """Swaps rows and columns of the chosen square images; with flips this makes quarter turns. chosen bool (n,)."""
    return torch.where(_per_image(chosen), images.mT, images)


def luma(images: Tensor) -> Tensor:
    """Grey value (n, 1, height, width) of each pixel."""
    red, green, blue = images.split(1, dim=1)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scales all channels; 1 changes nothing."""
    return (images * _per_image(factor)).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Moves pixels away from the image's mean grey value (or towards it, below 1)."""
    mean = luma(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, _per_image(factor)).clamp(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Moves pixels away from their own grey value (or towards it, below 1)."""
    return torch.lerp(luma(images), images, _per_image(factor)).clamp(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of HSV by `shift` (−0.5..0.5 of a full turn), keeping saturation and value.

    The HSV way and not a rotation matrix in YIQ, because the reference recipe's torchvision does so.
    """
    red, green, blue = images.unbind(dim=1)
    low, high = images.aminmax(dim=1)
    chroma = high - low
    divisor = torch.where(chroma == 0, 1.0, chroma)
    of_green_or_blue = torch.where(high == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = torch.where(high == red, (green - blue) / divisor, of_green_or_blue)  # hue in sixths of a turn
    # https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative, with value·saturation = chroma
    offsets = torch.arange(5, 0, -2, device=images.device)[:, None, None]
    k = offsets + (sixths + 6 * shift[:, None, None])[:, None]
    k = k.sub_(k.div(6).floor_().mul_(6))  # remainder, which torch does not vectorise on the CPU
    return high[:, None] - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma[:, None])


def to_grey(images: Tensor, chosen: Tensor) -> Tensor:
    """Takes the colour out of the chosen images, keeping three channels; chosen bool (n,)."""
    return torch.where(_per_image(chosen), luma(images), images)


def solarise(images: Tensor, chosen: Tensor) -> Tensor:
    """Inverts what is 0.5 or brighter in the chosen images; chosen bool (n,)."""
    return torch.where(_per_image(chosen) & (images >= 0.5), 1 - images, images)


def jitter_stains(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scales and shifts each stain's density: haematoxylin, eosin, DAB; scale and shift (n, 3), 1 and 0 change nothing.

    Densities are natural logarithms, −ln(pixel) = density @ stain colours. Unlike scikit-image's, negative ones (of
    colours that no mixture of stains has) are kept, so that doing nothing is exact. Source: Tellez et al., arXiv
    1902.06543; stain colours of Ruifrok and Johnston, as in scikit-image.
    """
    colours = torch.tensor(_STAINS, device=images.device)
    # Unmix, scale and mix again are one 3×3 matrix a sample, applied to columns of pixels.
    matrix = colours.T @ (scale[:, :, None] * torch.linalg.inv(colours).T)
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
    matrix = torch.linalg.inv(torch.tensor(_XYZ_OF_RGB, dtype=torch.float64)).tolist()
    linear = _mix_channels(xyz, matrix)
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


def _mix_channels(images: Tensor, matrix: Sequence[Sequence[float]]) -> Tensor:
    return torch.einsum("oc,nchw->nohw", torch.tensor(matrix, dtype=images.dtype, device=images.device), images)


def gaussian_kernels(sigma: Tensor, size: int) -> Tensor:
    """Kernels (n, size) for standard deviations (n,) in pixels, summing to 1; size is odd."""
    x = torch.arange(size, device=sigma.device) - size // 2
    return torch.softmax(-0.5 * (x / sigma[:, None]).square(), dim=1)


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolves each image with its own kernel (n, size) along both axes, borders reflected."""
    num, channels, height, width = images.shape
    half = kernels.shape[1] // 2
    # One depthwise convolution per axis over all images and channels: each is a group of its own.
    x = F.pad(images, (half, half, half, half), mode="reflect").flatten(0, 1)[None]
    kernels = kernels.repeat_interleave(channels, dim=0)
    x = F.conv2d(x, kernels[:, None, :, None], groups=num * channels)
    return F.conv2d(x, kernels[:, None, None, :], groups=num * channels).view(num, channels, height, width)
