"""Segmentation and detection by heads on patch tokens: made images whose truth is their colour."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from trainer.cli import main
from trainer.evaluate import EvaluateOptions, evaluate
from trainer.evaluate.dense import focal_loss, heatmaps, peaks

SIDE, PATIENTS = 64, 6
Rows = list[dict[str, object]]


@pytest.fixture
def masked(tmp_path: Path) -> Rows:
    """Images of a red and a blue half, whose border lies elsewhere in each, and their masks."""
    random, rows = np.random.default_rng(0), Rows()
    for i in range(4 * PATIENTS):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[:, int(random.integers(16, 48)) :] = 1
        image = np.array([(40, 40, 200), (200, 40, 40)])[mask] + random.integers(-30, 30, (SIDE, SIDE, 3))
        mask[:4] = 255  # unknown
        image_path, mask_path = tmp_path / f"{i}.png", tmp_path / f"{i}-mask.png"
        cv2.imwrite(str(image_path), np.clip(image, 0, 255).astype(np.uint8))
        cv2.imwrite(str(mask_path), mask)
        rows.append({"path": image_path, "mask": mask_path, "patient": f"p{i % PATIENTS}"})
    return rows


def test_decoders_find_classes_that_the_colour_tells(
    run_folder: str, masked: Rows, table: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", run_folder, table(masked), "--epochs", "25", "--folds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "Dice, linear" in printed
    found = {score.metric: score for score in evaluate(run_folder, table(masked), EvaluateOptions(epochs=25, folds=2))}
    assert sorted(found) == ["Dice, convolutional", "Dice, linear"]
    for score in found.values():
        # Half of the image by chance would be 0.5; a patch of 8 px leaves the border's column to guess.
        assert score.value > 0.8
        assert (score.n, score.groups) == (len(masked), PATIENTS)
        assert score.low <= score.value <= score.high
    swapped = [{**row, "mask": masked[-1 - i]["mask"]} for i, row in enumerate(masked)]
    other = evaluate(run_folder, table(swapped, "swapped.csv"), EvaluateOptions(epochs=25, folds=2))
    assert all(score.value < found[score.metric].value - 0.05 for score in other)


def test_a_task_that_the_dataset_is_not_of_is_refused(
    run_folder: str, masked: Rows, table: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", run_folder, table(masked), "--task", "knn"]) == 2
    assert "can't be scored by knn; take some of segmentation" in capsys.readouterr().err


def test_a_heatmap_s_peaks_are_the_points_it_was_made_of() -> None:
    points = np.array([[10.0, 20.0, 0], [40.0, 44.0, 0], [30.0, 8.0, 1]])
    maps = heatmaps([points], 2, (16, 16), 0.25)
    for kind in range(2):
        ((places, heights),) = peaks(maps[:, kind], 1.5, 0.5)
        wanted = points[points[:, 2] == kind, :2]
        assert len(places) == len(wanted)
        assert (heights == 1).all()
        order = np.argsort(places[:, 0])
        assert np.abs(places[order] * 4 - wanted[np.argsort(wanted[:, 0])]).max() <= 2  # half a cell of 4 px


def test_the_focal_loss_is_the_paper_s() -> None:
    logits, target = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([[1.0, 0.5, 0.0]])
    p = torch.sigmoid(logits[0])
    # arXiv 1904.07850, equation 1, with alpha 2, beta 4 and one point.
    wanted = -((1 - p[0]) ** 2 * p[0].log() + 0.5**4 * p[1] ** 2 * (1 - p[1]).log() + p[2] ** 2 * (1 - p[2]).log())
    torch.testing.assert_close(focal_loss(logits, target), wanted)


def test_points_that_the_colour_tells_are_detected(
    run_folder: str, geojson: Callable[..., str], table: Callable[..., str], tmp_path: Path
) -> None:
    random, rows = np.random.default_rng(1), Rows()
    for i in range(8):
        image = np.full((128, 128, 3), 220, np.uint8)
        features = []
        for x, y in random.permutation(
            np.stack(np.meshgrid(np.arange(16, 128, 32), np.arange(16, 128, 32)), -1).reshape(-1, 2)
        )[:5]:
            cv2.circle(image, (int(x), int(y)), 7, (60, 20, 60), -1)
            features.append(
                {
                    "type": "Feature",
                    "geometry": {"type": "Point", "coordinates": [int(x), int(y)]},
                    "properties": {"objectType": "annotation", "classification": {"name": "Mitosis"}},
                }
            )
        path = tmp_path / f"cells{i}.png"
        cv2.imwrite(str(path), image)
        annotation = geojson(features, f"cells{i}.geojson")
        rows.append({"path": path, "annotation": annotation, "patient": f"p{i % 4}"})
    options = EvaluateOptions(tasks=("detection",), epochs=60, folds=2, radius_px=8)
    (score,) = evaluate(run_folder, table(rows), options)
    assert (score.task, score.metric, score.n) == ("detection", "F1 within 8 px", 40)
    assert score.value > 0.6
