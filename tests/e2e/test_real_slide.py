"""A real slide from a local path: catalog, training, embeddings."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from trainer.cli import main

CMU = Path(__file__).parents[2].parent / "shared/data/CMU-1-crop.svs"


@pytest.mark.slow
@pytest.mark.skipif(not CMU.exists(), reason="the real slide is not here")
def test_a_real_slide_is_catalogued_trained_on_and_embedded_from_a_local_path(tmp_path: Path) -> None:
    catalog, run, out = (str(tmp_path / name) for name in ("catalog", "run", "embeddings"))
    assert main(["catalog", str(CMU), "--out", catalog]) == 0
    (row,) = pq.read_table(f"{catalog}/slides.parquet").to_pylist()
    assert (row["vendor"], row["mpp"], row["width"], row["height"]) == ("aperio", 0.499, 2220, 2967)
    train = ["train", "debug", "--debug", "--data.catalog", catalog, "--run.out", run, "--train.batch", "8"]
    assert main([*train, "--train.steps", "2", "--optim.warmup_steps", "1"]) == 0
    assert pq.read_table(f"{run}/metrics.parquet")["next_index"].to_pylist() == [8, 16]
    assert main(["embed", run, str(CMU), "--out", out, "--size", "128"]) == 0
    (written,) = Path(out).glob("CMU-1-crop-*.parquet")
    assert pq.read_table(written).num_rows > 50
