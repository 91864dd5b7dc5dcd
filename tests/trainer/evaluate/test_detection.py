"""Detection on patch tokens that show where points are."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.made_tokens import FOLD, NUM, PX, SIDE, of_tokens, samples
from tests.qupath import feature, rectangle
from trainer.cli import main
from trainer.evaluate.detection import _Maps, focal_loss, heatmaps, peaks, score_detection

Table = Callable[..., str]


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


def test_points_whose_partner_may_lie_beyond_the_edge_do_not_count() -> None:
    truth = np.array([[3.0, 30, 0], [30, 30, 0], [40, 20, 0]])
    maps = _Maps(features=of_tokens(np.zeros((NUM, SIDE, SIDE, 3))), points=[truth], num_classes=1, radius_px=8)
    found = np.array([[5.0, 31], [32, 30], [62, 10], [20, 50]])
    # Of the truth one lies in the border, one is found, one missed; of what is found, one in the border is no alarm.
    assert maps._matched(truth[:, :2], found) == (1, 1, 1)


def test_points_that_tokens_show_are_found_within_the_radius() -> None:
    random = np.random.default_rng(2)
    tokens, points = random.normal(scale=0.05, size=(NUM, SIDE, SIDE, 3)), list[np.ndarray]()
    for tile in tokens:
        row, column = random.integers(0, SIDE, 2)
        dy, dx = random.uniform(0.2, 0.8, 2)
        tile[row, column] += (1, dy, dx)  # a token says that there is a point in its patch, and where
        points.append(np.array([[(column + dx) * PX / SIDE, (row + dy) * PX / SIDE, 0]]))
    found = samples(classes=("mitosis",), points=tuple(points))
    (score,) = score_detection(of_tokens(tokens), found, FOLD, radius_px=8, epochs=80, seed=0)
    assert score.metric == "F1 within 8 px"
    assert score.value > 0.8
    assert (score.n, score.groups) == (8, 4)


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
    cut = ("--mpp", "0.5", "--size", "64", "--epochs", "1", "--probe-steps", "10", "--folds", "3", "--k", "3")
    for task, shown in (("knn", "knn"), ("segmentation", "Dice, linear"), ("detection", "F1 within 12 px")):
        assert main(["evaluate", run_folder, uri, "--task", task, *cut]) == 0
        assert shown in capsys.readouterr().out
    assert main(["evaluate", run_folder, uri, "--task", "knn", "detection", *cut]) == 2
    assert "of different kinds of labels" in capsys.readouterr().err
