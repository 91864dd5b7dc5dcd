"""Patch targets by regression, trained on made slides."""

from pathlib import Path

import pytest
import torch

from streaming.catalog import Catalog
from streaming.errors import CheckpointError
from tests.trainer.run.test_resume import logged, tiny
from trainer.recipe.losses import regression_loss
from trainer.recipe.masks import located
from trainer.recipe.module import DinoModule
from trainer.run import checkpoints
from trainer.run.config import Config
from trainer.run.fit import make_module
from trainer.run.train import train

REGRESSION = (
    *("--loss.patch", "regression", "--model.backbone", "test_vit", "--augment.global_size", "64"),
    *(
        "--augment.local_size",
        "32",
        "--model.head_hidden",
        "256",
        "--train.batch",
        "16",
        "--train.steps",
        "60",
        "--train.checkpoint_every",
        "60",
    ),
)


@torch.no_grad()
def errors(config: Config, module: DinoModule) -> tuple[float, float]:
    """On tiles after those of the run: the student's error at masked patches, and that of the best constant token."""
    module.eval()
    stream = config.stream(Catalog.load(config.data.catalog or ""))
    batch = next(stream.local_batches(70, 71))
    crops, masks = config.recipe.views(batch["tile"], batch["index"], module.patch_grid, config.run.seed)
    where, flat, images = located(masks), masks.flatten(0, 1), crops.global_.flatten(0, 1)
    _, _, targets = module._targets(crops.global_, where, 0.04)
    _, _, predicted = module.student([images], [flat], where.position)
    constant = targets.median(dim=0).values.expand_as(targets)
    found = [regression_loss(one, targets, where.weight, len(flat)).item() for one in (predicted, constant)]
    return found[0], found[1]


def test_a_student_learns_to_foretell_masked_tokens_of_tiles_that_it_has_not_seen(catalog: str, tmp_path: Path) -> None:
    config = tiny(catalog, tmp_path / "run", *REGRESSION)
    module = make_module(config)
    untrained, constant = errors(config, module)
    assert untrained > constant
    train(config, debug=True)
    module.load_state_dict(checkpoints.load(checkpoints.checkpoint_uri(config.run.out, 60))["state_dict"])
    error, constant = errors(config, module)
    assert error < 0.8 * constant
    assert constant > 0.05, "tokens that are all alike are easy to foretell"
    rows = logged(tmp_path / "run")
    assert "ibot" not in rows[0]
    assert rows[-1]["regression"] < rows[0]["regression"]


def test_the_teacher_has_no_predictor_and_another_term_is_another_network(catalog: str, tmp_path: Path) -> None:
    short = ("--train.steps", "1", "--train.checkpoint_every", "1", "--optim.warmup_steps", "0")
    config = tiny(catalog, tmp_path / "run", *REGRESSION, *short, "--model.separate_heads", "true")
    names = make_module(config).state_dict().keys()
    assert [name for name in names if "predictor" in name and name.startswith("student")]
    assert not [name for name in names if "ibot_head" in name or name.startswith("teacher.predictor")]
    train(config, debug=True)
    other = tiny(catalog, tmp_path / "run", *REGRESSION, *short, "--loss.patch", "ibot", "--train.steps", "2")
    with pytest.raises(CheckpointError, match=r"does not fit the configuration: .*loss\.patch regression \(now ibot\)"):
        train(other, debug=True, force=True)
