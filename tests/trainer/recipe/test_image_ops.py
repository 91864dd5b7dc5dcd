"""Oracles: torchvision's functional transforms and scikit-image, one sample at a time."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skimage import color
from torch import Tensor

from trainer.recipe import image_ops


def images(num: int = 4, height: int = 24, width: int = 20) -> Tensor:
    return torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(0))


@given(data=st.data(), size_in=st.integers(4, 40), size_out=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_resampling_equals_torchvisions_antialiased_bicubic_with_flips(
    data: st.DataObject, size_in: int, size_out: int
) -> None:
    height, width = (data.draw(st.integers(1, size_in)) for _ in range(2))
    top, left = data.draw(st.integers(0, size_in - height)), data.draw(st.integers(0, size_in - width))
    hflip, vflip = data.draw(st.booleans()), data.draw(st.booleans())
    image = images(1, size_in, size_in)
    expected = tv.resized_crop(
        image, top, left, height, width, [size_out, size_out], tv.InterpolationMode.BICUBIC, antialias=True
    )
    expected = tv.hflip(expected) if hflip else expected
    expected = tv.vflip(expected) if vflip else expected
    longest = data.draw(st.integers(max(height, width), size_in))
    taps = [
        image_ops.resample_taps(*(torch.tensor([x]) for x in (start, length, flip)), size_out, longest)
        for start, length, flip in ((top, height, vflip), (left, width, hflip))
    ]
    found = image_ops.resample(image.permute(0, 2, 3, 1), torch.tensor([0]), *taps)
    torch.testing.assert_close(found.mT, expected, rtol=0, atol=1e-4)


def test_each_crop_is_resampled_from_its_own_image_with_its_own_taps() -> None:
    batch, chosen = images(3, 16, 16), torch.tensor([2, 0, 1, 0])
    start = torch.tensor([0, 1, 2, 5])
    taps = image_ops.resample_taps(start, torch.full((4,), 8), torch.zeros(4, dtype=torch.bool), 8, 8)
    crops = image_ops.resample(batch.permute(0, 2, 3, 1), chosen, taps, taps)
    for crop, s, b in zip(crops, start.tolist(), chosen.tolist(), strict=True):
        torch.testing.assert_close(crop.mT, batch[b, :, s : s + 8, s : s + 8], rtol=0, atol=1e-5)


@pytest.mark.parametrize("apply", [image_ops.on_chosen, image_ops.on_all])
@pytest.mark.parametrize("chosen", [[True, False, True], [False] * 3, [True] * 3])
def test_an_operation_touches_the_chosen_images_only_each_with_its_own_parameter(
    chosen: list[bool], apply: Callable[..., Tensor]
) -> None:
    batch, factors = images(3), [0.5, 0.6, 0.7]
    expected = [tv.adjust_brightness(x, f) if c else x for x, f, c in zip(batch.clone(), factors, chosen, strict=True)]
    found = apply(batch, torch.tensor(chosen), image_ops.adjust_brightness, torch.tensor(factors))
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (image_ops.adjust_brightness, tv.adjust_brightness, [0.6, 1.0, 1.4, 0.0]),
        (image_ops.adjust_contrast, tv.adjust_contrast, [0.6, 1.0, 1.4, 0.0]),
        (image_ops.adjust_saturation, tv.adjust_saturation, [0.8, 1.0, 1.2, 0.0]),
        (image_ops.adjust_hue, tv.adjust_hue, [-0.5, -0.1, 0.0, 0.1]),
        (image_ops.adjust_hue, tv.adjust_hue, [0.5, 0.03, -0.25, 0.3]),
    ],
)
def test_colour_adjustments_equal_torchvisions(
    ours: Callable[[Tensor, Tensor], Tensor], theirs: Callable[[Tensor, float], Tensor], values: list[float]
) -> None:
    batch = images()
    batch[:, :, :4] = batch[:, :1, :4]  # grey pixels, whose hue is undefined
    batch[:, :, 4], batch[:, :, 5] = 1.0, 0.0  # white and black ones
    batch[:, 1, 6:8] = batch[:, 0, 6:8]  # two channels share the maximum or the minimum
    expected = torch.stack([theirs(x, value) for x, value in zip(batch, values, strict=True)])
    torch.testing.assert_close(ours(batch, torch.tensor(values)), expected, rtol=0, atol=2e-6)


def test_grey_equals_torchvisions() -> None:
    torch.testing.assert_close(image_ops.to_grey(images()), tv.rgb_to_grayscale(images(), 3))


@given(sigma=st.lists(st.floats(0.1, 2.0), min_size=3, max_size=3), size=st.sampled_from([1, 3, 9]))
@example(sigma=[0.1, 1.0, 2.0], size=9)
@settings(max_examples=15, deadline=None)
def test_blur_equals_torchvisions_gaussian_up_to_the_border(sigma: list[float], size: int) -> None:
    batch = images(3)
    expected = torch.stack([tv.gaussian_blur(x, [size, size], [s, s]) for x, s in zip(batch, sigma, strict=True)])
    found = image_ops.blur(batch, image_ops.gaussian_kernels(torch.tensor(sigma), size))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def last(x: Tensor) -> np.ndarray:
    return x.permute(1, 2, 0).numpy().astype(np.float64)


def stained(num: int = 4) -> Tensor:
    """Images of positive densities of all three stains, which scikit-image does not cut off."""
    densities = np.random.default_rng(0).uniform(0.2, 0.6, (num, 24, 20, 3)) / -np.log(1e-6)
    return torch.from_numpy(color.hed2rgb(densities)).permute(0, 3, 1, 2).float()


def test_stain_jitter_equals_scikit_image_s_colour_deconvolution_in_natural_log_density() -> None:
    batch, rng = stained(), np.random.default_rng(1)
    scale, shift = rng.uniform(0.8, 1.2, (4, 3)), rng.uniform(-0.1, 0.1, (4, 3))
    found = image_ops.jitter_stains(batch, torch.from_numpy(scale).float(), torch.from_numpy(shift).float())
    for image, a, b, ours in zip(batch, scale, shift, found, strict=True):
        # scikit-image's unit of density is ln(10^6) = 13.8 natural ones.
        hed = color.rgb2hed(last(image)) * a + b / -np.log(1e-6)
        np.testing.assert_allclose(last(ours), color.hed2rgb(hed), atol=2e-5)


def test_stain_jitter_by_one_and_zero_changes_no_colour_at_all() -> None:
    batch = images().clamp(min=1e-3)
    batch[:, :, 0], batch[:, :, 1] = 1.0, torch.tensor([1.0, 0.01, 0.01])[:, None]
    same = image_ops.jitter_stains(batch, torch.ones(4, 3), torch.zeros(4, 3))
    torch.testing.assert_close(same, batch, rtol=0, atol=1e-5)


def test_lab_and_back_equal_scikit_image_s() -> None:
    batch = images()
    batch[:, :, 0], batch[:, :, 1] = 0.0, 1.0
    lab = image_ops.rgb_to_lab(batch)
    for image, ours in zip(batch, lab, strict=True):
        np.testing.assert_allclose(last(ours), color.rgb2lab(last(image)), atol=2e-3)
    torch.testing.assert_close(image_ops.lab_to_rgb(lab), batch, rtol=0, atol=1e-4)


def test_colour_transfer_gives_the_asked_mean_and_deviation() -> None:
    batch = 0.4 + 0.2 * images()
    mean, std = torch.tensor([[60.0, 10.0, -8.0]] * 4), torch.tensor([[5.0, 3.0, 2.0]] * 4)
    for ours in image_ops.match_lab(batch, mean, std):
        lab = color.rgb2lab(last(ours)).reshape(-1, 3)
        np.testing.assert_allclose(lab.mean(axis=0), [60, 10, -8], atol=0.05)
        np.testing.assert_allclose(lab.std(axis=0), [5, 3, 2], atol=0.05)
    assert image_ops.match_lab(torch.full((4, 3, 4, 4), 0.5), mean, std).isfinite().all()


def test_solarising_equals_torchvisions() -> None:
    batch = images()
    batch[:, :, 0] = 0.5
    assert torch.equal(image_ops.solarise(batch), tv.solarize(batch, 0.5))
