"""Segmentation and detection on patch tokens that show, or hide, what is looked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.qupath import feature, rectangle
from trainer.cli import main
from trainer.evaluate.datasets import IGNORED, Samples, Tile
from trainer.evaluate.dense import focal_loss, heatmaps, peaks, score_detection, score_segmentation
from trainer.evaluate.features import Features
from trainer.evaluate.splits import Fold

Table = Callable[..., str]
NUM, GRID, PX = 24, 4, 64
FOLD = [Fold(train=np.arange(16), test=np.arange(16, NUM))]


def of_tokens(tokens: np.ndarray) -> Features:
    wide = np.tile(tokens, 32).astype(np.float16)  # as wide as a small model's
    return Features(embeddings=np.zeros((NUM, 1), np.float32), patches=wide, side=(PX, PX))


def samples(**targets: Any) -> Samples:
    patients = np.array([f"p{i // 2}" for i in range(NUM)])
    return Samples(source="d", tiles=tuple(Tile(uri=str(i)) for i in range(NUM)), patients=patients, **targets)


def segmented(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes of patches (NUM, GRID, GRID), and tokens of which one dimension is 1 where the class is."""
    random = np.random.default_rng(seed)
    classes = random.integers(0, 3, (NUM, GRID, GRID))
    return classes, np.eye(3)[classes] + random.normal(scale=0.05, size=(NUM, GRID, GRID, 3))


def masks_of(classes: np.ndarray) -> tuple[Callable[[int, int], np.ndarray], ...]:
    def mask(tile: np.ndarray) -> Callable[[int, int], np.ndarray]:
        return lambda height, width: tile.repeat(height // GRID, 0).repeat(width // GRID, 1).astype(np.uint8)

    return tuple(map(mask, classes))


def test_decoders_find_the_classes_that_tokens_show_and_not_those_they_hide() -> None:
    classes, tokens = segmented(0)
    shown = samples(classes=tuple("abc"), masks=masks_of(classes))
    found = score_segmentation(of_tokens(tokens), shown, FOLD, epochs=40, seed=0)
    assert [score.metric for score in found] == ["Dice, linear", "Dice, convolutional"]
    assert min(score.value for score in found) > 0.7  # patch borders are blurred by the upsampling
    assert found[0].groups == 4
    hidden = score_segmentation(of_tokens(np.roll(tokens, 1, axis=0)), shown, FOLD, epochs=5, seed=0)
    assert max(score.value for score in hidden) < 0.45


def test_dice_counts_the_known_pixels_of_all_tiles() -> None:
    classes, tokens = segmented(1)

    def half(mask: Callable[[int, int], np.ndarray]) -> Callable[[int, int], np.ndarray]:
        def known(height: int, width: int) -> np.ndarray:
            found = mask(height, width).copy()
            found[: height // 2] = IGNORED
            return found

        return known

    part = samples(classes=tuple("abc"), masks=tuple(map(half, masks_of(classes))))
    wrong = tokens.copy()
    wrong[:, : GRID // 2] = 0  # nothing to be seen where nothing is asked
    assert score_segmentation(of_tokens(wrong), part, FOLD, epochs=40, seed=0)[0].value > 0.7


def test_a_heatmap_is_one_at_points_and_falls_off_as_a_gaussian() -> None:
    (maps,) = heatmaps([np.array([[10.0, 22.0, 1]])], 2, (8, 8), 0.25)
    assert maps[0].max() == 0
    assert maps[1, 5, 2] == 1
    assert maps[1, 5, 4].item() == pytest.approx(np.exp(-2), rel=1e-5)


def test_the_focal_loss_follows_its_formula() -> None:
    logits, target = torch.tensor([[0.3, -1.2, 2.0]]), torch.tensor([[1.0, 0.5, 0.0]])
    p = 1 / (1 + np.exp(-logits.numpy()[0]))
    wanted = -((1 - p[0]) ** 2 * np.log(p[0]) + 0.5**4 * p[1] ** 2 * np.log(1 - p[1]) + p[2] ** 2 * np.log(1 - p[2]))
    assert focal_loss(logits, target).item() == pytest.approx(wanted, rel=1e-5)


def test_peaks_are_the_highest_within_their_radius() -> None:
    heat = torch.zeros(1, 9, 9)
    heat[0, 2, 2], heat[0, 2, 4], heat[0, 7, 7], heat[0, 7, 0] = 0.9, 0.8, 0.7, 0.1
    ((places, heights),) = peaks(heat, 2, 0.3)
    assert places.tolist() == [[2.5, 2.5], [7.5, 7.5]]
    assert heights.tolist() == pytest.approx([0.9, 0.7])


def test_points_that_tokens_show_are_found_within_the_radius() -> None:
    random = np.random.default_rng(2)
    tokens, points = random.normal(scale=0.05, size=(NUM, GRID, GRID, 3)), list[np.ndarray]()
    for tile in tokens:
        row, column = random.integers(0, GRID, 2)
        dy, dx = random.uniform(0.2, 0.8, 2)
        tile[row, column] += (1, dy, dx)  # a token says that there is a point in its patch, and where
        points.append(np.array([[(column + dx) * PX / GRID, (row + dy) * PX / GRID, 0]]))
    found = samples(classes=("mitosis",), points=tuple(points))
    (score,) = score_detection(of_tokens(tokens), found, FOLD, radius_px=8, epochs=80, seed=0)
    assert score.metric == "F1 within 8 px"
    assert score.value > 0.8
    assert (score.n, score.groups) == (8, 4)


def test_images_with_masks_are_scored_by_the_command(run_folder: str, table: Table, tmp_path: Path) -> None:
    random, rows = np.random.default_rng(3), list[dict[str, object]]()
    for i in range(12):
        mask = np.zeros((64, 64), np.uint8)
        mask[:, 32:] = 1
        mask = mask if i % 2 else mask.T
        image = np.where(mask[..., None] == 1, (200, 40, 40), (40, 40, 200)) + random.integers(-20, 20, (64, 64, 3))
        cv2.imwrite(str(tmp_path / f"{i}.png"), image.clip(0, 255).astype(np.uint8))
        cv2.imwrite(str(tmp_path / f"{i}-mask.png"), mask)
        rows.append({"path": f"{i}.png", "mask": f"{i}-mask.png", "patient": i // 2})
    out = tmp_path / "scores"
    options = ("--epochs", "30", "--folds", "2", "--out", str(out))
    assert main(["evaluate", run_folder, table(rows), *options]) == 0
    scores = pq.read_table(out / "scores.parquet").to_pylist()
    assert [row["metric"] for row in scores] == ["Dice, linear", "Dice, convolutional"]
    assert min(row["value"] for row in scores) > 0.9


def test_annotated_slides_are_scored_by_the_task_that_is_asked_for(
    run_folder: str, slides: list[Path], geojson: Table, table: Table, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = [
        feature(rectangle(0, 0, 512, 256), "Tumor"),
        feature(rectangle(0, 256, 512, 512), "Stroma"),
        feature({"type": "MultiPoint", "coordinates": [[100, 100], [300, 400]]}, "Mitosis"),
    ]
    rows = [
        {"slide": slide, "annotation": geojson(shapes, f"{slide.stem}.geojson"), "patient": slide.stem}
        for slide in slides
    ]
    uri = table(rows)
    cut = ("--mpp", "0.5", "--size", "64", "--epochs", "1", "--steps", "10", "--folds", "3", "--k", "3")
    for task, shown in (("knn", "knn"), ("segmentation", "Dice, linear"), ("detection", "F1 within 12 px")):
        assert main(["evaluate", run_folder, uri, "--task", task, *cut]) == 0
        assert shown in capsys.readouterr().out
    assert main(["evaluate", run_folder, uri, "--task", "knn", "detection", *cut]) == 2
    assert "of different kinds of labels" in capsys.readouterr().err


def test_masks_of_one_class_are_refused(
    run_folder: str, coloured: Path, table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2.imwrite(str(tmp_path / "mask.png"), np.zeros((32, 32), np.uint8))
    rows = [{"path": path, "mask": "mask.png"} for path in sorted(coloured.rglob("*.png"))[:4]]
    assert main(["evaluate", run_folder, table(rows)]) == 2
    assert "masks hold 1 class" in capsys.readouterr().err
