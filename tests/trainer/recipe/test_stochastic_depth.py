"""Which crops a branch sees, drawn by hash."""

import torch

from trainer.recipe.stochastic_depth import kept_crops


def test_each_branch_sees_a_share_of_the_crops_and_each_crop_is_seen_equally_often() -> None:
    kept = torch.stack([kept_crops(torch.arange(8 * i, 8 * i + 8), range(2), 24, 0.4, 0) for i in range(100)])
    assert kept.shape == (100, 24, 9)  # of 16 crops, rounded down
    assert (kept.diff(dim=-1) > 0).all(), "no crop twice"
    assert kept.min() == 0
    counts = torch.bincount(kept.flatten(), minlength=16)
    expected = 100 * 24 * 9 / 16
    assert (counts - expected).abs().max() < 5 * expected**0.5
    assert len(kept.flatten(0, 1).unique(dim=0)) > 2000, "branches and batches differ"


def test_what_is_kept_depends_on_the_samples_views_and_seed_alone() -> None:
    index = torch.tensor([5, 900, 17, 2**40])
    kept = kept_crops(index, range(2, 10), 4, 0.25, 3)
    assert torch.equal(kept_crops(index, range(2, 10), 4, 0.25, 3), kept)
    assert torch.equal(kept_crops(index, range(2, 10), 2, 0.25, 3), kept[:2]), "more blocks change nothing of the first"
    for other in (kept_crops(index + 1, range(2, 10), 4, 0.25, 3), kept_crops(index, range(2, 10), 4, 0.25, 4)):
        assert not torch.equal(other, kept)


def test_one_crop_at_least_is_seen() -> None:
    assert kept_crops(torch.arange(1), range(1), 2, 0.9, 0).tolist() == [[0], [0]]
