"""Training on views of one place: global crops of one scale, local crops of another."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from streaming.catalog import Catalog
from streaming.errors import CheckpointError, ConfigError
from streaming.plan.views import View
from streaming.reading.reader import TileReader
from tests.trainer.run.test_resume import assert_equal_states, logged
from trainer.recipe.augment import Augmentation
from trainer.run import checkpoints
from trainer.run.checkpoints import read_config as config_of
from trainer.run.config import Config, read_config
from trainer.run.data import load_catalog
from trainer.run.dry_run import describe, memory, model_size
from trainer.run.fit import make_module
from trainer.run.replay import find_replay, micro_batches
from trainer.run.step_batches import for_step
from trainer.run.train import train

VIEWS = "[{mpp: 0.5}, {mpp: 1.0, same_centre: true}]"
SMALL = [
    *("--train.batch", "4", "--train.log_every", "1", "--optim.warmup_steps", "2", "--data.tile_size", "64"),
    *("--augment.global_size", "32", "--augment.local_size", "16", "--augment.num_local", "2"),
    *("--model.num_prototypes", "32", "--model.head_hidden", "16", "--model.head_bottleneck", "8"),
    *("--train.steps", "4", "--train.checkpoint_every", "2"),
]


def config_with(catalog: str, out: Path, *overrides: str, views: str = VIEWS) -> Config:
    arguments = ["--data.catalog", catalog, "--run.out", str(out), "--data.views", views]
    return read_config("debug", [*SMALL, *arguments, *overrides])


def batch_of(config: Config, *indices: int) -> dict[str, torch.Tensor]:
    catalog = load_catalog(config.data)
    stream = config.stream(catalog)
    found = TileReader(stream.plan, catalog, stream.reader)({"index": np.array(indices)})
    return {name: torch.from_numpy(column) for name, column in found.items() if column.dtype != object}


@pytest.mark.parametrize("few_kernels", [False, True])
@pytest.mark.parametrize(
    ("overrides", "of_global", "of_local"),
    [((), "tile", "tile_1"), (("--augment.global_view", "1", "--augment.local_view", "0"), "tile_1", "tile")],
)
def test_global_crops_are_of_one_view_and_local_crops_of_another_and_depend_on_their_sample_alone(
    catalog: str, tmp_path: Path, overrides: tuple[str, ...], of_global: str, of_local: str, few_kernels: bool
) -> None:
    config = config_with(catalog, tmp_path, *overrides)
    module = make_module(config, few_kernels=few_kernels)
    batch = batch_of(config, 5, 9, 2)
    crops = module.step_input(module.drawn(for_step(batch, config.augment))).crops
    by_view = {
        name: config.augment.multi_crop(batch[name], batch["index"], config.run.seed, few_kernels=few_kernels)
        for name in (of_global, of_local)
    }
    assert torch.equal(crops.global_, by_view[of_global].global_)
    assert torch.equal(crops.local, by_view[of_local].local)
    assert not torch.equal(crops.local, by_view[of_global].local)
    alone = module.step_input(module.drawn(for_step(batch_of(config, 9), config.augment))).crops
    assert torch.allclose(alone.local[:, 0], crops.local[:, 1], atol=1e-6)


@pytest.mark.slow
def test_a_run_on_views_goes_on_to_the_very_weights_and_with_no_other_views(catalog: str, tmp_path: Path) -> None:
    whole = config_with(
        catalog, tmp_path / "whole", "--watch.validation_slides", "0.4", "--watch.validation_every", "2"
    )
    train(whole, debug=True)
    # What a killed run leaves behind.
    source, target = (Path(checkpoints.checkpoint_uri(str(tmp_path / name), 2)) for name in ("whole", "halves"))
    target.parent.mkdir(parents=True)
    source.rename(target)
    halves = replace(whole, run=replace(whole.run, out=str(tmp_path / "halves")))
    assert train(halves, debug=True).start == 2
    ends = [checkpoints.load(checkpoints.checkpoint_uri(str(tmp_path / name), 4)) for name in ("whole", "halves")]
    assert_equal_states(*ends)
    assert logged(tmp_path / "whole")[2:] == logged(tmp_path / "halves")
    assert {"loss", "validation_loss"} <= logged(tmp_path / "whole")[3].keys()
    assert config_of(str(target)).data.views == (View(mpp=0.5), View(mpp=1.0, same_centre=True))
    for views in ("[{mpp: 0.5}, {mpp: 2.0, same_centre: true}]", "[]"):
        other = config_with(catalog, tmp_path / "halves", views=views)
        with pytest.raises(CheckpointError, match=r"data.views .*--force") as caught:
            train(replace(other, watch=halves.watch), debug=True)
        assert "\n" not in str(caught.value)

    replay = find_replay(halves.run.out, 3, config_of(str(target)))
    (seen,) = micro_batches(replay, Catalog.load(catalog), 0)
    batch = batch_of(whole, *seen.index.tolist())
    assert torch.equal(seen.tiles[0], batch["tile"])
    assert torch.equal(seen.tiles[1], batch["tile_1"])
    wanted = whole.augment.multi_crop(batch["tile_1"], batch["index"], whole.run.seed)
    assert torch.equal(seen.crops.local, wanted.local)


@pytest.mark.parametrize(
    ("views", "overrides", "told"),
    [
        ("[{mpp: 0.5}]", (), "views has one view: give at least two"),
        ("[{mpp: 0.5}, {mpp: 1.0}]", (), "views[1] has no same_centre: true"),
        ("[{mpp: 0.5}, {mmp: 1.0, same_centre: true}]", (), "data.views"),
        ("[{mpp: 0.5}, {mpp: fine, same_centre: true}]", (), "data.views is 'fine'; give a list"),
        ("0.5", (), "data.views is '0.5'; give a list, such as [a, b], of {mpp: …, same_centre: …}"),
        (VIEWS, ("--data.tiles", "list.parquet"), "tiles list.parquet: a list has single tiles; leave out data.views"),
        (VIEWS, ("--augment.local_view", "2"), "augment.local_view 2: of data.views there are 2"),
        (VIEWS, ("--augment.global_view", "-1"), "global_view=-1 must not be negative"),
        (VIEWS, ("--augment.local_view", "0"), "data.views[1]: no crop is cut from it"),
        (VIEWS, ("--augment.num_local", "0"), "data.views[1]: no crop is cut from it"),
        ("[]", ("--augment.global_view", "1"), "augment.global_view 1: of data.views there are 1"),
    ],
)
def test_views_that_make_no_sense_are_refused_in_one_line(
    catalog: str, tmp_path: Path, views: str, overrides: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_with(catalog, tmp_path, *overrides, views=views)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dry_run_tells_of_views_and_counts_their_tiles(catalog: str, tmp_path: Path) -> None:
    config, single = config_with(catalog, tmp_path), config_with(catalog, tmp_path, views="[]")
    lines = list(describe(config))
    assert "tiles seen    16 of 64 px, each of 2 views" in lines
    assert any(line.endswith("its 3 slides give 64 px tiles at 0.5, 1 µm/px") for line in lines)
    store = "tiles in object store"
    assert memory(config, model_size(config))[store][0] == 2 * memory(single, model_size(single))[store][0]


def test_without_views_crops_are_of_the_tile_whatever_the_default_view() -> None:
    assert Augmentation().cut_from(1) == (0, 0)
    assert Augmentation().cut_from(3) == (0, 2)
