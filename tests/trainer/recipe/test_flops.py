"""FLOPs of a step against the sum of its products."""

from dataclasses import replace
from itertools import pairwise

import pytest

from trainer.recipe.flops import step_flops
from trainer.run.config import read_config


def test_the_flops_of_a_step_are_those_of_its_matrices() -> None:
    sizes = ("--model.drop_path", "0", "--model.num_prototypes", "40", "--model.head_hidden", "24")
    config = read_config("debug", [*sizes, "--model.head_bottleneck", "10", "--train.batch", "8"])
    width, depth, patch, heads = 192, 12, 3 * 16**2, (192, 24, 24, 10, 40)

    def head(num_tokens: int) -> int:
        return 2 * num_tokens * sum(a * b for a, b in pairwise(heads))

    def backbone(num_crops: int, side: int) -> tuple[int, int]:
        """Of the patch embedding, and of the blocks."""
        patches = (side // 16) ** 2
        tokens = patches + 1
        block = 2 * tokens * width * width * (3 + 1 + 4 + 4) + 2 * 2 * tokens**2 * width
        return 2 * num_crops * patches * patch * width, num_crops * depth * block

    masked = sum(config.mask.tokens_per_crop(16)) * 2
    large, small = backbone(16, 64), backbone(4 * 8, 32)
    found = step_flops(config.recipe, 8)
    assert found.teacher == sum(large) + head(16 + masked)
    # Twice as much backwards, but images need no gradient.
    assert found.student == 2 * (large[0] + small[0]) + 3 * (large[1] + small[1] + head(16 + 32 + masked))


def test_a_regression_and_stochastic_depth_cost_less_than_prototypes_and_all_crops() -> None:
    recipe = read_config("debug", ["--model.num_prototypes", "65536", "--model.drop_path", "0"]).recipe
    whole = step_flops(recipe, 8)
    regression = step_flops(replace(recipe, loss=replace(recipe.loss, patch="regression")), 8)
    assert regression.student < whole.student
    assert regression.teacher < whole.teacher
    dropping = step_flops(replace(recipe, model=replace(recipe.model, drop_path=0.5)), 8)
    assert dropping.teacher == whole.teacher
    assert dropping.student < 0.75 * whole.student
    assert step_flops(recipe, 16).total == pytest.approx(2 * whole.total)
