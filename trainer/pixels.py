"""Image operations on a whole batch, each sample with its own parameters and nothing drawn here.

Images are float32 (n, 3, height, width) in 0..1, parameters (n,). Each operation equals torchvision's of that name for
one sample, and none looks at another sample.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, with torchvision's rounding


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
    k = (offsets + (sixths + 6 * shift[:, None, None])[:, None]).remainder(6)
    return high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def to_grey(images: Tensor, chosen: Tensor) -> Tensor:
    """Takes the colour out of the chosen images, keeping three channels; chosen bool (n,)."""
    return torch.where(_per_image(chosen), luma(images), images)


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
