"""The protocol of kaiko's eva: held to numbers that eva 0.4.5 gave once, and to eva itself where it is installed.

`eva_runs.py tests/data/eva-0.4.5.json`, run with a Python that has `kaiko-eva[vision]==0.4.5`, makes the numbers.
"""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from streaming.errors import ConfigError
from tests.trainer.evaluate import eva_runs
from tests.trainer.publish.test_export import saved
from trainer.cli import main
from trainer.evaluate import eva, eva_masks
from trainer.evaluate.datasets import Samples, Tile
from trainer.evaluate.options import EvaluateOptions
from trainer.evaluate.scoring import evaluate
from trainer.publish.export import export
from trainer.publish.kaiko_eva import backbone
from trainer.publish.options import ExportOptions

Table = Callable[..., str]
GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "eva-0.4.5.json").read_text())
PARTS = ("train", "val", "test")
STEPS = 400
"""of each run of eva itself, so that it takes a minute"""


def parts_of(sizes: dict[str, int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The part of each sample, and the indices of each part."""
    parts = np.repeat(PARTS, [sizes[part] for part in PARTS])
    return parts, {part: np.flatnonzero(parts == part) for part in PARTS}


def samples_of(labels: np.ndarray, parts: np.ndarray) -> Samples:
    classes = tuple(f"c{code}" for code in range(labels.max() + 1))
    tiles = tuple(Tile(uri=f"{i}.png") for i in range(len(labels)))
    return Samples(source="made", tiles=tiles, classes=classes, labels=labels, parts=parts)


def epochs_of(head: nn.Module, logits: Callable[..., torch.Tensor], labels: np.ndarray, parts: dict, setting) -> list:
    """Trains as `score_tiles` does, and gives the balanced accuracy after each epoch."""

    def loss(head: nn.Module, chosen: np.ndarray) -> torch.Tensor:
        return eva.class_loss(logits(head, chosen), torch.from_numpy(labels[chosen]))

    def score(head: nn.Module) -> float:
        return eva.balanced(labels[parts["val"]], eva.class_shares(logits(head, parts["val"])))

    return eva.fit(head, loss, score, parts["train"], setting, seed=0)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_linear_layer_is_trained_as_eva_trains_it(num_classes: int) -> None:
    labels = np.concatenate([eva_runs.labels_of(part, num_classes) for part in PARTS])
    inputs = torch.from_numpy(np.concatenate([eva_runs.embeddings(part, num_classes) for part in PARTS]))
    _, parts = parts_of(eva_runs.SIZES)
    head = eva_runs.linear(1 if num_classes == 2 else num_classes)
    setting = replace(eva.TILES, steps=150)
    found = epochs_of(head, lambda head, chosen: head(inputs[chosen]), labels, parts, setting)
    wanted = GOLDEN[f"linear {num_classes}"]
    np.testing.assert_allclose(found, wanted["val"], atol=1e-6)
    assert len(found) < 150  # it ended early
    np.testing.assert_allclose(eva_runs.sums(head), wanted["head"], atol=1e-5)
    shares = eva.class_shares(head(inputs[parts["test"]]).detach())
    key = "test/BinaryBalancedAccuracy" if num_classes == 2 else "test/MulticlassAccuracy"
    assert eva.balanced(labels[parts["test"]], shares) == pytest.approx(wanted["test"][key], abs=1e-6)


def test_slides_are_pooled_as_eva_pools_them() -> None:
    of_part = {part: eva_runs.bags(part) for part in PARTS}
    bags = [torch.from_numpy(bag) for part in PARTS for bag in of_part[part][0]]
    labels = np.concatenate([of_part[part][1] for part in PARTS])
    _, parts = parts_of({part: len(of_part[part][0]) for part in PARTS})

    def logits(head: nn.Module, chosen: np.ndarray) -> torch.Tensor:
        return torch.stack([head(bags[i]) for i in chosen])

    head = eva_runs.pinned(eva.GatedPooling(eva_runs.WIDTH, 1))
    found = epochs_of(head, logits, labels, parts, eva.SLIDES)
    wanted = GOLDEN["slide"]
    np.testing.assert_allclose(found, wanted["val"], atol=1e-6)
    # The bias of the attention has no gradient but rounding.
    np.testing.assert_allclose(eva_runs.sums(head), wanted["head"], atol=1e-3)
    shares = eva.class_shares(logits(head, parts["test"]).detach())
    assert eva.balanced(labels[parts["test"]], shares) == pytest.approx(
        wanted["test"]["test/BinaryBalancedAccuracy"], abs=1e-6
    )


def test_pixels_are_decoded_as_eva_decodes_them() -> None:
    tokens = {part: torch.from_numpy(eva_runs.tokens(part)[0]).float() for part in PARTS}
    masks = {part: eva_runs.tokens(part)[1] for part in PARTS}
    head = eva_runs.pinned(eva_masks.pixel_decoder(8, 3))

    def loss(head: nn.Module, chosen: np.ndarray) -> torch.Tensor:
        return eva_masks.pixel_loss(head(tokens["train"][chosen]), torch.from_numpy(masks["train"][chosen]))

    def dice(part: str) -> float:
        with torch.inference_mode():
            shown = nn.functional.interpolate(head(tokens[part]), size=(eva_runs.PIXELS,) * 2, mode="bilinear")
        return float(np.nanmean(eva_masks.image_dice(masks[part], shown.argmax(dim=1).numpy(), [1, 2])))

    found = eva.fit(head, loss, lambda _: dice("val"), np.arange(12), replace(eva_masks.PIXELS, steps=60), seed=0)
    wanted = GOLDEN["masks"]
    np.testing.assert_allclose(found, wanted["val"], atol=1e-4)
    np.testing.assert_allclose(eva_runs.sums(head), wanted["head"], atol=1e-3)
    assert dice("test") == pytest.approx(wanted["test"]["test/MonaiDiceScore"], abs=1e-4)


def test_the_loss_leaves_out_unknown_pixels_as_eva_does() -> None:
    random = np.random.default_rng(7)
    logits, target = random.standard_normal((2, 3, 8, 8)).astype(np.float32), random.integers(0, 3, (2, 8, 8))
    target[0, :3] = 255
    found = eva_masks.pixel_loss(torch.from_numpy(logits), torch.from_numpy(target))
    assert float(found) == pytest.approx(GOLDEN["loss with unknown pixels"], abs=1e-6)
    image = random.integers(0, 256, (3, 300, 260), dtype=np.uint8)
    shown = eva.resize_and_crop(image.transpose(1, 2, 0))
    assert shown.whole == (258, 224)
    np.testing.assert_array_equal(shown.pixels.transpose(2, 0, 1)[:, ::37, ::41], GOLDEN["image"])


@pytest.mark.parametrize(
    ("setting", "num", "limits"),
    [
        (eva.TILES, 268, (12_500, 1250)),  # BACH
        (eva.TILES, 100_000, (12_500, 7)),  # CRC
        (eva.TILES, 262_144, (12_500, 3)),  # PatchCamelyon
        (eva.TILES, 15_303, (12_500, 42)),  # Gleason of Arvaniti
        (eva.SLIDES, 216, (700, 20)),  # CAMELYON16: 100 epochs
    ],
)
def test_patience_is_that_of_evas_configurations(setting: eva.Setting, num: int, limits: tuple[int, int]) -> None:
    assert setting.limits(num) == limits


def test_scores_are_the_mean_of_the_runs_with_their_deviation() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(90) % 3
    embeddings = (random.standard_normal((90, 8)) + np.eye(8)[labels]).astype(np.float32)
    parts, _ = parts_of({"train": 40, "val": 20, "test": 30})
    samples = replace(samples_of(labels, parts), patients=np.array([f"p{i}" for i in range(90)]))
    fold, warning = eva.eva_fold(samples)
    assert warning is None
    one, three = (
        eva.score_tiles(embeddings, samples, fold, setting=replace(eva.TILES, steps=300, runs=runs)) for runs in (1, 3)
    )
    assert [score.metric for score in three] == ["balanced accuracy", "AUROC"]
    for score in three:
        assert score.low < score.value < score.high
        assert (score.n, score.groups) == (30, 30)
        assert 0 <= score.stdev < 0.1
    assert np.isnan(one[0].stdev)


def test_a_test_part_of_one_class_has_no_area() -> None:
    labels = np.array([0, 1] * 15 + [0] * 10)
    embeddings = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    samples = samples_of(labels, parts_of({"train": 20, "val": 10, "test": 10})[0])
    fold, _ = eva.eva_fold(samples)
    accuracy, area = eva.score_tiles(embeddings, samples, fold, setting=replace(eva.TILES, steps=30, runs=2))
    assert accuracy.value > 0
    assert np.isnan([area.value, area.stdev]).all()


def test_without_a_split_it_is_refused_and_with_two_parts_it_is_told() -> None:
    labels = np.arange(12) % 2
    with pytest.raises(ConfigError, match="protocol eva needs a split"):
        eva.eva_fold(replace(samples_of(labels, np.repeat("test", 12)), parts=None))
    fold, warning = eva.eva_fold(samples_of(labels, np.repeat(["train", "test"], 6)))
    assert fold.val is fold.test
    assert warning is not None
    assert "also chose when training ends" in warning


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--task", "knn"], "can't be scored by knn; take some of linear"),
        (["--epochs", "10"], "protocol eva has its own epochs; leave out --epochs"),
    ],
)
def test_what_eva_has_not_is_refused(
    run_folder: str, coloured: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    assert main(["evaluate", run_folder, str(coloured), "--protocol", "eva", *options]) == 2
    assert told in capsys.readouterr().err


def test_steps_that_only_tiles_have_are_refused_for_slides(
    table: Table, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [{"slide": f"s{i}", "label": "ab"[i % 2], "split": "test" if i > 3 else "train"} for i in range(8)]
    asked = ["--protocol", "eva", "--probe-steps", "100"]
    assert main(["evaluate", str(tmp_path), table(rows), *asked]) == 2
    assert "own steps for masks and slides; leave out --probe-steps" in capsys.readouterr().err


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three textures, of no square shape, in a split by patients; as a table, and as folders for eva."""
    folder = tmp_path_factory.mktemp("labelled")
    random, rows = np.random.default_rng(0), ["path,label,patient,split"]
    for i in range(150):
        kind, part = i % 3, PARTS[min(i // 50, 2)]
        base = random.integers(60, 200, (13 + 4 * kind, 11 + 4 * kind, 3), dtype=np.uint8)
        Image.fromarray(base).resize((250, 300), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        rows.append(f"{i}.png,texture{kind},p{i},{part}")
    (folder / "tiles.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("model")
    sizes = ("--augment.global_size", "224", "--augment.local_size", "96", "--data.tile_size", "224")
    export(saved(out / "run", *sizes), str(out / "model"), ExportOptions(token="cls+patch"))
    return str(out / "model")


def configuration(labelled: Path, model: str) -> dict[str, object]:
    """eva's `offline/classification/bach.yaml` with other images: with a part to test on, and this model."""
    monitor = {"monitor": "val/MulticlassAccuracy", "mode": "max"}
    stored, table, numbers = (
        "embeddings",
        str(labelled / "tiles.csv"),
        json.loads(Path(model, "config.json").read_text()),
    )
    told = numbers["pretrained_cfg"]
    shown = {
        "class_path": "eva.vision.data.transforms.common.ResizeAndCrop",
        "init_args": {"size": 224, "mean": told["mean"], "std": told["std"]},
    }
    loader = {"batch_size": 256, "num_workers": 0, "persistent_workers": False, "prefetch_factor": None}
    callbacks = [
        {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": {**monitor, **more}}
        for name, more in (
            ("ModelCheckpoint", {"filename": "best", "save_top_k": 1}),
            ("EarlyStopping", {"min_delta": 0, "patience": STEPS // 5}),
        )
    ]
    writer = {
        "output_dir": stored,
        "dataloader_idx_map": dict(enumerate(PARTS)),
        "backbone": backbone(model, "cls+patch", numbers["model_args"].get("reg_tokens") or 0),
        "overwrite": False,
    }
    callbacks.append({"class_path": "eva.callbacks.ClassificationEmbeddingsWriter", "init_args": writer})
    return {
        "trainer": {
            "class_path": "eva.Trainer",
            "init_args": {
                **{"n_runs": 5, "default_root_dir": "logs", "max_steps": STEPS, "checkpoint_type": "best"},
                **{"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "callbacks": callbacks},
            },
        },
        "model": {
            "class_path": "eva.HeadModule",
            "init_args": {
                "head": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 384, "out_features": 3}},
                "criterion": "torch.nn.CrossEntropyLoss",
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4}},
                "metrics": {
                    "common": [
                        {"class_path": "eva.metrics.MulticlassClassificationMetrics", "init_args": {"num_classes": 3}}
                    ]
                },
            },
        },
        "data": {
            "class_path": "eva.DataModule",
            "init_args": {
                "datasets": {
                    **{
                        part: {
                            "class_path": "eva.datasets.EmbeddingsClassificationDataset",
                            "init_args": {"root": stored, "manifest_file": "manifest.csv", "split": part},
                        }
                        for part in PARTS
                    },
                    "predict": [
                        {
                            "class_path": "eva_images.Images",
                            "init_args": {"table": table, "split": part, "transforms": shown},
                        }
                        for part in PARTS
                    ],
                },
                "dataloaders": {
                    **dict.fromkeys(("val", "test", "predict"), loader),
                    "train": {**loader, "shuffle": True},
                },
            },
        },
    }


@pytest.mark.long
def test_images_get_the_score_that_eva_gives_them(labelled: Path, model: str, tmp_path: Path) -> None:
    if "TILESTREAM_EVA_PYTHON" not in os.environ:
        pytest.skip("TILESTREAM_EVA_PYTHON names no Python that has kaiko-eva 0.4.5")
    ours = evaluate(model, str(labelled / "tiles.csv"), EvaluateOptions(protocol="eva", probe_steps=STEPS))
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(configuration(labelled, model), sort_keys=False))
    command = [os.environ["TILESTREAM_EVA_PYTHON"], "-m", "eva", "predict_fit", "--config", "task.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "logs").rglob("results.json")
    theirs = json.loads(results.read_text())["metrics"]["test"][0]
    for score, key in zip(ours, ("test/MulticlassAccuracy", "test/MulticlassAUROC"), strict=True):
        spread = max(3 * theirs[key]["stdev"], 3 * score.stdev, 0.005)
        assert score.value == pytest.approx(theirs[key]["mean"], abs=spread)


def test_the_command_prints_and_writes_scores_of_runs(
    run_folder: str, coloured: Path, table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(coloured.rglob("*.png"))
    rows = [{"path": p, "label": p.parts[-3], "split": "val" if i % 3 else "train"} for i, p in enumerate(paths)]
    out = str(tmp_path / "scores")
    asked = ["--protocol", "eva", "--resize", "32", "--probe-steps", "100", "--out", out]
    assert main(["evaluate", run_folder, table(rows), *asked]) == 0
    printed = capsys.readouterr()
    assert "± of runs" in printed.out
    assert "100 steps at most instead of 12,500: the scores are not eva's" in printed.err
    assert "also chose when training ends" in printed.err
    accuracy, area = pq.read_table(f"{out}/scores.parquet").to_pylist()
    for row, metric in ((accuracy, "balanced accuracy"), (area, "AUROC")):
        assert row["metric"] == metric
        assert row["value"] > 0.7  # red and blue are told apart
        assert row["stdev"] is not None
