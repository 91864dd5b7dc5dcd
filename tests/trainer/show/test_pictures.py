"""Files of embeddings read back, and the pictures of them."""

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import jsonschema
import numpy as np
import openslide
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from streaming.catalog.known import known_slides
from streaming.errors import ConfigError
from streaming.reading.batch import Batch
from streaming.synthetic.layout import SyntheticSlide, TissueClass, tissue_classes
from tests.trainer.publish.test_export import SMALL
from trainer.cli import main
from trainer.embed.feature_files import find_features, read_features, read_slides
from trainer.embed.files import SlideEmbeddings, find_embeddings, read_embeddings
from trainer.embed.job import Job
from trainer.embed.model import load_model, resolve
from trainer.embed.options import EmbedOptions, SlideOptions
from trainer.embed.stages import EmbedTiles, PlaceTiles, ReadTiles
from trainer.embed.table_slides import TableSlides
from trainer.run import checkpoints
from trainer.run.config import read_config
from trainer.run.fit import make_module
from trainer.show.class_scores import class_scores
from trainer.show.embedding_map import in_plane, map_page
from trainer.show.gallery import neighbours
from trainer.show.overlays import heatmap, laid_out, token_map, token_mosaic
from trainer.show.qupath import geojson

# What QuPath 0.4 and later reads of GeoJSON (qupath.lib.io: PathObjectTypeAdapters, MeasurementListTypeAdapter).
_POINT = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_RING = {"type": "array", "items": _POINT, "minItems": 4}
QUPATH = {
    "type": "object",
    "required": ["type", "features"],
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["type", "id", "geometry", "properties"],
                "properties": {
                    "type": {"const": "Feature"},
                    "id": {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
                    "geometry": {
                        "type": "object",
                        "required": ["type", "coordinates"],
                        "properties": {
                            "type": {"const": "Polygon"},
                            "coordinates": {
                                "type": "array",
                                "items": {"type": "array", "items": _POINT, "minItems": 4},
                            },
                        },
                    },
                    "properties": {
                        "type": "object",
                        "required": ["objectType"],
                        "properties": {
                            "objectType": {"enum": ["annotation", "detection", "tile", "cell"]},
                            "measurements": {"type": "object", "additionalProperties": {"type": "number"}},
                            "color": {
                                "type": "array",
                                "items": {"type": "integer", "minimum": 0, "maximum": 255},
                                "minItems": 3,
                                "maxItems": 3,
                            },
                        },
                    },
                },
            },
        },
    },
}


def embed_here(run: str, slides: list[Path], out: Path, options: EmbedOptions) -> list[SlideEmbeddings]:
    """The embedding job without Ray: its own stages, one after the other."""
    found = resolve(run)
    job, known = Job(found, load_model(found).digest, str(out), options, {}), known_slides(list(map(str, slides)))
    place, read = PlaceTiles(known, options.tiles), ReadTiles(known, options.tiles)
    model = EmbedTiles(found, {}, options.token, options.products, tokens=options.tokens, gpu=options.gpu)

    def pieces(rows: Batch) -> Iterator[Batch]:
        for start in range(0, len(rows["x"]), 64):
            yield model(read({name: column[start : start + 64] for name, column in rows.items()}))

    for number, slide in enumerate(known.slides):
        job.write(slide.info, pieces(place({"id": np.array([number])})))
    return [read_embeddings(uri) for uri in find_embeddings([str(out)])]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of initial weights, which tell colours and textures apart."""
    config = read_config("debug", [*SMALL, "--run.out", str(tmp_path_factory.mktemp("model"))])
    state = {"state_dict": make_module(config).state_dict(), "global_step": 1}
    checkpoints.write(checkpoints.checkpoint_uri(config.run.out, 1), state, config, "0123")
    return config.run.out


@pytest.fixture(scope="module")
def embedded(run: str, slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[SlideEmbeddings]:
    options = EmbedOptions(mpp=0.5, size=64, format="h5", tokens=True)
    return embed_here(run, slides[:2], tmp_path_factory.mktemp("embedded"), options)


def test_parquet_and_hdf5_read_back_alike(
    run: str, slides: list[Path], embedded: list[SlideEmbeddings], tmp_path: Path
) -> None:
    options = EmbedOptions(mpp=0.5, size=64, format="parquet", tokens=True)
    for ours, theirs in zip(embed_here(run, slides[:2], tmp_path, options), embedded, strict=True):
        assert ours.about == theirs.about
        assert np.array_equal(ours.corners, theirs.corners)
        assert np.array_equal(ours.features, theirs.features)
        assert ours.tokens is not None
        assert theirs.tokens is not None
        assert ours.tokens.shape == (len(ours.corners), 4, 4, 192)
        assert np.array_equal(ours.tokens, theirs.tokens)


@pytest.mark.parametrize("maker", ["TRIDENT", "CLAM"])
def test_embeddings_of_others_are_drawn_where_their_tiles_lie(
    embedded: list[SlideEmbeddings], slides: list[Path], tmp_path: Path, maker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = embedded[0]
    with h5py.File(tmp_path / f"{slides[0].stem}.h5", "w") as file:
        file["features"], file["coords"] = ours.features[None], ours.corners.astype(np.int32)
        if maker == "TRIDENT":
            file["coords"].attrs.update({"patch_size": 64, "patch_size_level0": 128})
    command = ["picture", "geojson", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert f"as {maker} writes them, which tells no slide's address; name a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--slides-in", str(slides[0].parent)]) == 0
    (written,) = (tmp_path / "out").iterdir()
    assert written.name == f"{slides[0].stem}.geojson"
    scored = [*command, "--slides-in", str(slides[0].parent), "--dataset", "tiles.csv", "--class", "a"]
    assert main(scored) == 2
    assert "of another program, which tells no model to score labelled tiles by" in capsys.readouterr().err
    rings = [np.array(one["geometry"]["coordinates"][0]) for one in json.loads(written.read_text())["features"]]
    assert [ring.min(axis=0).tolist() for ring in rings] == ours.corners.tolist()
    assert {tuple(np.ptp(ring, axis=0)) for ring in rings} == {(128, 128)}
    (found,) = read_slides([str(tmp_path)], TableSlides(SlideOptions(slides_in=(str(slides[0]),))))
    assert (found.about.mpp, found.about.size) == ((0.5, 64) if maker == "TRIDENT" else (0.25, 128))


def test_tiles_as_geojson_are_what_qupath_reads(embedded: list[SlideEmbeddings]) -> None:
    slide = embedded[0]
    score = np.linspace(0, 1, len(slide.corners))
    found = json.loads(geojson(slide, {"score": score}, np.stack([score] * 3, axis=1)))
    jsonschema.validate(found, QUPATH)
    for feature, (x, y), value in zip(found["features"], slide.corners.tolist(), score, strict=True):
        ring = np.array(feature["geometry"]["coordinates"][0])
        assert (ring[0] == ring[-1]).all()
        assert (ring.min(axis=0).tolist(), ring.max(axis=0).tolist()) == ([x, y], [x + 128, y + 128])
        assert feature["properties"]["measurements"]["score"] == pytest.approx(value)
    assert len({feature["id"] for feature in found["features"]}) == len(score)
    assert geojson(slide, {"score": score}) == geojson(slide, {"score": score})
    # QuPath shows what was scanned alone, and counts its pixels from there.
    cropped = replace(slide, about=replace(slide.about, origin=(64, 32)))
    for feature, moved in zip(found["features"], json.loads(geojson(cropped, {}))["features"], strict=True):
        by = np.array(feature["geometry"]["coordinates"]) - moved["geometry"]["coordinates"]
        assert (by == (64, 32)).all()


def test_a_heatmap_is_red_where_the_score_is_high_and_blue_where_it_is_low(embedded: list[SlideEmbeddings]) -> None:
    slide = embedded[0]
    score = (slide.corners[:, 0] > 1024).astype(np.float64)
    assert 0 < score.mean() < 1
    image = np.asarray(Image.open(io.BytesIO(heatmap(slide, score, "tumour"))).convert("RGB"), dtype=np.int32)
    tint = image[..., 0] - image[..., 2]
    image_of_slide = tint[:, : int(0.86 * tint.shape[1])]  # the scale is beside it
    columns = np.arange(image_of_slide.shape[1]) * np.ones((len(image_of_slide), 1))
    assert columns[image_of_slide > 60].min() > columns[image_of_slide < -60].max() - 3


def test_a_token_lies_where_it_is_on_the_slide(embedded: list[SlideEmbeddings]) -> None:
    slide = embedded[0]
    # A colour that is a token's own place on the slide, in tokens.
    at = np.stack(np.meshgrid(np.arange(4), np.arange(4), indexing="ij"), axis=-1)
    places = slide.corners[:, ::-1][:, None, None] / 32 + at
    mosaic = token_mosaic(laid_out(slide, np.concatenate([places, places[..., :1]], axis=-1)))
    rows, columns = np.nonzero(np.isfinite(mosaic[..., 0]))
    assert len(rows) == 16 * len(slide.corners)
    assert np.array_equal(mosaic[rows, columns, :2], np.stack([rows, columns], axis=1))
    pictures = [Image.open(io.BytesIO(content)) for content in token_map(embedded)]
    assert [picture.format for picture in pictures] == ["PNG", "PNG"]


def test_embeddings_that_are_not_finite_are_read_by_nothing(embedded: list[SlideEmbeddings], tmp_path: Path) -> None:
    uri = shutil.copy(embedded[0].uri, f"{tmp_path}/a.h5")
    with h5py.File(uri, "r+") as file:
        file["features"][1] = np.nan
    (found,) = find_features([uri])
    for read in (lambda: read_embeddings(uri), lambda: read_features(found)):
        with pytest.raises(ConfigError, match=rf"a.h5: 1 of {found.num} embeddings are not finite: the model broke"):
            read()


@pytest.mark.parametrize("across", [False, True])
def test_neighbours_are_the_most_similar_tiles(embedded: list[SlideEmbeddings], across: bool) -> None:
    vectors = np.concatenate([slide.features for slide in embedded]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    starts = [0, len(embedded[0].features)]
    for query, *near in neighbours(embedded, 4, 5, across=across):
        similar = vectors @ vectors[starts[query[0]] + query[1]]
        if across:
            similar[starts[query[0]] :][: len(embedded[query[0]].features)] = -2
        else:
            similar[starts[query[0]] + query[1]] = -2
        np.testing.assert_allclose([s for _, _, s in near], np.sort(similar)[::-1][:5], atol=1e-5)
        assert not across or all(slide != query[0] for slide, _, _ in near)


def test_the_map_shows_each_tile_and_needs_nothing_else(embedded: list[SlideEmbeddings]) -> None:
    odd = [replace(embedded[0], about=replace(embedded[0].about, name="</script><b>")), embedded[1]]
    page = map_page(odd, method="pca", most=50).decode()
    assert page.count("</script>") == 1
    assert not re.search(r"(src|href)=|https?://", page.replace("http://www.w3.org", ""))
    data = json.loads(re.search(r"const data = (\{.*?\});", page, re.DOTALL)[1])
    assert (len(data["x"]), data["names"]) == (50, ["</script><b>", "patient1"])
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["sprite"].split(",")[1]))), dtype=np.float64)
    for i in (0, 31, 32, 49):
        x, y = data["at"][i]
        with openslide.OpenSlide(odd[data["group"][i]].about.slide) as slide:
            tile = np.asarray(slide.read_region((x, y), 0, (128, 128)).convert("RGB").reduce(2), dtype=np.float64)
        shown = sheet[64 * (i // 32) :, 64 * (i % 32) :][:64, :64]
        assert np.abs(shown - tile).mean() < 12


@pytest.mark.parametrize("method", ["tsne", "pca"])
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_equal_embeddings_have_places_on_the_map(method: str, value: float) -> None:
    places = in_plane(np.full((40, 8), value, np.float32), method)
    assert places.shape == (40, 2)
    assert ((places >= 0) & (places <= 1)).all()


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_groups_that_lie_apart_lie_apart_on_the_map(method: str) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(60, 20)) + 20 * np.repeat(np.eye(20)[:2], 30, axis=0)
    places = in_plane(vectors, method)
    assert places.min() >= 0
    assert places.max() <= 1
    within = max(np.ptp(places[:30], axis=0).max(), np.ptp(places[30:], axis=0).max())
    assert np.linalg.norm(places[:30].mean(axis=0) - places[30:].mean(axis=0)) > 0.5 * within


def test_a_class_is_learned_from_labelled_tiles_and_found_on_a_slide(
    slides: list[Path], embedded: list[SlideEmbeddings], tmp_path: Path
) -> None:
    made = SyntheticSlide(width=2048, height=1536, patient=0, downsamples=(1, 4))
    cells = tissue_classes(made, 0, 0, made.width, made.height, 128)
    slide = embedded[0]
    truth = cells[slide.corners[:, 1] // 128, slide.corners[:, 0] // 128]
    names = [TissueClass(value).name.lower() for value in truth]
    wanted = max(set(names) - {"background"}, key=names.count)
    lines = [f"{slides[0]},{x},{y},0.5,64,{name}" for (x, y), name in zip(slide.corners[::2], names[::2], strict=True)]
    dataset = tmp_path / "tiles.csv"
    dataset.write_text("\n".join(["path,x,y,mpp,size,label", *lines]) + "\n")
    (scores,) = class_scores([slide], str(dataset), wanted, TableSlides())
    unseen = np.arange(len(scores)) % 2 == 1
    assert roc_auc_score(np.array(names)[unseen] == wanted, scores[unseen]) > 0.8


def test_what_can_not_be_drawn_is_told_in_one_line(
    embedded: list[SlideEmbeddings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = embedded[0].uri
    (tmp_path / "other.parquet").write_bytes(b"PAR1")
    for arguments, line in (
        (["tokens", str(tmp_path / "nowhere")], "nowhere"),
        (["heatmap", file], "--dataset LABELLED-TILES --class NAME"),
        (["neighbours", file, "--k", "10000"], "too few for 10000 neighbours"),
        (["map", str(tmp_path / "other.parquet")], "other.parquet"),
        (["map", file, "--seed=-1"], "seed -1; it must be from 0"),
    ):
        assert main(["picture", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
