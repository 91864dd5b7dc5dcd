"""Slides whose class only a few of their tiles show."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr

from streaming.errors import ConfigError
from trainer.cli import main
from trainer.embed.feature_files import keys
from trainer.evaluate.annotations import AnnotatedTiles
from trainer.evaluate.datasets import Samples, Tile, read_dataset
from trainer.evaluate.mil import GatedAttention, fit, predict, read_bags
from trainer.evaluate.scratch import scratch

Table = Callable[..., str]
NUM, TILES, WIDTH = 24, 40, 16


def bags(seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(NUM) % 2
    found = [random.normal(size=(TILES, WIDTH)).astype(np.float32) for _ in labels]
    for bag, label in zip(found, labels, strict=True):
        bag[:4, 0] += 4 if label else 0  # four of forty tiles
    return found, labels


def test_attention_finds_the_tiles_that_tell_the_class() -> None:
    found, labels = bags(0)
    model = fit(found, labels, 2, epochs=40, seed=0)
    unseen, truth = bags(1)
    assert (predict(model, unseen).argmax(axis=1) == truth).mean() >= 0.9
    attention = model(torch.from_numpy(unseen[1]))[1]
    assert attention[:4].mean() > 3 * attention[4:].mean()


def test_the_order_of_tiles_does_not_matter_and_attention_sums_to_one() -> None:
    model, bag = GatedAttention(WIDTH, 3).eval(), torch.randn(10, WIDTH)
    logits, attention = model(bag)
    order = torch.randperm(10)
    torch.testing.assert_close(model(bag[order])[0], logits)
    assert attention.sum().item() == pytest.approx(1)


def test_attention_follows_its_formula() -> None:
    model, bag = GatedAttention(WIDTH, 2).eval(), torch.randn(5, WIDTH)
    h = model.hidden(bag)
    value, gate = h @ model.value.weight.T + model.value.bias, h @ model.gate.weight.T + model.gate.bias
    scores = (
        (value.exp() - (-value).exp()) / (value.exp() + (-value).exp()) / (1 + (-gate).exp())
    ) @ model.weight.weight[0]
    weights = scores.exp() / scores.exp().sum()
    torch.testing.assert_close(model(bag)[0], model.head((weights[:, None] * h).sum(dim=0)))


@pytest.fixture
def embedded(tmp_path: Path) -> Path:
    """Parquet files in the layout of `tilestream embed`."""
    folder = tmp_path / "embeddings"
    folder.mkdir()
    for i, bag in enumerate(bags(0)[0]):
        columns = {"slide": [f"s3://b/slides/s{i}.svs"] * TILES, "x": [0] * TILES, "y": [0] * TILES}
        width = pa.FixedSizeListArray.from_arrays(pa.array(bag.ravel()), WIDTH)
        pq.write_table(pa.table({**columns, "embedding": width}), folder / f"s{i}-0123abcd.parquet")
    pq.write_table(pa.table({"slide": ["s3://b/slides/x.svs"], "reason": ["broken"]}), folder / "rejected.parquet")
    return folder


def slide_rows() -> list[dict[str, object]]:
    return [
        {"slide": f"s{i}.svs", "label": ("benign", "malignant")[i % 2], "patient": f"p{i // 4}"} for i in range(NUM)
    ]


def test_slides_are_scored_from_the_files_of_the_embedding_job(embedded: Path, table: Table, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    assert main(["evaluate", str(embedded), table(slide_rows()), "--epochs", "20", "--out", str(out)]) == 0
    accuracy, area = pq.read_table(out / "scores.parquet").to_pylist()
    assert (accuracy["task"], area["metric"]) == ("slide", "AUROC")
    assert accuracy["value"] > 0.8
    assert area["value"] > 0.85
    assert (area["n"], area["groups"]) == (NUM, 6)


@pytest.mark.parametrize("named", ["s3://idc-open-data/u{}/*", "s3://idc-open-data/u{}/", "u{}", "u{}/i{}.dcm"])
def test_a_series_of_dicom_is_found_by_its_folder(tmp_path: Path, table: Table, named: str) -> None:
    folder = tmp_path / "embeddings"
    folder.mkdir()
    for i in range(2):
        width = pa.FixedSizeListArray.from_arrays(pa.array(np.full(WIDTH, i, np.float32)), WIDTH)
        columns = {"slide": [f"s3://idc-open-data/u{i}/i{i}.dcm"], "x": [0], "y": [0], "embedding": width}
        pq.write_table(pa.table(columns), folder / f"i{i}-0123abcd.parquet")
    rows = [{"slide": named.format(i, i), "label": "ab"[i]} for i in (1, 0)]
    with scratch(str(tmp_path)) as room:
        found = read_bags(str(folder), read_dataset(table(rows), AnnotatedTiles()), room)
        assert [bag[0, 0] for bag in found] == [1, 0]


@pytest.mark.parametrize("damage", ["missing", "twice"])
def test_a_slide_without_embeddings_or_with_two_kinds_is_refused(
    embedded: Path, table: Table, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = embedded / "s3-0123abcd.parquet"
    if damage == "missing":
        one.unlink()
    else:
        (embedded / "s3-ffffffff.parquet").write_bytes(one.read_bytes())
    assert main(["evaluate", str(embedded), table(slide_rows())]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert (
        "s3.svs: no embeddings in" in told and "(1 of 24 slides" in told
    ) or "are both of s3.svs, embedded in two ways" in told


def test_where_embeddings_lie_far_from_zero_does_not_matter() -> None:
    found, labels = bags(0)
    unseen, _ = bags(1)
    moved, shift = [bag * 7 + 300 for bag in found], [bag * 7 + 300 for bag in unseen]
    one, other = (
        predict(fit(*learnt, 2, epochs=3, seed=0), to)
        for learnt, to in (((found, labels), unseen), ((moved, labels), shift))
    )
    np.testing.assert_allclose(one, other, atol=1e-3)


class Theirs:
    """Writes a slide's file as others lay it out."""

    @staticmethod
    def trident(path: Path, bag: np.ndarray) -> None:
        with h5py.File(path, "w") as file:
            file["features"] = bag[None]
            file["coords"] = np.zeros((len(bag), 2), np.int32)
            file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 512, "target_magnification": 20})

    @staticmethod
    def clam(path: Path, bag: np.ndarray) -> None:
        with h5py.File(path, "w") as file:
            file["features"], file["coords"] = bag, np.zeros((len(bag), 2), np.int64)

    @staticmethod
    def lazyslide(path: Path, bag: np.ndarray) -> None:
        zarr.open_group(path.with_suffix(".zarr") / "tables/uni_tiles", mode="w").create_array("X", data=bag)


@pytest.mark.parametrize("maker", ["TRIDENT", "CLAM", "LazySlide"])
def test_embeddings_of_others_are_scored_as_ours(
    embedded: Path, table: Table, tmp_path: Path, maker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, values = tmp_path / maker, list[list[dict]]()
    theirs.mkdir()
    for i, bag in enumerate(bags(0)[0]):
        getattr(Theirs, maker.lower())(theirs / f"s{i}.h5", bag)
    with h5py.File(theirs / "coordinates.h5", "w") as file:
        file["coords"] = np.zeros((3, 2))
    for folder in (embedded, theirs):
        out = tmp_path / f"scores-{folder.name}"
        assert main(["evaluate", str(folder), table(slide_rows()), "--epochs", "3", "--out", str(out)]) == 0
        values.append(pq.read_table(out / "scores.parquet").to_pylist())
    assert values[0] == values[1]
    assert f"24 files of embeddings, as {maker} write them" in capsys.readouterr().err


def test_slides_of_one_name_are_told_apart_by_their_addresses(embedded: Path, tmp_path: Path) -> None:
    def read(*slides: str) -> list[np.ndarray]:
        tiles = tuple(Tile(uri=slide) for slide in slides)
        with scratch() as room:
            found = read_bags(str(embedded), Samples(source="d.csv", tiles=tiles, classes=("a",)), room)
            return [np.array(bag) for bag in found]

    one, other = bags(0)[0][3], bags(0)[0][4]
    renamed = pq.read_table(embedded / "s4-0123abcd.parquet").set_column(0, "slide", [["s3://c/other/s3.svs"] * TILES])
    pq.write_table(renamed, embedded / "s4-0123abcd.parquet")
    found = read("s3://c/other/s3.svs", "s3://b/slides/s3.svs")
    np.testing.assert_array_equal(found[0], other)
    np.testing.assert_array_equal(found[1], one)
    with pytest.raises(ConfigError, match=r"are both of s3\.svs, slides of one name; keep one of them, or give"):
        read("/mine/s3.svs")
    with pytest.raises(ConfigError, match=r"/a/s5\.svs and /b/s5\.tif are slides of one name, and .* is the one file"):
        read("/a/s5.svs", "/b/s5.tif")


def test_a_dot_within_a_slide_s_name_begins_no_suffix() -> None:
    assert keys("/a/TCGA-3C.F6E9A5DF-D8FB-45CF.svs")[1:] == [
        "TCGA-3C.F6E9A5DF-D8FB-45CF.svs",
        "TCGA-3C.F6E9A5DF-D8FB-45CF",
    ]
    assert keys("/a/TCGA-3C.F6E9A5DF-D8FB-45CF")[1:] == ["TCGA-3C.F6E9A5DF-D8FB-45CF"]
    assert keys("12.0")[1:] == ["12.0"]
