"""The demo's road in small, as its own process."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from streaming.errors import ConfigError
from trainer.demo import run_demo

CALL = "from trainer.demo import run_demo; run_demo({!r}, steps=4, slide_px=(3072, 2304), num_slides=2)"


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.headings: list[str] = []
        self._in_heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_heading = tag == "h2"
        if tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self.headings.append(data)
        self._in_heading = False


@pytest.mark.slow
def test_the_demo_leaves_slides_catalog_checkpoint_embeddings_and_a_self_contained_report(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with (tmp_path / "printed").open("w") as printed:
        subprocess.run([sys.executable, "-c", CALL.format(str(out))], check=True, stdout=printed)
    assert len(list((out / "slides").glob("*.svs"))) == 2
    assert pq.read_table(out / "catalog/slides.parquet").num_rows == 2
    assert pq.read_table(out / "run/metrics.parquet")["step"].to_pylist() == [1, 2, 3, 4]
    assert (out / "run/checkpoints/step-00000004/state.ckpt").exists()
    (embeddings,) = (out / "embeddings").glob("*.parquet")
    assert pq.read_table(embeddings).num_rows > 0
    report = (out / "report.html").read_text()
    page = Page()
    page.feed(report)
    assert page.headings == [
        *("Slides and their tissue", "Streamed tiles", "Crops as the model sees them", "Training", "Failures"),
        *("Embeddings", "Licences", "Your own slides"),
    ]
    assert page.pictures
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in page.pictures)
    shown = (tmp_path / "printed").read_text()
    assert str(out / "report.html") in shown
    assert "tilestream train debug" in shown


def test_the_demo_leaves_a_folder_alone_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        run_demo(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
