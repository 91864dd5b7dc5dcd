"""iBOT's block masks as a pure function of (seed, sample index, view).

Two wishes pull against each other: the mask of a sample must not depend on its batch, so that a resumed run or another
number of ranks sees the same masks; and the masked tokens of a batch must be a constant number, so that shapes are
static, with ratios spread evenly. Both hold if the ratios are dealt out within fixed groups of `group_size` consecutive
samples, which are a property of the index alone: each group has one ratio of every bin, in an order drawn by hash. What
one bin draws above its middle, its partner draws below. Let `group_size` divide the micro-batch, and every micro-batch
of every rank has the same number of masked tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.recipe.counter_random import random_bits, uniform
from trainer.recipe.losses import mask_weights

NUM_VIEWS = 2
_ORDER, _RATIO, _TOP_UP, _BLOCKS = 1000, 2000, 1 << 16, 1 << 20  # first draw of each purpose
_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How global crops are masked; defaults are DINOv2's."""

    group_size: int
    """consecutive samples among which the mask ratios are dealt out; a divisor of the micro-batch"""
    masked_share: float = 0.5
    """share of the global crops that are masked at all"""
    ratio: tuple[float, float] = (0.1, 0.5)
    """lowest and highest share of a masked crop's patches that are hidden"""
    draw_ratios: bool = True
    """whether a ratio is drawn within its bin, as in DINOv2, or is the bin's middle"""
    min_block: int = 4
    """patches of the smallest block"""
    max_block_share: float = 0.5
    """share of the patch grid that the largest block may cover"""
    min_aspect: float = 0.3
    """lowest height/width of a block; the highest is its inverse"""

    def __post_init__(self) -> None:
        wrong = [
            f"{n}={getattr(self, n)} must be at least 1" for n in ("group_size", "min_block") if getattr(self, n) < 1
        ]
        if not 0 <= self.masked_share <= 1:
            wrong.append(f"masked_share={self.masked_share} must be in [0, 1]")
        if not 0 <= self.ratio[0] <= self.ratio[1] <= 1:
            wrong.append(f"ratio={self.ratio} must rise within [0, 1]")
        if not 0 < self.max_block_share <= 1:
            wrong.append(f"max_block_share={self.max_block_share} must be in (0, 1]")
        if not 0 < self.min_aspect <= 1:
            wrong.append(f"min_aspect={self.min_aspect} must be in (0, 1]")
        if wrong:
            raise ValueError("; ".join(wrong))

    def tokens_per_crop(self, num_patches: int) -> list[int]:
        """Masked tokens of each of a group's 2·group_size global crops, in dealing order; the unmasked come last.

        Ratios are the middles of equal bins; what is drawn within them adds up to the same.
        """
        num_crops, num_masked = NUM_VIEWS * self.group_size, self.num_masked
        low, high = self.ratio
        ratios = [low + (high - low) * (k + 0.5) / num_masked for k in range(num_masked)]
        return [round(ratio * num_patches) for ratio in ratios] + [0] * (num_crops - num_masked)

    @property
    def num_masked(self) -> int:
        """Masked crops of a group, and so bins of ratios."""
        return int(NUM_VIEWS * self.group_size * self.masked_share)

    def half_bin(self, num_patches: int) -> int:
        """Tokens that a ratio may lie off its bin's middle."""
        if not self.draw_ratios or not self.num_masked:
            return 0
        return int((self.ratio[1] - self.ratio[0]) * num_patches / self.num_masked / 2)


class Masks(NamedTuple):
    """Masks of the two global crops of B samples, and where they hide something."""

    hidden: Tensor
    """bool (2, B, N), view first, true where a patch is hidden from the student"""
    position: Tensor
    """int64 (M,): the hidden patches among the 2·B·N, ascending"""
    weight: Tensor
    """float32 (M,): of each hidden patch in the loss, as `mask_weights` has it"""


def located(hidden: Tensor) -> Masks:
    """Masks bool (2, B, N) with their positions; on the host, for a GPU would have to be waited for."""
    return Masks(hidden, hidden.flatten().nonzero().flatten(), mask_weights(hidden.flatten(0, 1)))


def block_masks(index: Tensor, patch_grid: tuple[int, int], masking: Masking, seed: int) -> Tensor:
    """Masks of the two global crops of each sample, true where a patch is hidden from the student.

    index int64 (B,), best on the CPU: the number of rounds depends on the data, which a GPU would have to wait for.
    patch_grid: rows and columns of patches. Returns bool (2, B, rows·columns), view first, as the global crops are.
    Source: DINOv2's `collate_data_and_cast` and `MaskingGenerator`; random top-up to the exact count as its successor.
    """
    view = torch.arange(NUM_VIEWS, device=index.device)[:, None]
    target = _deal(index, view, masking, patch_grid[0] * patch_grid[1], seed).flatten()
    crops = index.repeat(NUM_VIEWS), view.expand(-1, len(index)).flatten()
    masks = _draw_blocks(*crops, target, patch_grid, masking, seed)
    return _top_up(*crops, target, masks.flatten(1), seed).view(NUM_VIEWS, len(index), -1)


def _deal(index: Tensor, view: Tensor, masking: Masking, num_patches: int, seed: int) -> Tensor:
    """Masked tokens of each crop, int64 (2, B): its group's crops are ranked by hash, the rank says which ratio."""
    first = index - index % masking.group_size
    own = random_bits(seed, index, view, _ORDER)
    mates = first[:, None] + torch.arange(masking.group_size, device=index.device)
    others = random_bits(seed, mates, view[..., None], _ORDER)  # (2, B, group_size)
    rank = (others[None] < own[:, None, :, None]).sum(dim=(1, 3))
    middles = torch.tensor(masking.tokens_per_crop(num_patches), device=index.device)
    return middles[rank] + _off_middle(first, masking, num_patches, seed).gather(1, rank.T).T


def _off_middle(first: Tensor, masking: Masking, num_patches: int, seed: int) -> Tensor:
    """Tokens that each crop of a group, in dealing order, has above its middle; int64 (B, crops) of first indices (B,).

    Neighbouring bins are partners: one has more by what the other has less. A bin without a partner keeps its middle.
    """
    half, num_pairs = masking.half_bin(num_patches), masking.num_masked // 2
    draws = _RATIO + torch.arange(num_pairs, device=first.device)
    drawn = ((2 * half + 1) * uniform(seed, first[:, None], 0, draws)).long() - half
    off = first.new_zeros(len(first), NUM_VIEWS * masking.group_size)
    off[:, 0 : 2 * num_pairs : 2] = drawn
    off[:, 1 : 2 * num_pairs : 2] = -drawn
    return off


def _draw_blocks(
    index: Tensor, view: Tensor, target: Tensor, patch_grid: tuple[int, int], masking: Masking, seed: int
) -> Tensor:
    """Rectangles until a crop has no room for another one or ten in a row did not fit; bool (crops, rows, columns)."""
    rows, columns = patch_grid
    y, x = (torch.arange(size, device=index.device) for size in patch_grid)
    masks = torch.zeros(len(index), rows, columns, dtype=torch.bool, device=index.device)
    misses = torch.zeros_like(target)
    largest = int(masking.max_block_share * rows * columns)
    log_aspect = math.log(masking.min_aspect)
    draws = _BLOCKS + torch.arange(4, device=index.device)
    while True:
        room = (target - masks.sum(dim=(1, 2))).clamp(max=largest)
        active = (room >= masking.min_block) & (misses < _TRIES)
        if not active.any():
            return masks
        u = uniform(seed, index[:, None], view[:, None], draws)
        area = masking.min_block + u[:, 0] * (room - masking.min_block)
        aspect = torch.exp((1 - 2 * u[:, 1]) * log_aspect)
        height, width = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        fits = (height < rows) & (width < columns) & (height * width >= masking.min_block)
        top = (u[:, 2] * (rows - height + 1)).floor()[:, None]
        left = (u[:, 3] * (columns - width + 1)).floor()[:, None]
        in_rows = (y >= top) & (y < top + height[:, None])
        in_columns = (x >= left) & (x < left + width[:, None])
        block = in_rows[:, :, None] & in_columns[:, None, :]
        new = (block & ~masks).sum(dim=(1, 2))
        taken = active & fits & (new > 0) & (new <= room)
        masks |= block & taken[:, None, None]
        misses = torch.where(taken, 0, misses + 1)
        draws = draws + 4


def _top_up(index: Tensor, view: Tensor, target: Tensor, masks: Tensor, seed: int) -> Tensor:
    """Hides further random patches of (crops, N) until each crop has its target."""
    patches = torch.arange(masks.shape[1], device=masks.device)
    order = uniform(seed, index[:, None], view[:, None], _TOP_UP + patches)
    # Hidden patches come first, so the `target` lowest are those and the luckiest of the others.
    rank = order.masked_fill(masks, -1.0).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return rank < target[:, None]
