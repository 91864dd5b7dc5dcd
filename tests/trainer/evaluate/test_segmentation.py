"""Segmentation on patch tokens that show, or hide, the classes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from streaming.vision import cv2
from tests.made_tokens import FOLD, NUM, SIDE, of_tokens, samples
from trainer.cli import main
from trainer.evaluate.datasets import IGNORED, Samples
from trainer.evaluate.features import Features
from trainer.evaluate.scores import Score
from trainer.evaluate.scratch import scratch
from trainer.evaluate.segmentation import painted, score_segmentation

Table = Callable[..., str]


def segmented(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes of patches (NUM, SIDE, SIDE), and tokens of which one dimension is 1 where the class is."""
    random = np.random.default_rng(seed)
    classes = random.integers(0, 3, (NUM, SIDE, SIDE))
    return classes, np.eye(3)[classes] + random.normal(scale=0.05, size=(NUM, SIDE, SIDE, 3))


def masks_of(classes: np.ndarray) -> tuple[Callable[[int, int], np.ndarray], ...]:
    def mask(tile: np.ndarray) -> Callable[[int, int], np.ndarray]:
        return lambda height, width: tile.repeat(height // SIDE, 0).repeat(width // SIDE, 1).astype(np.uint8)

    return tuple(map(mask, classes))


def scored(features: Features, found: Samples, epochs: int) -> list[Score]:
    with scratch() as room:
        return score_segmentation(features, painted(found, features.side, room), found, FOLD, epochs, seed=0)


def test_a_mask_is_painted_once() -> None:
    count = list[int]()

    def mask(height: int, width: int) -> np.ndarray:
        count.append(0)
        return np.indices((height, width)).sum(axis=0).astype(np.uint8) % 2

    features = of_tokens(np.zeros((NUM, SIDE, SIDE, 3)))
    scored(features, samples(classes=tuple("ab"), masks=(mask,) * NUM), epochs=2)
    assert len(count) == NUM


def test_decoders_find_the_classes_that_tokens_show_and_not_those_they_hide() -> None:
    classes, tokens = segmented(0)
    shown = samples(classes=tuple("abc"), masks=masks_of(classes))
    found = scored(of_tokens(tokens), shown, epochs=40)
    assert [score.metric for score in found] == ["Dice, linear", "Dice, convolutional"]
    assert min(score.value for score in found) > 0.7  # patch borders are blurred by the upsampling
    assert found[0].groups == 4
    hidden = scored(of_tokens(np.roll(tokens, 1, axis=0)), shown, epochs=5)
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
    wrong[:, : SIDE // 2] = 0  # nothing to be seen where nothing is asked
    assert scored(of_tokens(wrong), part, epochs=40)[0].value > 0.7


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


def test_masks_of_one_class_are_refused(
    run_folder: str, coloured: Path, table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2.imwrite(str(tmp_path / "mask.png"), np.zeros((32, 32), np.uint8))
    rows = [{"path": path, "mask": "mask.png"} for path in sorted(coloured.rglob("*.png"))[:4]]
    assert main(["evaluate", run_folder, table(rows)]) == 2
    assert "masks hold 1 class" in capsys.readouterr().err
