from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.recipe.masks import Masking, block_masks

GRID = (16, 16)


def counts(index: torch.Tensor, masking: Masking, grid: tuple[int, int] = GRID, seed: int = 0) -> torch.Tensor:
    return block_masks(index, grid, masking, seed).sum(dim=2)


def largest_solid_rectangle(mask: torch.Tensor) -> int:
    """Area by brute force over a summed-area table."""
    rows, columns = mask.shape
    total = torch.zeros(rows + 1, columns + 1, dtype=torch.long)
    total[1:, 1:] = mask.long().cumsum(0).cumsum(1)
    return max(
        (bottom - top) * (right - left)
        for top in range(rows)
        for bottom in range(top + 1, rows + 1)
        for left in range(columns)
        for right in range(left + 1, columns + 1)
        if total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
        == (bottom - top) * (right - left)
    )


@given(
    start=st.integers(0, 10**6), seed=st.integers(0, 2**64), group=st.integers(1, 9), share=st.sampled_from([0.25, 0.5])
)
@settings(max_examples=15, deadline=None)
def test_every_group_deals_each_ratio_once(start: int, seed: int, group: int, share: float) -> None:
    masking = Masking(group_size=group, masked_share=share, draw_ratios=False)
    found = counts(torch.arange(group) + start * group, masking, seed=seed)
    num_masked = int(2 * group * share)
    width = 0.4 / max(num_masked, 1)
    expected = [round(256 * (0.1 + width / 2 + width * k)) for k in range(num_masked)]
    assert sorted(found.flatten().tolist()) == [0] * (2 * group - num_masked) + expected


@given(start=st.integers(0, 10**6), seed=st.integers(0, 2**64), group=st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_every_group_has_a_ratio_of_each_bin_and_the_same_number_of_masked_tokens(
    start: int, seed: int, group: int
) -> None:
    index = torch.arange(group) + start * group
    found, middles = (
        sorted(counts(index, Masking(group_size=group, draw_ratios=draw), seed=seed).flatten().tolist())
        for draw in (True, False)
    )
    assert sum(found) == sum(middles)
    assert found[:group] == [0] * group
    for k, count in enumerate(found[group:]):
        assert 256 * (0.1 + 0.4 * k / group) - 1 <= count <= 256 * (0.1 + 0.4 * (k + 1) / group) + 1


def test_ratios_are_drawn_evenly_over_their_whole_range() -> None:
    found = counts(torch.arange(2000), Masking(group_size=4)).flatten()
    shares = found[found > 0] / 256
    low, high = shares.min().item(), shares.max().item()
    assert (low, high) == pytest.approx((0.1, 0.5), abs=0.01)
    histogram = torch.histc(shares, bins=8, min=0.1, max=0.5) / len(shares)
    torch.testing.assert_close(histogram, torch.full((8,), 1 / 8), rtol=0, atol=0.03)


def test_every_aligned_micro_batch_has_the_same_number_of_masked_tokens() -> None:
    masking = Masking(group_size=4)
    totals = {counts(torch.arange(8) + 8 * step, masking).sum().item() for step in range(10)}
    assert len(totals) == 1
    assert totals.pop() == pytest.approx(8 * 256 * 0.3, abs=8)


def test_a_mask_depends_on_its_sample_alone() -> None:
    masking, index = Masking(group_size=4), torch.arange(100, 112)
    together = block_masks(index, GRID, masking, 5)
    order = torch.tensor([7, 2, 11, 0, 5])
    assert torch.equal(block_masks(index[order], GRID, masking, 5), together[:, order])
    for i in range(12):
        assert torch.equal(block_masks(index[i : i + 1], GRID, masking, 5)[:, 0], together[:, i])


def test_masks_change_with_sample_view_and_seed() -> None:
    masking = Masking(group_size=1, masked_share=1.0)
    masks = torch.cat([block_masks(torch.arange(50), GRID, masking, seed).flatten(0, 1) for seed in (0, 1)])
    assert len(masks.unique(dim=0)) == 200


def test_either_view_is_masked_equally_often() -> None:
    masked = counts(torch.arange(1000), Masking(group_size=4)) > 0
    assert masked.sum() == 1000
    assert abs(masked[0].sum().item() - 500) < 60
    assert Counter(masked.sum(dim=0).tolist()).keys() == {0, 1, 2}


def test_hidden_patches_come_in_blocks() -> None:
    masks = block_masks(torch.arange(6), (8, 8), Masking(group_size=1, masked_share=1.0, ratio=(0.3, 0.3)), 0)
    areas = [largest_solid_rectangle(mask.view(8, 8)) for mask in masks.flatten(0, 1)]
    scattered = torch.rand(12, 64, generator=torch.Generator().manual_seed(0)).argsort(dim=1) < 19
    assert min(areas) >= 4
    assert sum(areas) > 2 * sum(largest_solid_rectangle(mask.view(8, 8)) for mask in scattered)


def test_every_patch_is_hidden_equally_often() -> None:
    masks = block_masks(torch.arange(4000), (8, 8), Masking(group_size=4), 0)
    share = masks.float().mean(dim=(0, 1)).view(8, 8)
    # Blocks favour the middle, as the reference's do, but no patch may be left out.
    assert share.min() > 0.03
    assert share.max() < 0.25
    torch.testing.assert_close(share, share.flip(0), atol=0.02, rtol=0)
    torch.testing.assert_close(share, share.T, atol=0.02, rtol=0)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (4, 4), (3, 20)])
def test_small_and_narrow_grids_get_their_exact_count(grid: tuple[int, int]) -> None:
    masking = Masking(group_size=1, masked_share=1.0, ratio=(0.5, 0.5))
    assert (counts(torch.arange(20), masking, grid) == round(grid[0] * grid[1] / 2)).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 0, "min_block": 0}, "group_size=0 must be at least 1; min_block=0"),
        ({"ratio": (0.5, 0.1)}, r"ratio=\(0\.5, 0\.1\) must rise"),
        ({"masked_share": 1.5}, r"masked_share=1\.5"),
        ({"max_block_share": 0.0, "min_aspect": 2.0}, r"max_block_share=0\.0 .*; min_aspect=2\.0"),
    ],
)
def test_impossible_masking_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Masking(**{"group_size": 4} | fields)
