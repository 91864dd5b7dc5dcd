"""The report of a run, as a browser without a network shows it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from streaming import storage
from trainer.cli import main
from trainer.run import checkpoints
from trainer.run.config import read_config
from trainer.run.fit import make_module

SMALL = [
    *("--augment.global_size", "32", "--augment.local_size", "16", "--data.tile_size", "32"),
    *("--model.num_prototypes", "32", "--model.head_hidden", "16", "--model.head_bottleneck", "8"),
]
SCORE = {"task": "knn", "metric": "balanced accuracy", "value": 0.8125, "low": None, "high": None, "n": 48, "groups": 4}


@pytest.fixture
def run(catalog: str, tmp_path: Path) -> Path:
    """What training leaves: a checkpoint, metrics, a tile that failed."""
    config = read_config("debug", [*SMALL, "--data.catalog", catalog, "--run.out", str(tmp_path / "run")])
    state = {"state_dict": make_module(config).state_dict(), "global_step": 3}
    checkpoints.write(checkpoints.checkpoint_uri(config.run.out, 3), state, config, "0123")
    metrics = {
        "step": [1, 2, 3],
        "next_index": [8, 16, 24],
        "loss": [9.0, 8.5, 8.25],
        "tiles_per_s": [1.0, 40.0, 42.0],
        "data_wait_share": [0.5, 0.1, 0.1],
        "knn_accuracy": [None, 0.5, None],
        "validation_loss": [None, None, 8.3],
    }
    storage.write_table(str(tmp_path / "run" / "metrics.parquet"), pa.table(metrics))
    failed = {"slide": ["a.svs"], "reason": ["block 3: <broken>"], "count": [2], "first_index": [4]}
    storage.write_table(str(tmp_path / "run" / "failures.parquet"), pa.table(failed))
    return tmp_path / "run"


def test_a_report_shows_a_run_its_scores_and_failures_without_a_network(run: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    scores.mkdir()
    about = {"model": str(run), "dataset": "/d/tiles.csv", "warning": "THE SCORES MAY LEAK", "scores": [SCORE]}
    (scores / "scores.json").write_text(json.dumps(about))
    out = tmp_path / "report.html"
    assert main(["report", str(run), "--scores", str(scores), "--out", str(out)]) == 0
    page = out.read_text()
    for shown in ("tiles.csv", "0.812", "THE SCORES MAY LEAK", "9.00 → 8.25"):
        assert shown in page
    for shown in ("2 tiles could not be read", "&lt;broken&gt;", "kNN accuracy by", "loss, held out"):
        assert shown in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page), "nothing is fetched"
    assert not re.search(r"url\((?!data:|#|[\"']?(data:|#))", page)
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here to open it")
    picture = tmp_path / "report.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,4000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", out.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=90)
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (4000, 1000, 3)
    written = (pixels != pixels[2, 2]).any(axis=2)
    assert written[:600].mean() > 0.02, "the headline is drawn"
    assert np.count_nonzero(written.reshape(40, 100, 1000).any(axis=(1, 2))) > 25, "so is what follows, down the page"


def test_a_report_without_its_parts_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    assert main(["report", str(run), "--scores", str(tmp_path), "--out", str(out)]) == 2
    assert f"{tmp_path}: no scores.json here; name a folder of `tilestream evaluate --out`" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--out", str(out)]) == 2
    assert "no checkpoint here" in capsys.readouterr().err
    for broken in ("", "[]", '{"model": "m"}', json.dumps({"model": "m", "dataset": "d", "scores": [{"task": "knn"}]})):
        (tmp_path / "scores.json").write_text(broken)
        assert main(["report", str(run), "--scores", str(tmp_path), "--out", str(out)]) == 2
        assert "scores.json: not what `tilestream evaluate --out` writes" in capsys.readouterr().err
    metrics = storage.read_table(str(run / "metrics.parquet"))
    for odd, told in (
        (metrics.slice(0, 0), "metrics.parquet: no step of this run is logged yet"),
        (metrics.drop_columns("loss"), "metrics.parquet: has no loss"),
    ):
        storage.write_table(str(run / "metrics.parquet"), odd)
        assert main(["report", str(run), "--out", str(out)]) == 2
        assert told in capsys.readouterr().err
    (run / "metrics.parquet").unlink()
    assert main(["report", str(run), "--out", str(out)]) == 2
    assert "metrics.parquet: no step of this run is logged yet" in capsys.readouterr().err
    assert not out.exists()
