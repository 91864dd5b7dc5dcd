"""Crops and colour for a whole batch at once, as a pure function of (seed, sample index, view).

What is drawn stands here, on the host; what is done with it on the device in `image_ops.py`. The order: crop, resize,
flips and quarter turn; with some probability stain jitter (HED), stain transfer (Reinhard), colour jitter, its four
parts in an order that is drawn, too; grey; blur; solarise; normalise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.recipe import image_ops
from trainer.recipe.counter_random import uniform
from trainer.recipe.image_ops import Taps

NUM_GLOBAL = 2
_ATTEMPTS = 10  # of torchvision's RandomResizedCrop
_CACHED = 5 << 18  # float32 values, 5 MiB
# What the draws of a (sample, view) are for; a number never changes its meaning, or old runs could not be replayed.
_AREA, _ASPECT, _TOP, _LEFT, _HFLIP, _VFLIP, _TURN = 0, 10, 20, 21, 22, 23, 24
_JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _BLUR, _SIGMA, _SOLARISE, _ORDER = range(30, 40)
_HED, _HED_SCALE, _HED_SHIFT, _REINHARD, _LAB_MEAN, _LAB_STD, _ECT_SCALE, _ECT_ASPECT = 40, 41, 44, 50, 51, 54, 60, 61
_NUM_DRAWS = 62
_EVERYTHING = (slice(None), slice(None))


class Crops(NamedTuple):
    """Normalised float32 crops of B samples, view first."""

    global_: Tensor
    """(2, B, 3, g, g)"""
    local: Tensor
    """(L, B, 3, l, l)"""


class Parameters(NamedTuple):
    """Everything drawn for V views of B samples; replayed through torchvision and scikit-image it gives the crops.

    Each field is (V, B), those of three stains or colour channels (V, B, 3), unless it says otherwise.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    hflip: Tensor
    vflip: Tensor
    turns: Tensor
    """quarter turns, counter-clockwise, after the flips"""
    jitter: Tensor
    """whether the colours are jittered; where not, the next four change nothing"""
    order: Tensor
    """(V, B, 4): which of them comes first, second, third, last"""
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    grey: Tensor
    blur: Tensor
    sigma: Tensor
    """standard deviation of the blur in pixels of the crop"""
    kernel: Tensor
    """its taps, (V, B, blur_kernel)"""
    solarise: Tensor
    stain: Tensor
    """whether the stains are jittered; where not, the next two change nothing"""
    stain_scale: Tensor
    """factor of each stain's optical density"""
    stain_shift: Tensor
    """what is added to it"""
    reinhard: Tensor
    lab_mean: Tensor
    """mean of L, a, b that the crop gets"""
    lab_std: Tensor
    """standard deviation of L, a, b that the crop gets"""


class Draws(NamedTuple):
    """What is drawn for all crops of a batch."""

    global_: Parameters
    local: Parameters


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """DINOv2's multi-crop augmentation, with vertical flips and quarter turns for tissue, which has no up."""

    global_size: int = 224
    """side of a global crop in pixels"""
    local_size: int = 98
    """side of a local crop in pixels"""
    num_local: int = 8
    """local crops of each tile"""
    global_view: int = 0
    """number of the view (data.views) that global crops are cut from"""
    local_view: int | None = None
    """that of the local ones; none: the last view"""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """lowest and highest share of the tile's area in a global crop"""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """lowest and highest share of the tile's area in a local crop"""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """lowest and highest width/height of a crop before it is resized to a square"""
    ect: bool = False
    """extended-context translation instead of scale and aspect: crops near native size, anywhere in a larger tile (of
    392 px in Virchow2, arXiv 2408.00738)"""
    ect_scale: tuple[float, float] = (0.9, 1.1)
    """lowest and highest side of such a crop, in sides of what it is resized to"""
    ect_aspect: tuple[float, float] = (0.95, 1.05)
    """lowest and highest width/height of such a crop"""
    hflip_prob: float = 0.5
    """probability of a horizontal flip"""
    vflip_prob: float = 0.5
    """probability of a vertical flip"""
    quarter_turns: bool = True
    """whether crops are turned by 0, 90, 180 or 270 degrees, equally often"""
    hed_prob: float = 0.0
    """probability of stain jitter: haematoxylin, eosin and DAB get their density scaled and shifted, each by itself"""
    hed_sigma: float = 0.05
    """factor within 1 ± this, shift within ± this, in natural-log optical density (arXiv 1902.06543: 0.05 light, 0.2
    strong; scikit-image's unit is 13.8 of ours)"""
    hed_shift: float | None = None
    """shift within ± this; none: as hed_sigma"""
    reinhard_prob: float = 0.0
    """probability of stain transfer: the crop gets a random mean and deviation in CIELAB (as RandStainNA)"""
    reinhard_mean: tuple[float, float, float] = (68.0, 18.0, -10.0)
    """middle of the means of L, a, b; ours, typical of H&E"""
    reinhard_mean_spread: tuple[float, float, float] = (10.0, 6.0, 5.0)
    """means are within the middle ± this"""
    reinhard_std: tuple[float, float, float] = (13.0, 7.0, 5.0)
    """middle of the deviations of L, a, b; ours, typical of H&E"""
    reinhard_std_spread: tuple[float, float, float] = (4.0, 2.5, 2.0)
    """deviations are within the middle ± this"""
    jitter_prob: float = 0.8
    """probability of the colour jitter, all four parts together"""
    brightness: float = 0.4
    """brightness factor is within 1 ± this"""
    contrast: float = 0.4
    """contrast factor is within 1 ± this"""
    saturation: float = 0.2
    """saturation factor is within 1 ± this"""
    hue: float = 0.1
    """hue shift is within ± this, in full turns"""
    shuffle_jitter: bool = True
    """whether each crop has these four in its own order, as torchvision does, or all in this one, which is faster"""
    grey_prob: float = 0.2
    """probability of losing the colour"""
    blur_probs: tuple[float, float, float] = (0.0, 0.9, 0.5)
    """probability of the blur on the first global, second global and local crops; the reference states 1, 0.1, 0.5
    but inverts it, and its released weights were trained so"""
    blur_kernel: int = 9
    """taps of the blur, odd"""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """lowest and highest standard deviation of the blur in pixels of the crop"""
    solarise_prob: float = 0.0
    """probability that the second global crop has its bright half inverted (0.2 in DINOv2; Virchow2G dropped it)"""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """mean of red, green, blue (of 0..1) that is subtracted"""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """standard deviation of red, green, blue (of 0..1) that is divided by"""

    def __post_init__(self) -> None:
        value = vars(self)
        probs = [name for name in value if name.endswith("_prob")]
        not_negative = (
            "num_local",
            "global_view",
            "local_view",
            "brightness",
            "contrast",
            "saturation",
            "hed_sigma",
            "hed_shift",
        )
        rules = {
            "must be at least 1": [n for n in ("global_size", "local_size") if value[n] < 1],
            "must not be negative": [n for n in not_negative if (value[n] or 0) < 0],
            "must rise within (0, 1]": [
                n for n in ("global_scale", "local_scale") if not 0 < value[n][0] <= value[n][1] <= 1
            ],
            "must rise and be above 0": [
                n
                for n in ("aspect", "blur_sigma", "ect_scale", "ect_aspect")
                if not 0 < value[n][0] <= value[n][1] < math.inf
            ],
            "must be in [0, 1]": [n for n in probs if not 0 <= value[n] <= 1]
            + ["blur_probs"] * (not all(0 <= p <= 1 for p in self.blur_probs)),
            "must be in [0, 0.5]": ["hue"] * (not 0 <= self.hue <= 0.5),
            "must be odd and at most twice the smallest crop less one": ["blur_kernel"]
            * (self.blur_kernel % 2 == 0 or not 0 < self.blur_kernel < 2 * min(self.global_size, self.local_size)),
            "must not exceed reinhard_std": ["reinhard_std_spread"]
            * any(w > s for w, s in zip(self.reinhard_std_spread, self.reinhard_std, strict=True)),
            "must be above 0": ["std"] * (not all(s > 0 for s in self.std)),
        }
        if wrong := [f"{name}={value[name]} {rule}" for rule, names in rules.items() for name in names]:
            raise ValueError("Augmentation: " + "; ".join(wrong))

    @property
    def local_views(self) -> range:
        """The numbers of the local crops; 0 and 1 are the global ones."""
        return range(NUM_GLOBAL, NUM_GLOBAL + self.num_local)

    def check_views(self, num_views: int) -> None:
        """Refuses views that there are not, and views that nothing is cut from.

        Raises:
            ValueError: says which.
        """
        views = self.cut_from(num_views)
        for name, view in zip(("global_view", "local_view"), views, strict=True):
            if view >= num_views:
                raise ValueError(f"augment.{name} {view}: of data.views there are {num_views}, counted from 0")
        used = set(views if self.num_local else views[:1])
        if unused := sorted(set(range(num_views)) - used):
            raise ValueError(
                f"data.views[{unused[0]}]: no crop is cut from it; leave it out, or see augment.global_view, "
                "augment.local_view and augment.num_local"
            )

    def cut_from(self, num_views: int) -> tuple[int, int]:
        """The views that global and that local crops are cut from, of so many."""
        return self.global_view, num_views - 1 if self.local_view is None else self.local_view

    def multi_crop(
        self, tiles: Tensor, index: Tensor, seed: int, *, local_tiles: Tensor | None = None, few_kernels: bool = False
    ) -> Crops:
        """Crops of each tile, depending on its pixels, its index and the seed alone.

        tiles uint8 (B, S, S, 3) or (B, 3, S, S), index int64 (B,); local_tiles are what local crops are cut from, where
        these are others. With few_kernels each operation is one on all
        images, as a GPU wants it; without, one on the chosen images alone, of as many as a CPU's caches hold. Both give
        the same crops but for rounding.

        Raises:
            ValueError: tiles of another shape or type, or another number of indices.
        """
        draws = self.draws(index.cpu(), seed, tiles.shape[2])
        on_device = [Parameters(*(one.to(tiles.device) for one in part)) for part in draws]
        return self.crops(tiles, Draws(*on_device), local_tiles=local_tiles, few_kernels=few_kernels)

    def draws(self, index: Tensor, seed: int, tile_px: int) -> Draws:
        """What is drawn for samples index (B,), on the host, from tiles of tile_px pixels."""
        return Draws(
            self.draw(index, seed, range(NUM_GLOBAL), tile_px, self.global_scale),
            self.draw(index, seed, self.local_views, tile_px, self.local_scale),
        )

    def crops(
        self, tiles: Tensor, draws: Draws, *, local_tiles: Tensor | None = None, few_kernels: bool = False
    ) -> Crops:
        """The crops that were drawn, of tiles on the same device; else as `multi_crop`."""
        images, (_, num_draws) = _channels_last(tiles), draws.global_.top.shape
        others = images if local_tiles is None else _channels_last(local_tiles)
        if num_draws != len(tiles):
            raise ValueError(f"index ({num_draws},): one for each of {len(tiles)} tiles is needed")
        if others.shape != images.shape:
            raise ValueError(f"local_tiles {tuple(others.shape)}: they must be as the tiles, {tuple(images.shape)}")
        tile_px, size = images.shape[1], (self.global_size, self.local_size)
        longest = (
            self.longest_px(range(NUM_GLOBAL), tile_px, self.global_scale),
            self.longest_px(self.local_views, tile_px, self.local_scale),
        )
        with torch.no_grad(), torch.autocast(tiles.device.type, enabled=False):
            parts = zip((images, others), draws, size, longest, strict=True)
            return Crops(*(self._crops(*part, few_kernels=few_kernels) for part in parts))

    def _crops(self, images: Tensor, drawn: Parameters, size: int, longest: int, *, few_kernels: bool) -> Tensor:
        shape, taps = (*drawn.top.shape, 3, size, size), _taps(drawn, size, longest)
        if few_kernels and len(drawn.top):
            x = self._changed(images, drawn, taps, partial(_flat, _EVERYTHING), few_kernels=True)
            of_channels = zip(self.mean, self.std, strict=True)
            lowest, factor = zip(*((-mean / std, 1 / std) for mean, std in of_channels), strict=True)
            lowest, factor = (image_ops.constant(one, x.device)[:, None, None] for one in (lowest, factor))
            return torch.addcmul(lowest, x, factor).view(shape)
        crops = torch.empty(shape, device=images.device)
        for piece in _pieces(crops, images.shape[1]):
            self._normalise(
                self._changed(images[piece[1]], drawn, taps, partial(_flat, piece), few_kernels=False), crops[piece]
            )
        return crops

    def _changed(
        self,
        images: Tensor,
        drawn: Parameters,
        taps: tuple[Taps, Taps],
        own: Callable[[Tensor], Tensor],
        *,
        few_kernels: bool,
    ) -> Tensor:
        """Crops (n, 3, size, size) in 0..1 of some images, all views of them or some; `own` picks their parameters."""
        some, num_views = images.float().div_(255), len(own(drawn.top)) // len(images)
        sample = torch.arange(len(some), device=images.device).repeat(num_views)
        x = image_ops.resample(some, sample, *(Taps(own(one.position), own(one.weight)) for one in taps))
        # Columns come first: what is not to be turned is turned back.
        apply = image_ops.on_all if few_kernels else image_ops.on_chosen
        x = apply(x.clamp_(0, 1), own(drawn.turns) % 2 == 0, image_ops.transposed)
        return self._coloured(x, drawn, own, few_kernels=few_kernels)

    def _coloured(
        self,
        x: Tensor,
        drawn: Parameters,
        own: Callable[[Tensor], Tensor],
        *,
        few_kernels: bool,
    ) -> Tensor:
        """Crops (n, 3, size, size) in other colours and blurred, changed in place; `own` picks their parameters."""
        apply = image_ops.on_all if few_kernels else image_ops.on_chosen

        def change(chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
            return apply(x, own(chosen), operation, *map(own, parameters))

        if self.hed_prob:
            x = change(drawn.stain, image_ops.jitter_stains, drawn.stain_scale, drawn.stain_shift)
        if self.reinhard_prob:
            x = change(drawn.reinhard, image_ops.match_lab, drawn.lab_mean, drawn.lab_std)
        if self.jitter_prob:
            jitter = (drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue)
            if few_kernels:
                # Where the colours are not jittered, the parameters change nothing.
                x = image_ops.jitter_all_colours(x, own(drawn.order), *map(own, jitter))
            elif self.shuffle_jitter:
                x = change(drawn.jitter, image_ops.jitter_colours_in_order, drawn.order, *jitter)
            else:
                x = change(drawn.jitter, image_ops.jitter_colours, *jitter)
        if self.grey_prob:
            x = change(drawn.grey, image_ops.to_grey)
        if any(self.blur_probs):
            x = change(drawn.blur, image_ops.blur, drawn.kernel)
        return change(drawn.solarise, image_ops.solarise) if self.solarise_prob else x

    def _normalise(self, x: Tensor, out: Tensor) -> None:
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            # In one pass: with a number, not a tensor, as the factor.
            lowest = image_ops.constant(-mean / std, x.device)
            torch.add(lowest, x.view(out.shape)[:, :, channel], alpha=1 / std, out=out[:, :, channel])

    def longest_px(self, views: range, tile_px: int, scale: tuple[float, float]) -> int:
        """The longest side in pixels that a crop of these views can have."""
        if self.ect:
            side_px = self.global_size if views.start < NUM_GLOBAL else self.local_size
            areas, aspect = [(bound * side_px) ** 2 for bound in self.ect_scale], self.ect_aspect
        else:
            areas, aspect = [bound * tile_px**2 for bound in scale], self.aspect
        stretch = max(aspect[1], 1 / aspect[0])
        # Where no attempt fits, the whole tile is taken.
        if areas[0] / stretch < 1:
            return tile_px
        return min(tile_px, round(math.sqrt(areas[1] * stretch)) + 1)

    def draw(self, index: Tensor, seed: int, views: range, tile_px: int, scale: tuple[float, float]) -> Parameters:
        """Draws for the numbered views (0 and 1 are global) of samples index (B,), from tiles of tile_px pixels."""
        view = torch.arange(views.start, views.stop, device=index.device)[:, None]
        draws = torch.arange(_NUM_DRAWS, device=index.device)
        numbers = uniform(seed, index[:, None], view[..., None], draws)  # (V, B, draws)
        height, width = self._draw_size(numbers, views, tile_px, scale)
        sigma = _between(*self.blur_sigma, numbers[..., _SIGMA])
        blur_probs = torch.tensor([self.blur_probs[min(v, NUM_GLOBAL)] for v in views], device=index.device)
        return Parameters(
            top=(numbers[..., _TOP] * (tile_px - height + 1)).long(),
            left=(numbers[..., _LEFT] * (tile_px - width + 1)).long(),
            height=height,
            width=width,
            hflip=numbers[..., _HFLIP] < self.hflip_prob,
            vflip=numbers[..., _VFLIP] < self.vflip_prob,
            turns=(4 * numbers[..., _TURN]).long() * self.quarter_turns,
            grey=numbers[..., _GREY] < self.grey_prob,
            blur=numbers[..., _BLUR] < blur_probs[:, None],
            sigma=sigma,
            kernel=image_ops.gaussian_kernels(sigma, self.blur_kernel),
            solarise=(numbers[..., _SOLARISE] < self.solarise_prob) & (view == NUM_GLOBAL - 1),
            **self._draw_jitter(numbers),
            **self._draw_stains(numbers),
        )

    def _draw_size(
        self, numbers: Tensor, views: range, tile_px: int, scale: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Height and width in pixels of the tile, int64 (V, B), from uniform numbers (V, B, draws)."""
        if self.ect:
            side_px = self.global_size if views.start < NUM_GLOBAL else self.local_size
            return self._near_native(numbers[..., _ECT_SCALE], numbers[..., _ECT_ASPECT], tile_px, side_px)
        areas, aspects = (numbers[..., first : first + _ATTEMPTS] for first in (_AREA, _ASPECT))
        return _box(areas, aspects, tile_px, scale, self.aspect)

    def _draw_jitter(self, numbers: Tensor) -> dict[str, Tensor]:
        """The fields of `Parameters` that jitter the colours, from uniform numbers (V, B, draws)."""
        jittered = numbers[..., _JITTER] < self.jitter_prob

        def within(low: float, high: float, neutral: float, draw: int) -> Tensor:
            return torch.where(jittered, _between(low, high, numbers[..., draw]), neutral)

        def factor(width: float, draw: int) -> Tensor:
            return within(max(1 - width, 0.0), 1 + width, 1.0, draw)

        orders = torch.tensor(list(permutations(range(4))), device=numbers.device)
        drawn = (len(orders) * numbers[..., _ORDER] * self.shuffle_jitter).long()
        return {
            "jitter": jittered,
            "order": orders[drawn],
            "brightness": factor(self.brightness, _BRIGHTNESS),
            "contrast": factor(self.contrast, _CONTRAST),
            "saturation": factor(self.saturation, _SATURATION),
            "hue": within(-self.hue, self.hue, 0.0, _HUE),
        }

    def _draw_stains(self, numbers: Tensor) -> dict[str, Tensor]:
        """The fields of `Parameters` that jitter and transfer stains, from uniform numbers (V, B, draws)."""
        stained = numbers[..., _HED] < self.hed_prob

        def three(middle: Sequence[float], spread: Sequence[float], draw: int) -> Tensor:
            centre, width = (torch.tensor(value, device=numbers.device) for value in (middle, spread))
            return centre + width * (2 * numbers[..., draw : draw + 3] - 1)

        def jitter(neutral: float, width: float, draw: int) -> Tensor:
            return torch.where(stained[..., None], three((neutral,) * 3, (width,) * 3, draw), neutral)

        return {
            "stain": stained,
            "stain_scale": jitter(1.0, self.hed_sigma, _HED_SCALE),
            "stain_shift": jitter(0.0, self.hed_sigma if self.hed_shift is None else self.hed_shift, _HED_SHIFT),
            "reinhard": numbers[..., _REINHARD] < self.reinhard_prob,
            "lab_mean": three(self.reinhard_mean, self.reinhard_mean_spread, _LAB_MEAN),
            "lab_std": three(self.reinhard_std, self.reinhard_std_spread, _LAB_STD),
        }

    def _near_native(self, area: Tensor, aspect: Tensor, tile_px: int, side_px: int) -> tuple[Tensor, Tensor]:
        """Height and width in pixels, int64 (V, B), of crops near side_px, at most the tile, from uniform (V, B)."""
        side = _between(*self.ect_scale, area) * side_px
        log_low, log_high = (math.log(a) for a in self.ect_aspect)
        root = torch.exp(0.5 * _between(log_low, log_high, aspect))
        height, width = ((s.round().long()).clamp(1, tile_px) for s in (side / root, side * root))
        return height, width


def _between(low: float, high: float, u: Tensor) -> Tensor:
    return low + (high - low) * u


def _channels_last(tiles: Tensor) -> Tensor:
    """Tiles as (B, S, S, 3)."""
    if tiles.ndim == 4:
        images = tiles if tiles.shape[3] == 3 else tiles.permute(0, 2, 3, 1)
        _, side, columns, channels = images.shape
        if tiles.dtype == torch.uint8 and channels == 3 and side == columns:
            return images
    raise ValueError(f"tiles {tiles.dtype} {tuple(tiles.shape)}: uint8 (B, S, S, 3) or (B, 3, S, S) is needed")


def _pieces(crops: Tensor, tile_px: int) -> list[tuple[slice, slice]]:
    """Views and samples of crops (V, B, …) that are worked on at once: of tiles of tile_px what caches hold.

    Caches must hold crops whose rows are resampled but not yet their columns.
    """
    num_views, num_samples = crops.shape[:2]
    if not crops.numel():
        return []
    at_once = max(_CACHED // (3 * tile_px * crops.shape[-1]), 1)
    views, samples = min(at_once, num_views), max(at_once // num_views, 1)
    return [
        (slice(view, view + views), slice(sample, sample + samples))
        for sample in range(0, num_samples, samples)
        for view in range(0, num_views, views)
    ]


def _flat(piece: tuple[slice, slice], parameter: Tensor) -> Tensor:
    """A piece's part of a parameter (V, B, …), view first, as (n, …)."""
    return parameter[piece].flatten(0, 1)


def _box(
    areas: Tensor, aspects: Tensor, tile_px: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Height and width in pixels, int64 (V, B): torchvision's `RandomResizedCrop` on a square tile.

    From uniform areas and aspects (V, B, attempts): area uniform, aspect log-uniform, the first attempt that fits. If
    none fits it is the whole tile, torchvision's central crop of a square.
    """
    area = tile_px**2 * _between(*scale, areas)
    log_low, log_high = (math.log(a) for a in aspect)
    ratio = torch.exp(_between(log_low, log_high, aspects))
    width, height = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (width >= 1) & (width <= tile_px) & (height >= 1) & (height <= tile_px)
    first = fits.int().argmax(dim=-1, keepdim=True)
    none_fits = ~fits.any(dim=-1)
    height, width = (side.gather(-1, first)[..., 0] for side in (height, width))
    return height.masked_fill(none_fits, tile_px), width.masked_fill(none_fits, tile_px)


def _taps(drawn: Parameters, size: int, longest: int) -> tuple[Taps, Taps]:
    """What resizes and flips along y and x; a quarter turn needs a transposition besides.

    A half turn is two flips, a quarter turn a flip and a transposition: turning by 1 is mirroring x, then transposing.
    """
    turned = drawn.turns > 1
    start, length, flip = (
        torch.stack(pair)
        for pair in (
            (drawn.top, drawn.left),
            (drawn.height, drawn.width),
            (drawn.vflip ^ turned, drawn.hflip ^ turned ^ (drawn.turns % 2 == 1)),
        )
    )
    both = image_ops.resample_taps(start, length, flip, size, longest)
    return Taps(both.position[0], both.weight[0]), Taps(both.position[1], both.weight[1])
