"""Every value of every option that has a list of values, of the commands that train nothing: each one works.

The lists are the parsers' own, so that a new value, option or command is tried by itself. A training's are walked
through in `tests/trainer/run/test_offered_options.py`.
"""

import json
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from streaming.command_line import read_options
from streaming.synthetic.layout import SyntheticSlide
from streaming.synthetic.svs import write_slide
from tests.conftest import write_catalog
from tests.qupath import feature, rectangle
from tests.trainer.publish.test_export import saved
from tests.trainer.show.test_pictures import embed_here
from trainer.cli import build_parser, main
from trainer.embed.options import EmbedOptions

# Its options are those of `evaluate`, which it hands on.
AS_EVALUATE = "sweep"


def commands() -> dict[str, ArgumentParser]:
    (found,) = (action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    return found


def choices() -> Iterator[tuple[str, str, str]]:
    """Command, option and value."""
    for command, parser in commands().items():
        for action in parser._actions:
            option = action.option_strings[-1] if action.option_strings else ""
            yield from ((command, option, str(value)) for value in action.choices or ())


class Room:
    """A model, slides, their embeddings, and tables of all kinds that are scored."""

    def __init__(self, folder: Path, coloured: Path) -> None:
        self.run, self.slides, self.embeddings = saved(folder / "run"), list[Path](), folder / "embeddings"
        rows, labels = ["slide,mpp"], ["slide,label,patient"]
        for patient in range(4):
            path = folder / f"s{patient}.svs"
            write_slide(SyntheticSlide(width=1024, height=1024, patient=patient, downsamples=(1, 4)), path)
            self.slides.append(path)
            rows.append(f"{path},0.3")
            labels.append(f"{path},{'ab'[patient % 2]},{patient}")
        self.catalog = write_catalog(folder / "catalog", self.slides)
        self.given = self._table(folder / "given.csv", rows)
        embed_here(self.run, self.slides, self.embeddings, EmbedOptions(mpp=0.5, size=64, format="h5", tokens=True))
        images = sorted(coloured.rglob("*.png"))
        parts = {"p0": "train", "p1": "train", "p2": "val", "p3": "test"}
        head = "path,label,patient,split"
        tiles = [f"{path},{path.parts[-3]},{path.parts[-2]},{parts[path.parts[-2]]}" for path in images]
        mask = folder / "mask.png"
        Image.fromarray((np.indices((32, 32))[1] // 16).astype(np.uint8)).save(mask)
        masks = [f"{path},{mask},{path.parts[-2]}" for path in images[::4]]
        points = [
            {"type": "Point", "coordinates": [200.0 + 300 * i, 300.0 + 100 * j]} for i in range(2) for j in range(4)
        ]
        shapes = [feature(rectangle(0, 0, 1024, 1024), "Region*"), *(feature(point, "cell") for point in points)]
        (folder / "cells.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": shapes}))
        annotated = [f"{slide},{folder / 'cells.geojson'}" for slide in self.slides]
        squares = [
            f"{self.slides[0]},{x},{y},0.5,64,{side}" for x, side in ((300, "left"), (700, "right")) for y in (200, 600)
        ]
        self.squares = self._table(folder / "squares.csv", ["path,x,y,mpp,size,label", *squares])
        self.tiles = self._table(folder / "tiles.csv", [head, *tiles])
        # What a task wants; the others take labelled tiles.
        self.tables = {
            "slide": self._table(folder / "slides.csv", labels),
            "segmentation": self._table(folder / "masks.csv", ["path,mask,patient", *masks]),
            "detection": self._table(folder / "cells.csv", ["slide,annotation", *annotated]),
        }

    @staticmethod
    def _table(path: Path, lines: list[str]) -> str:
        path.write_text("\n".join(lines) + "\n")
        return str(path)


@pytest.fixture(scope="module")
def room(coloured: Path, tmp_path_factory: pytest.TempPathFactory) -> Room:
    return Room(tmp_path_factory.mktemp("room"), coloured)


def catalogued(room: Room, option: str, value: str, out: Path) -> None:
    assert main(["catalog", *map(str, room.slides), "--metadata", room.given, "--out", str(out), option, value]) == 0
    assert pq.read_table(out / "slides.parquet").num_rows == len(room.slides)


def streamed(room: Room, option: str, value: str, out: Path) -> None:
    asked = ["--steps", "0:1", "--batch", "2", "--size", "64", "--mpp", "0.5", "--readers", "1:1"]
    assert main(["stream", room.catalog, *asked, "--mosaic", str(out.with_suffix(".png")), option, value]) == 0
    assert np.asarray(Image.open(out.with_suffix(".png"))).std() > 1


def listed(room: Room, option: str, value: str, out: Path) -> None:
    asked = ["--draws", "9", "--size", "64", "--mpp", "0.5"]
    assert main(["tiles", room.catalog, "--out", f"{out}.parquet", *asked, option, value]) == 0
    assert pq.read_table(f"{out}.parquet").num_rows == 9


def embedded(room: Room, option: str, value: str, out: Path) -> None:
    asked = ["--size", "64", "--model-batch", "16"]
    args = build_parser().parse_args(["embed", room.run, str(room.slides[0]), "--out", str(out), *asked, option, value])
    (found,) = embed_here(room.run, room.slides[:1], out, read_options(args, EmbedOptions))
    assert len(found.features) > 10
    assert np.isfinite(found.features).all()
    assert found.features.std(axis=0).max() > 0


def scored(room: Room, option: str, value: str, out: Path) -> None:
    model = str(room.embeddings) if value == "slide" else room.run
    quick = ["--k", "3", "--probe-steps", "5", "--mpp", "0.5", "--size", "64"]
    short = [] if value == "eva" else ["--epochs", "1", "--folds", "2"]
    table = room.tables.get(value, room.tiles)
    assert main(["evaluate", model, table, *quick, *short, "--out", str(out), option, value]) == 0
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert scores
    assert all(np.isfinite(score["value"]) for score in scores)


def drawn(room: Room, option: str, value: str, out: Path) -> None:
    kind = ["map", option, value] if option else [value]
    labelled = ["--dataset", room.squares, "--class", "left"] if value == "heatmap" else []
    assert main(["picture", *kind, str(room.embeddings), "--out", str(out), *labelled]) == 0
    files = [out] if out.is_file() else list(out.iterdir())
    assert files
    assert all(file.stat().st_size > 1000 for file in files)


def exported(room: Room, option: str, value: str, out: Path) -> None:
    assert main(["export", room.run, "--out", str(out), option, value]) == 0
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in out.iterdir()}


WALKS: dict[str, Callable[[Room, str, str, Path], None]] = {
    "catalog": catalogued,
    "stream": streamed,
    "tiles": listed,
    "embed": embedded,
    "evaluate": scored,
    "picture": drawn,
    "export": exported,
}


def test_a_sweep_offers_what_an_evaluation_offers() -> None:
    of = {command: {(option, value) for name, option, value in choices() if name == command} for command in commands()}
    assert of[AS_EVALUATE] == of["evaluate"]
    assert {command for command, offered in of.items() if offered} == {*WALKS, AS_EVALUATE}


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        pytest.param(*choice, marks=[pytest.mark.slow] if choice[0] == "stream" else [])
        for choice in choices()
        if choice[0] != AS_EVALUATE
    ],
)
def test_each_value_works(
    command: str, option: str, value: str, room: Room, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if command == "catalog":
        request.getfixturevalue("in_this_process")
    WALKS[command](room, option, value, tmp_path / "out")
