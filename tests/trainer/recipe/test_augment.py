from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from skimage import color
from torch import Tensor

from trainer.recipe.augment import NUM_GLOBAL, Augmentation, Parameters

SMALL: dict[str, Any] = {"global_size": 32, "local_size": 16, "num_local": 3, "blur_kernel": 5}


def tiles(num: int = 6, side: int = 48) -> Tensor:
    # Smooth like tissue, so that differences between filters show, and with saturated parts.
    noise = torch.rand(num, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, size=side, mode="bilinear") * 400 - 70
    return smooth.clamp(0, 255).to(torch.uint8)


def replay(tile: Tensor, p: dict[str, Any], size: int, augmentation: Augmentation) -> Tensor:
    """One crop by torchvision, from the drawn parameters."""
    x = tile.float() / 255
    box = [p[name] for name in ("top", "left", "height", "width")]
    x = tv.resized_crop(x, *box, [size, size], tv.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    x = tv.hflip(x) if p["hflip"] else x
    x = tv.vflip(x) if p["vflip"] else x
    x = torch.rot90(x, p["turns"], (-2, -1))
    # scikit-image's unit of density is ln(10^6) natural ones.
    if augmentation.hed_prob:
        hed = color.separate_stains(x.permute(1, 2, 0).double().numpy(), color.hed_from_rgb)
        hed = hed * p["stain_scale"] + np.array(p["stain_shift"]) / -np.log(1e-6)
        x = torch.from_numpy(color.combine_stains(hed, color.rgb_from_hed)).permute(2, 0, 1).float()
    for part in p["order"]:
        name = ("brightness", "contrast", "saturation", "hue")[part]
        x = getattr(tv, f"adjust_{name}")(x, p[name])
    x = tv.rgb_to_grayscale(x, 3) if p["grey"] else x
    kernel = [augmentation.blur_kernel] * 2
    x = tv.gaussian_blur(x, kernel, [p["sigma"]] * 2) if p["blur"] else x
    x = tv.solarize(x, 0.5) if p["solarise"] else x
    return tv.normalize(x, list(augmentation.mean), list(augmentation.std))


@pytest.mark.parametrize("few_kernels", [True, False])
@pytest.mark.parametrize("shuffle_jitter", [True, False])
def test_every_crop_equals_torchvision_on_the_drawn_parameters(shuffle_jitter: bool, few_kernels: bool) -> None:
    augmentation = Augmentation(**SMALL, mean=(0.7, 0.5, 0.6), std=(0.2, 0.3, 0.4), shuffle_jitter=shuffle_jitter)
    index = torch.arange(1000, 1006)
    crops = augmentation.multi_crop(tiles(), index, seed=3, few_kernels=few_kernels)
    for found, views, size, scale in (
        (crops.global_, range(2), 32, augmentation.global_scale),
        (crops.local, range(2, 5), 16, augmentation.local_scale),
    ):
        drawn = augmentation.draw(index, 3, views, 48, scale)
        for v in range(len(views)):
            for b in range(6):
                one = {name: value[v, b].tolist() for name, value in drawn._asdict().items()}
                expected = replay(tiles()[b], one, size, augmentation)
                torch.testing.assert_close(found[v, b], expected, rtol=0, atol=1e-4)


def h_and_e(num: int = 3, side: int = 48) -> Tensor:
    """Tiles of positive densities of all stains: scikit-image cuts the others off."""
    densities = np.random.default_rng(0).uniform(0.3, 0.9, (num, side, side, 3)) / -np.log(1e-6)
    return torch.from_numpy(color.hed2rgb(densities) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("few_kernels", [True, False])
def test_with_stain_jitter_and_solarising_too_every_crop_equals_its_replay(few_kernels: bool) -> None:
    options = {
        "hed_prob": 0.7,
        "hed_sigma": 0.2,
        "solarise_prob": 0.6,
        "global_scale": (1.0, 1.0),
        "aspect": (1.0, 1.0),
    }
    augmentation = Augmentation(**SMALL | options | {"global_size": 48, "num_local": 0})
    index, pictures = torch.arange(3), h_and_e()
    crops = augmentation.multi_crop(pictures, index, seed=4, few_kernels=few_kernels).global_
    drawn = augmentation.draw(index, 4, range(2), 48, (1.0, 1.0))
    assert drawn.solarise[1].any()
    assert not drawn.solarise[0].any()
    for v in range(2):
        for b in range(3):
            one = {name: value[v, b].tolist() for name, value in drawn._asdict().items()}
            expected = replay(pictures[b].permute(2, 0, 1), one, 48, augmentation)
            close = (crops[v, b] - expected).abs() < 2e-3
            assert close.float().mean() > 0.999, "all but pixels on solarising's threshold"


def test_the_four_parts_of_the_jitter_come_in_each_order_equally_often() -> None:
    index, views = torch.arange(6000), range(2)
    orders = Augmentation().draw(index, 0, views, 256, (0.32, 1.0)).order.flatten(0, 1)
    found, counts = orders.unique(dim=0, return_counts=True)
    assert sorted(map(tuple, found.tolist())) == sorted(permutations(range(4)))
    assert counts.min() > 400
    assert counts.max() < 600
    fixed = Augmentation(shuffle_jitter=False).draw(index, 0, views, 256, (0.32, 1.0)).order
    assert torch.equal(fixed.flatten(0, 1).unique(dim=0), torch.arange(4)[None])


def test_stains_may_be_shifted_without_being_scaled() -> None:
    index, views = torch.arange(4000), range(2)
    drawn = Augmentation(hed_prob=1.0, hed_sigma=0.0, hed_shift=0.69).draw(index, 0, views, 256, (0.32, 1.0))
    assert (drawn.stain_scale == 1).all()
    assert 0.68 < drawn.stain_shift.abs().max() <= 0.69
    both = Augmentation(hed_prob=1.0, hed_sigma=0.2).draw(index, 0, views, 256, (0.32, 1.0))
    assert 0.19 < both.stain_shift.abs().max() <= 0.2


@pytest.mark.parametrize("few_kernels", [True, False])
def test_stain_transfer_gives_crops_of_the_drawn_colour(few_kernels: bool) -> None:
    options = {"reinhard_prob": 1.0, "jitter_prob": 0.0, "grey_prob": 0.0, "blur_probs": (0.0, 0.0, 0.0)}
    augmentation = Augmentation(**SMALL | options)
    drawn = augmentation.draw(torch.arange(3), 0, range(2), 48, augmentation.global_scale)
    crops = augmentation.multi_crop(h_and_e(), torch.arange(3), 0, few_kernels=few_kernels).global_ / 2 + 0.5
    for v in range(2):
        for b in range(3):
            lab = color.rgb2lab(crops[v, b].permute(1, 2, 0).double().numpy()).reshape(-1, 3)
            np.testing.assert_allclose(lab.mean(axis=0), drawn.lab_mean[v, b].numpy(), atol=3)  # bright ones are cut


def test_extended_context_crops_lie_anywhere_near_their_native_size() -> None:
    augmentation = Augmentation(ect=True)
    for views, side in ((range(2), 224), (range(2, 4), 98)):
        drawn = augmentation.draw(torch.arange(5000), 0, views, 392, (0.05, 0.32))
        for length, start in ((drawn.height, drawn.top), (drawn.width, drawn.left)):
            assert side * 0.9 / 1.03 <= length.min()
            assert length.max() <= side * 1.1 * 1.03
            assert (start + length).max() <= 392
            assert start.float().mean().item() == pytest.approx((392 - side) / 2, rel=0.05)
        aspect = drawn.width / drawn.height
        assert aspect.min() > 0.93
        assert aspect.max() < 1.07


def test_extended_context_crops_of_a_tile_that_is_too_small_are_the_whole_of_it() -> None:
    drawn = Augmentation(ect=True).draw(torch.arange(10), 0, range(2), 128, (0.32, 1.0))
    assert (drawn.height == 128).all()
    assert (drawn.width == 128).all()


@pytest.mark.parametrize(
    ("options", "tile_px"),
    [({}, 256), ({"aspect": (0.5, 1.1)}, 256), ({"ect": True}, 392), ({"ect": True}, 128), ({}, 2)],
)
def test_no_crop_is_longer_than_what_its_kernels_are_made_for(options: dict[str, Any], tile_px: int) -> None:
    augmentation = Augmentation(**options)
    for views, scale in ((range(2), augmentation.global_scale), (range(2, 10), augmentation.local_scale)):
        drawn = augmentation.draw(torch.arange(2000), 0, views, tile_px, scale)
        longest = augmentation.longest_px(views, tile_px, scale)
        assert max(drawn.height.max(), drawn.width.max()) <= longest <= tile_px


@pytest.mark.parametrize("few_kernels", [True, False])
def test_the_crops_of_a_sample_depend_neither_on_batch_mates_nor_on_order(few_kernels: bool) -> None:
    augmentation, index = Augmentation(**SMALL), torch.tensor([5, 900, 17, 2**40, 3, 4])
    crop = partial(augmentation.multi_crop, seed=1, few_kernels=few_kernels)
    together = crop(tiles(), index)
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    shuffled = crop(tiles()[order], index[order])
    for whole, other in zip(together, shuffled, strict=True):
        torch.testing.assert_close(other, whole[:, order], rtol=0, atol=1e-6)
    for b in range(6):
        alone = crop(tiles()[b : b + 1], index[b : b + 1])
        for whole, one in zip(together, alone, strict=True):
            torch.testing.assert_close(one[:, 0], whole[:, b], rtol=0, atol=1e-6)


def test_seed_index_and_view_each_change_the_crops() -> None:
    augmentation, same = Augmentation(**SMALL), tiles()[:1].repeat(2, 1, 1, 1)
    crops = augmentation.multi_crop(same, torch.tensor([0, 1]), seed=0)
    reseeded = augmentation.multi_crop(same, torch.tensor([0, 1]), seed=1)
    everything = torch.cat([crops.local.flatten(0, 1), reseeded.local.flatten(0, 1)])
    assert len(everything.unique(dim=0)) == 12


@pytest.mark.parametrize("recipe", [{}, {"hed_prob": 0.5, "reinhard_prob": 0.5, "solarise_prob": 0.5, "ect": True}])
def test_both_forms_give_the_same_crops_but_for_rounding(recipe: dict[str, Any]) -> None:
    augmentation = Augmentation(**SMALL | recipe)
    many, few = (augmentation.multi_crop(tiles(), torch.arange(6), 0, few_kernels=few) for few in (False, True))
    for a, b in zip(many, few, strict=True):
        close = (a - b).abs() < 1e-4
        assert close.float().mean() > 0.999, "all but pixels on solarising's threshold"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{}, {"hed_prob": 0.5, "reinhard_prob": 0.5, "solarise_prob": 0.5, "num_local": 0}])
def test_crops_of_few_kernels_are_one_graph_for_all_batches_that_sends_nothing(recipe: dict[str, Any]) -> None:
    augmentation = Augmentation(**SMALL | recipe)
    graphs = list[torch.fx.GraphModule]()

    def keep(graph: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(augmentation.crops, fullgraph=True, dynamic=False, backend=keep)
    for index in (torch.arange(6), torch.arange(50, 56)):
        given = tiles(), augmentation.draws(index, 0, 48)
        for found, wanted in zip(
            compiled(*given, few_kernels=True), augmentation.crops(*given, few_kernels=True), strict=True
        ):
            assert torch.equal(found, wanted)
    (graph,) = graphs
    # A number of the host that became a tensor within would be sent at each call.
    assert not [node for node in graph.graph.nodes if node.target in (torch.tensor, torch.as_tensor)]
    assert [*graph.buffers()] == []


def test_both_tile_layouts_give_the_same_crops_as_normalised_float32() -> None:
    augmentation = Augmentation(**SMALL)
    first = augmentation.multi_crop(tiles(), torch.arange(6), 0)
    last = augmentation.multi_crop(tiles().permute(0, 2, 3, 1), torch.arange(6), 0)
    assert first.global_.shape == (NUM_GLOBAL, 6, 3, 32, 32)
    assert first.local.shape == (3, 6, 3, 16, 16)
    for a, b in zip(first, last, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32
        assert a.min() < -0.5
        assert a.max() > 0.5
        assert a.abs().max() <= 1 + 1e-5  # the blur rounds


def test_reduced_precision_around_it_does_not_touch_the_crops() -> None:
    augmentation = Augmentation(**SMALL)
    plain = augmentation.multi_crop(tiles(), torch.arange(6), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = augmentation.multi_crop(tiles(), torch.arange(6), 0)
    assert torch.equal(plain.global_, cast.global_)


def test_no_local_crops_give_an_empty_tensor() -> None:
    crops = Augmentation(**SMALL | {"num_local": 0}).multi_crop(tiles(), torch.arange(6), 0)
    assert crops.local.shape == (0, 6, 3, 16, 16)


def draw(num: int = 20_000, views: range = range(3), **fields: Any) -> Parameters:
    return Augmentation(**fields).draw(torch.arange(num), 0, views, 256, (0.05, 0.32))


def test_boxes_are_distributed_as_torchvisions_random_resized_crop() -> None:
    drawn = draw(views=range(1))
    rng = np.random.default_rng(0)
    expected = []
    while len(expected) < 20_000:  # rejection loop of RandomResizedCrop.make_params, ended by a fit
        area = 256**2 * rng.uniform(0.05, 0.32)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        expected.append((h, w, rng.integers(0, 256 - h + 1), rng.integers(0, 256 - w + 1)))
    for found, column in zip(
        (drawn.height, drawn.width, drawn.top, drawn.left), zip(*expected, strict=True), strict=True
    ):
        quantiles = np.linspace(0, 1, 21)
        np.testing.assert_allclose(np.quantile(found[0].numpy(), quantiles), np.quantile(column, quantiles), atol=4)


def test_boxes_lie_in_the_tile_also_when_the_whole_tile_is_asked() -> None:
    for scale in ((0.05, 0.32), (0.32, 1.0), (1.0, 1.0)):
        drawn = Augmentation().draw(torch.arange(5000), 0, range(3), 256, scale)
        for start, length in ((drawn.top, drawn.height), (drawn.left, drawn.width)):
            assert start.min() >= 0
            assert length.min() >= 1
            assert (start + length).max() <= 256


def test_an_area_that_never_fits_gives_the_whole_tile() -> None:
    drawn = Augmentation(aspect=(1.5, 2.0)).draw(torch.arange(100), 0, range(1), 64, (0.99, 1.0))
    assert (drawn.height == 64).all()
    assert (drawn.width == 64).all()


def test_probabilities_and_ranges_are_those_asked_for() -> None:
    drawn = draw(blur_probs=(0.0, 0.9, 0.5), jitter_prob=0.8, hflip_prob=0.25, brightness=0.4, hue=0.1)
    share = {name: value.float().mean(dim=1) for name, value in drawn._asdict().items()}
    close = {"rtol": 0, "atol": 0.02}
    torch.testing.assert_close(share["blur"], torch.tensor([0.0, 0.9, 0.5]), **close)
    torch.testing.assert_close(share["hflip"], torch.full((3,), 0.25), **close)
    torch.testing.assert_close(share["vflip"], torch.full((3,), 0.5), **close)
    torch.testing.assert_close(share["grey"], torch.full((3,), 0.2), **close)
    jittered = drawn.brightness != 1
    torch.testing.assert_close(jittered.float().mean(), torch.tensor(0.8), **close)
    assert torch.equal(jittered, drawn.hue != 0)
    changed = drawn.brightness[jittered]
    assert 0.6 <= changed.min() < 0.61
    assert 1.39 < changed.max() <= 1.4
    torch.testing.assert_close(torch.bincount(drawn.turns.flatten()) / 60_000, torch.full((4,), 0.25), **close)


def test_without_quarter_turns_nothing_is_turned() -> None:
    assert not draw(quarter_turns=False).turns.any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(2, 8, 8, 3), r"torch.float32 \(2, 8, 8, 3\): uint8"),
        (torch.zeros(2, 8, 9, 3, dtype=torch.uint8), r"\(2, 8, 9, 3\)"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), r"\(2, 4, 8, 8\)"),
        (torch.zeros(3, 8, 8, 3, dtype=torch.uint8), r"index \(2,\): one for each of 3 tiles"),
    ],
)
def test_unfit_tiles_are_refused(wrong: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**SMALL).multi_crop(wrong, torch.arange(2), 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"global_size": 0}, "global_size=0 must be at least 1"),
        ({"num_local": -1, "contrast": -0.1}, r"num_local=-1 must not be negative; contrast=-0\.1"),
        ({"local_scale": (0.4, 0.2)}, r"local_scale=\(0\.4, 0\.2\) must rise"),
        ({"global_scale": (0.5, 1.5)}, r"global_scale=\(0\.5, 1\.5\) must rise within \(0, 1\]"),
        ({"blur_sigma": (0.0, 2.0)}, r"blur_sigma=\(0\.0, 2\.0\) must rise and be above 0"),
        ({"grey_prob": 1.2, "blur_probs": (0.0, 2.0, 0.0)}, r"grey_prob=1\.2 .*; blur_probs="),
        ({"hed_prob": 1.5, "solarise_prob": -1}, r"hed_prob=1\.5 .*; solarise_prob=-1 must be in \[0, 1\]"),
        ({"reinhard_std_spread": (20.0, 1.0, 1.0)}, "must not exceed reinhard_std"),
        ({"hue": 0.6}, r"hue=0\.6 must be in \[0, 0\.5\]"),
        ({"blur_kernel": 8}, "blur_kernel=8 must be odd"),
        ({"blur_kernel": 9, "local_size": 4}, "blur_kernel=9 must be odd and at most"),
        ({"std": (0.5, 0.0, 0.5)}, r"std=\(0\.5, 0\.0, 0\.5\) must be above 0"),
    ],
)
def test_impossible_augmentations_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**fields)
