"""`tilestream evaluate` in this process: what it prints and writes, and what it refuses in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch

from streaming import open_slide
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from streaming.vision import cv2
from tests.conftest import write_catalog
from tests.dicom_files import Kind, write_series
from tests.qupath import feature, rectangle
from trainer.cli import main
from trainer.embed.model import load_model
from trainer.embed.options import SlideOptions
from trainer.evaluate.annotations import AnnotatedTiles
from trainer.evaluate.datasets import Region, Tile
from trainer.evaluate.features import extract
from trainer.evaluate.options import EvaluateOptions
from trainer.evaluate.scores import Score
from trainer.evaluate.scoring import evaluate
from trainer.evaluate.scratch import scratch
from trainer.publish.export import export
from trainer.publish.options import ExportOptions

Table = Callable[..., str]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    try:
        status = main(["evaluate", *map(str, arguments)])
    except SystemExit as left:
        status = left.code
    assert status == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tilestream")]
    assert len(lines) == 1
    return lines[0]


def rows_of(coloured: Path, **more: str) -> list[dict[str, object]]:
    paths = sorted(coloured.rglob("*.png"))
    return [{"path": p, "label": p.parts[-3], "patient": p.parts[-2], **more} for p in paths]


def test_a_folder_by_class_and_patient_is_scored_printed_and_written(
    run_folder: str, coloured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores"
    tasks = ("--task", "knn", "linear", "logistic", "quality", "--probe-steps", "200", "--k", "3")
    assert main(["evaluate", run_folder, str(coloured), *tasks, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    scores = {(row["task"], row["metric"]): row for row in pq.read_table(out / "scores.parquet").to_pylist()}
    for task in ("knn", "linear", "logistic"):
        row = scores[task, "balanced accuracy"]
        assert row["value"] == 1  # red and blue are told apart even by random weights
        assert (row["n"], row["groups"]) == (48, 4)
        assert f"{task:<13} balanced accuracy" in printed
    assert scores["quality", "RankMe"]["low"] is None
    assert scores["quality", "purity by class, k=3"]["value"] == 1
    assert json.loads((out / "scores.json").read_text())["scores"] == list(scores.values())
    assert sorted(path.name for path in out.iterdir()) == ["scores.json", "scores.parquet"]


def test_a_leak_that_can_not_be_ruled_out_is_told_loudly(
    run_folder: str, coloured: Path, table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = table([{"path": row["path"], "label": row["label"]} for row in rows_of(coloured)])
    assert main(["evaluate", run_folder, uri, "--task", "knn", "--out", str(tmp_path / "scores")]) == 0
    assert "tilestream: warning:" in capsys.readouterr().err
    assert "MAY LEAK" in json.loads((tmp_path / "scores" / "scores.json").read_text())["warning"]


def test_the_function_gives_what_the_command_prints(run_folder: str, coloured: Path) -> None:
    found = evaluate(run_folder, str(coloured), EvaluateOptions(probe_steps=10))
    assert all(isinstance(score, Score) for score in found)
    assert [score.task for score in found][:2] == ["knn", "linear"]


def test_embeddings_are_those_of_the_embedding_job(run_folder: str, slides: list[Path], tmp_path: Path) -> None:
    places = [(100, 200), (700, 400), (900, 1000)]
    tiles = [Tile(uri=str(slides[0]), region=Region(x=x, y=y, mpp=0.5, size=40)) for x, y in places]
    with scratch(str(tmp_path)) as room:
        features = extract(load_model(run_folder), tiles, patches=room, batch=2)
        assert [path.name for path in tmp_path.glob("*/*")] == ["patch-tokens.npy"]
        slide = open_slide(str(slides[0]))
        pixels = np.stack([slide.read_tile(x, y, 0.5, 40) for x, y in places])
        model = load_model(run_folder, "cls")
        np.testing.assert_allclose(features.embeddings, model.embed(pixels), atol=1e-5)
        assert features.patches is not None
        assert features.patches.shape == (3, 2, 2, 192)
        mean = load_model(run_folder, "patch").embed(pixels)
        np.testing.assert_allclose(features.patches.astype(np.float32).mean(axis=(1, 2)), mean, atol=2e-3)


def test_slides_in_dicom_are_scored_as_the_same_in_svs(
    run_folder: str, slides: list[Path], tmp_path: Path, table: Table, geojson: Table
) -> None:
    series = [write_series(tmp_path / f"u{i}", slides[i], Kind(suffix="")) for i in range(2)]
    shapes = [feature(rectangle(x, 0, x + 512, 512), "ab"[x > 0]) for x in (0, 1024)]
    annotation = geojson(shapes)
    found = dict[tuple[str, str], list[Score]]()
    options = EvaluateOptions(tasks=("knn", "quality"), k=2, grid=AnnotatedTiles(mpp=0.5, size=32))
    for name, places in (
        ("svs", slides[:2]),
        ("file", [paths[-1] for paths in series]),
        ("folder", [f"{paths[0].parent}/" for paths in series]),
    ):
        regions = [
            {"path": places[i % 2], "x": 90 * i, "y": 64 * i, "mpp": 0.5, "size": 32, "label": "ab"[i // 2 % 2]}
            for i in range(12)
        ]
        found["regions", name] = evaluate(
            run_folder, table([{**row, "patient": i} for i, row in enumerate(regions)]), options
        )
        rows = [{"slide": place, "annotation": annotation, "patient": i} for i, place in enumerate(places)]
        found["annotations", name] = evaluate(run_folder, table(rows), options)
    for kind in ("regions", "annotations"):
        assert found[kind, "svs"] == found[kind, "file"] == found[kind, "folder"]


def test_an_exported_model_gives_the_run_s_embeddings_by_its_own_recipe(
    run_folder: str, coloured: Path, tmp_path: Path
) -> None:
    export(run_folder, str(tmp_path / "model"), ExportOptions(token="cls+patch"))
    tiles = [Tile(uri=str(path)) for path in sorted(coloured.rglob("0.png"))]
    exported = load_model(str(tmp_path / "model"))
    assert exported.token == "cls+patch"
    one, other = extract(exported, tiles), extract(load_model(run_folder, "cls+patch"), tiles)
    np.testing.assert_allclose(one.embeddings, other.embeddings, atol=1e-5)


def test_weights_of_timms_hub_serve_as_they_are(monkeypatch: pytest.MonkeyPatch, coloured: Path) -> None:
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    # The hub can't be reached here: its downloader gives a model of the same kind.
    monkeypatch.setattr("timm.create_model", lambda name, **options: plain)
    model = load_model("vit_tiny_patch16_224")
    pixels = cv2.imread(str(next(coloured.rglob("*.png"))))[None]
    images = (
        model.tokens(torch.from_numpy(pixels)),
        plain.forward_features(_normalised(pixels, model.mean, model.std)),
    )
    np.testing.assert_allclose(images[0].cls.numpy(), images[1][:, 0].detach().numpy(), atol=1e-4)


def _normalised(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]):
    import torch

    return torch.from_numpy(((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)).float()


def test_a_table_of_one_class_is_refused(
    capsys: pytest.CaptureFixture[str], run_folder: str, coloured: Path, table: Table
) -> None:
    line = refusal(capsys, run_folder, table([{**row, "label": "red"} for row in rows_of(coloured)]))
    assert "all 48 labels are 'red'; a task needs two classes or more" in line


def test_missing_labels_are_counted_and_the_first_is_named(
    capsys: pytest.CaptureFixture[str], run_folder: str, coloured: Path, table: Table
) -> None:
    rows = rows_of(coloured)
    rows[3]["label"] = rows[9]["label"] = ""
    line = refusal(capsys, run_folder, table(rows))
    assert f"2 of 48 rows have no label (first: row 4, {rows[3]['path']})" in line


def test_a_leaking_split_is_refused_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], run_folder: str, coloured: Path, table: Table, tmp_path: Path
) -> None:
    rows = rows_of(coloured)
    for i, row in enumerate(rows):
        row["split"] = "test" if i % 4 == 0 else "train"
    line = refusal(capsys, run_folder, table(rows), "--out", tmp_path / "scores")
    assert "patient p0 is in test and in train (4 such); a split must keep each patient on one side" in line
    assert not (tmp_path / "scores").exists()


def test_a_broken_image_leaves_nothing_half_written(
    capsys: pytest.CaptureFixture[str], run_folder: str, coloured: Path, table: Table, tmp_path: Path
) -> None:
    rows = rows_of(coloured)
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows[40]["path"] = tmp_path / "broken.png"
    line = refusal(capsys, run_folder, table(rows), "--out", tmp_path / "scores")
    assert "broken.png: 8 bytes that are no image" in line
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("vit_tiny_patch16_22", "neither a run, nor an exported model, nor a model of timm's, such as vit_tiny_"),
        ("resnet18", "no plain vision transformer"),
    ],
)
def test_an_unknown_backbone_is_refused(
    capsys: pytest.CaptureFixture[str], coloured: Path, source: str, named: str
) -> None:
    assert named in refusal(capsys, source, coloured)


def test_a_slide_without_the_resolution_is_refused(
    capsys: pytest.CaptureFixture[str], run_folder: str, slides: list[Path], table: Table
) -> None:
    rows = [
        {"path": slides[i % 2], "x": 64 * i, "y": 0, "mpp": 0.1, "size": 32, "label": "ab"[i // 2 % 2]}
        for i in range(8)
    ]
    line = refusal(capsys, run_folder, table(rows))
    assert f"{slides[0]}: has 0.25 µm/px at best: for tiles of 0.1 it would be enlarged 2.5 times, over 2;" in line


@pytest.mark.parametrize("x", [90_000, -90_000])
def test_a_tile_beside_its_slide_is_no_glass(
    capsys: pytest.CaptureFixture[str], run_folder: str, slides: list[Path], table: Table, x: int
) -> None:
    rows = [
        {
            "path": slides[i % 2],
            "x": x if i == 5 else 64 * i - 32,
            "y": 0,
            "mpp": 0.5,
            "size": 32,
            "label": "ab"[i // 4],
        }
        for i in range(8)
    ]
    line = refusal(capsys, run_folder, table(rows))
    assert f"{slides[1]}: a tile at x {x}, y 0 lies beside the slide of 2048 × 1536 px" in line


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_told(capsys: pytest.CaptureFixture[str], coloured: Path, seed: int) -> None:
    assert f"seed is {seed}; it must be from 0" in refusal(capsys, "run", coloured, f"--seed={seed}")


@pytest.mark.parametrize("kind", ["regions", "annotations"])
def test_slides_are_what_a_catalog_says_of_them(
    capsys: pytest.CaptureFixture[str],
    run_folder: str,
    slides: list[Path],
    table: Table,
    geojson: Table,
    tmp_path: Path,
    kind: str,
) -> None:
    bare = [tmp_path / f"bare{i}.svs" for i in range(2)]
    for i, path in enumerate(bare):
        write_slide(SyntheticSlide(width=2048, height=1536, patient=i, downsamples=(1, 4), write_mpp=False), path)
    catalog = write_catalog(tmp_path / "catalog", bare, mpp=0.25)
    found = list[list[Score]]()
    # By their names alone, and by the addresses of slides that are the same but for what their metadata tells.
    for places in (slides[:2], [path.stem for path in bare]):
        if kind == "regions":
            of_slide = [
                {"path": places[i % 2], "x": 90 * i, "y": 64 * i, "mpp": 0.5, "size": 32, "label": "ab"[i // 2 % 2]}
                for i in range(12)
            ]
            rows = [{**row, "patient": i} for i, row in enumerate(of_slide)]
        else:
            shapes = [feature(rectangle(x, 0, x + 512, 512), "ab"[x > 0]) for x in (0, 1024)]
            rows = [{"slide": place, "annotation": geojson(shapes), "patient": i} for i, place in enumerate(places)]
        slides_in = (catalog,) if places != slides[:2] else ()
        tiles = AnnotatedTiles(mpp=0.5, size=32)
        options = EvaluateOptions(tasks=("knn",), k=2, grid=tiles, slides=SlideOptions(slides_in=slides_in))
        found.append(evaluate(run_folder, table(rows), options))
    assert found[0] == found[1]
    named = "path" if kind == "regions" else "slide"
    told = refusal(capsys, run_folder, table([{**row, named: bare[0]} for row in rows]))
    assert "give it by --slide-mpp, or name a catalog that has it by --slides-in" in told
    other = write_catalog(tmp_path / "other", slides[2:])
    line = refusal(capsys, run_folder, table(rows), "--slides-in", other)
    assert "bare" in line
    assert f"not among the 1 slides of --slides-in {other}" in line


def test_images_of_several_sizes_want_one(
    capsys: pytest.CaptureFixture[str], run_folder: str, coloured: Path, table: Table, tmp_path: Path
) -> None:
    rows = rows_of(coloured)
    cv2.imwrite(str(tmp_path / "large.png"), np.zeros((48, 48, 3), np.uint8))
    rows[5]["path"] = tmp_path / "large.png"
    uri = table(rows)
    assert "32 × 32 px, and 48 × 48 px; give one --resize" in refusal(capsys, run_folder, uri)
    assert main(["evaluate", run_folder, uri, "--task", "knn", "--resize", "32"]) == 0


def test_patch_tokens_without_room_or_folder_are_told_before_they_are_kept(
    capsys: pytest.CaptureFixture[str],
    run_folder: str,
    coloured: Path,
    table: Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cv2.imwrite(str(tmp_path / "mask.png"), (np.indices((32, 32)).sum(axis=0) % 2).astype(np.uint8))
    uri = table([{"path": row["path"], "patient": row["patient"], "mask": "mask.png"} for row in rows_of(coloured)])
    assert "No such file or directory; name a folder to write to by --scratch" in refusal(
        capsys, run_folder, uri, "--scratch", tmp_path / "none"
    )
    own = tmp_path / "own"
    own.mkdir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    line = refusal(capsys, run_folder, uri, "--scratch", own)
    assert f"{own}: patch-tokens take 0.0 GB while they are scored, and 0.0 GB are free; name a folder" in line
    assert not list(own.iterdir())


def test_an_unknown_task_is_refused(capsys: pytest.CaptureFixture[str], run_folder: str, coloured: Path) -> None:
    assert "argument --task: invalid choice: 'knm'" in refusal(capsys, run_folder, coloured, "--task", "knm")
