"""The pages: each command and snippet is run or checked, each file, field, option and link that they name exists."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from streaming import cluster
from streaming.slide import SLIDE_SUFFIXES
from streaming.synthetic.layout import SyntheticSlide, TissueClass, tissue_classes
from streaming.synthetic.svs import write_slide
from tests.dicom_files import write_series
from tests.idc_index import BUCKET, series, write_index
from tests.pages import PAGES, ROOT, Block, benchmarks, blocks, commands, script_name, scripts, troubles
from tests.trainer.publish.test_kaiko_eva import TASK
from trainer.cli import main
from trainer.configs import presets
from trainer.run.config import read_config
from trainer.run.dry_run import model_size

TEXTS = {page: (ROOT / page).read_text() for page in PAGES}

# What runs here; `tests/pages.py` only checks the others: bench takes minutes to hours and demo has a test of its own,
# lazyslide needs wsidata, which is not installed beside our libraries.
RUN = {
    "catalog",
    "stream",
    "tiles",
    "train",
    "embed",
    "export",
    "evaluate",
    "sweep",
    "picture",
    "capacity",
    "doctor",
    "replay",
}
# What the pages name → what stands for it here, below the scratch folder.
STAND_INS = {"/data/slides": "slides", "s3://bucket": "bucket"}
# Appended to the commands, so that seconds are enough; of an option that is given twice the last one counts.
_TINY = (
    *("--train.steps", "2", "--train.batch", "4", "--optim.warmup_steps", "1"),
    *("--model.head_hidden", "16", "--model.num_prototypes", "32", "--augment.num_local", "1"),
)
SMALLER = {
    "stream": ("--steps", "0:2", "--batch", "8"),
    "train": _TINY,
    "sweep": (*_TINY, *("--slides", "1", "--tiles-per-slide", "5", "--task", "knn", "--k", "3", "--debug")),
    "evaluate": ("--k", "3", "--probe-steps", "5", "--folds", "2", "--epochs", "1"),
    "doctor": ("--no-ray",),
}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_of_commands_options_fields_files_and_links_is_so(page: str) -> None:
    assert list(troubles(page, TEXTS[page])) == []


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("```sh\ntilestream stream catalog --step 0:2\n```", "--step"),
        ("```sh\ntilestream train debug --train.stepps 2\n```", "'train.stepps'; the nearest is 'train.steps'"),
        ("```sh\ntilestream train midnight\n```", "neither a file nor a preset"),
        ("```sh\ntilestream capacity vits14 --gpu 64\n```", "--gpu"),
        ("```sh\ntilestream catlog slides \\\n    --out x\n```", "catlog"),
        ("```sh\ntilestream bench raeder\n```", "raeder"),
        ("```sh\ntilestream bench reader --minutes 3\n```", "--minutes"),
        ("```sh\nmake demmo\n```", "demmo"),
        ("```sh\ntorchrun lop.py\n```", "begins with # lop.py"),
        ("```sh\nrm -rf runs\n```", "nothing runs or checks this program"),
        ("```sh\nray start --haed\n```", "--haed"),
        ("```sh\nray job submit -- tilestream doctor --no-rya\n```", "--no-rya"),
        ("```sh\ndocker build -f deploy/Dockerfile --target gpu --build-arg BASE=$BASE .\n```", "no target gpu"),
        ("```\ntilestream doctor\n```", "not marked as sh"),
        ("```bash\ntilestream doctor\n```", "'bash'"),
        ("```yaml\ndata: {filters: {blurr: 3}}\n```", "data.filters.blur"),
        ("- So:\n\n  ```sh\n  tilestream doctro\n  ```", "indented"),
        ("```\n streaming/plan.py\n```", "no such file"),
        ("Give `tilestream embed --tokns`.", "--tokns"),
        ("See `tilestream demonstrate it`.", "no tilestream demonstrate"),
        ("See `make tests`.", "tests"),
        ("With `--no-rays`.", "no command has such an option"),
        ("With `--data.reader_label.a b`.", "no such field"),
        ("Set `data.seed`.", "no such field"),
        ("Set `TILESTREAM_" + "CACHE`.", "such a variable"),  # a variable's name in any code is one that is known
        ("Read `streaming/reader.py`.", "no such file"),
        ("Read `streaming/formats/`.", "no such file"),
        ("Read [more](streaming/READ.md).", "no such file"),
        ("Read [more](streaming/README.md#format).", "no such heading"),
    ],
)
def test_what_is_not_so_is_found(wrong: str, told: str) -> None:
    (trouble,) = troubles("README.md", wrong)
    assert told in trouble


def test_the_first_page_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_lists_of_the_pages_are_the_codes() -> None:
    (suffixes,) = re.findall(
        r"`((?:\.[a-z]+ ?)+)`", TEXTS["streaming/README.md"].split("- **Folders**")[1].split(";")[0]
    )
    assert tuple(suffixes.split()) == SLIDE_SUFFIXES
    recipes = TEXTS["trainer/README.md"].split("## Recipes")[1].split("## ")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", recipes, re.MULTILINE)) == sorted(presets())
    rows = re.findall(r"^\| `tilestream bench (\w+)` \|", TEXTS["benchmarks/README.md"], re.MULTILINE)
    assert sorted(rows) == benchmarks()


@pytest.mark.slow
def test_presets_are_as_large_as_long_and_as_dear_as_the_first_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    section = TEXTS["README.md"].split("## Presets")[1].split("## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if "| `" in line]
    assert {row[0].strip("`") for row in rows} == set(presets())
    for cells in rows:
        name, model, *said = cells[0].strip("`"), cells[1], *cells[2:]
        config = read_config(name, [])
        vit, _, patch = model.removeprefix("ViT-").partition("/")
        kind = {"Ti": "tiny", "S": "small", "L": "large", "g": "giant"}[vit]
        assert config.model.backbone.startswith(f"vit_{kind}_patch{patch}"), name
        if not config.train.gpu:
            assert said[2:] == ["0", "minutes", ""]
            continue
        assert main(["capacity", name, "--prices", str(ROOT / "deploy/prices.yaml"), "--json"]) == 0
        run = json.loads(capsys.readouterr().out)["run"]
        found = [model_size(config).backbone / 1e6, run["tiles"] / 1e6, run["gpus"], run["hours"], run["cost"]]
        assert [float(number.replace(",", "")) for number in said] == pytest.approx(found, rel=0.03), name


def _of_language(language: str) -> list[Block]:
    return [block for page, text in TEXTS.items() for block in blocks(page, text) if block.language == language]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the pages take for granted: slides, tables of them, a task of eva."""
    cluster.connect(8)  # before: where another test started Ray, its workers have another folder too
    monkeypatch.chdir(tmp_path)
    made = [SyntheticSlide(width=3072, height=2304, patient=patient) for patient in range(4)]
    folder, more = tmp_path / STAND_INS["/data/slides"], tmp_path / STAND_INS["s3://bucket"] / "more-slides"
    folder.mkdir()
    more.mkdir(parents=True)
    tiles, labels, patients = ["path,label,x,y,mpp,size,patient"], ["slide,label"], ["slide,patient,site,organ"]
    for slide in made:
        path = folder / f"patient{slide.patient}.svs"
        write_slide(slide, path)
        patients.append(f"{path.stem},{slide.patient},here,lung")
        labels.append(f"{path},{slide.patient % 2}")
        for (row, column), kind in np.ndenumerate(tissue_classes(slide, 0, 0, slide.width, slide.height, 768)):
            name = "tumour" if kind == TissueClass.TUMOUR else "other"
            tiles.append(f"{path},{name},{768 * column},{768 * row},0.5,256,{slide.patient}")
    shutil.copy(folder / "patient0.svs", more / "again.svs")
    parts = ("split", "train", "train", "val", "test")
    split = [f"{row},{parts[0 if i == 0 else int(row[-1]) + 1]}" for i, row in enumerate(tiles)]
    tables = {"tiles.csv": tiles, "split.csv": split, "slides.csv": labels, "patients.csv": patients}
    for name, lines in tables.items():
        Path(name).write_text("\n".join(lines) + "\n")
    Path("bach.yaml").write_text(TASK)
    # What is installed by the extra `idc`, and the bucket that it tells of.
    rows = [series("tcga_brca", "TCGA-3C-AAAU", "a"), series("gtex", "GTEX-1", "b", license_short_name="CC BY 4.0")]
    rows.append(series("cptac_luad", "C3", "c", license_short_name="CC BY 4.0"))
    for row, slide in zip(rows, made, strict=False):
        write_series(tmp_path / "idc" / row["crdc_series_uuid"], folder / f"patient{slide.patient}.svs")
    installed = SimpleNamespace(IDC_INDEX_PARQUET_FILEPATH=f"{write_index(tmp_path / 'index', rows)}/idc_index.parquet")
    monkeypatch.setitem(sys.modules, "idc_index_data", installed)
    monkeypatch.setenv("TILESTREAM_MIRRORS", f"{BUCKET}={tmp_path / 'idc'}")
    Path("deploy").symlink_to(ROOT / "deploy")
    return tmp_path


def _arguments(words: Sequence[str], folder: Path) -> list[str]:
    """A command's arguments as they are run here."""
    name, *rest = words[1:]
    for said, meant in STAND_INS.items():
        rest = [word.replace(said, str(folder / meant)) for word in rest]
    asks_only = {"--fields", "--print_config"} & set(rest)
    smaller = ("--dry-run",) if "midnight-12k" in rest else SMALLER.get(name, ())
    if "eva" in rest:
        smaller = ("--probe-steps", "5")
    return [name, *rest, *(() if asks_only else smaller)]


def _run_ranks(words: Sequence[str]) -> None:
    """Runs a loop of ours by torchrun, on a Ray that its ranks start; it prints a line a step."""
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["1", "2", "3"]


@pytest.mark.slow
def test_the_commands_and_snippets_of_the_pages_run_in_their_order(
    scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in _of_language("sh"):
        for command in commands(block):
            if command.words[0] != "tilestream" or command.words[1] not in RUN:
                continue
            status = main(_arguments(command.words, scratch))
            said = capsys.readouterr()
            assert status == 0, f"{command}: {said.err}"
    for block in _of_language("python"):
        if not script_name(block):
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {})
    made = {path.relative_to(scratch).as_posix() for path in scratch.rglob("*")}
    assert made >= {"catalog/slides.parquet", "runs/first/metrics.parquet", "model/config.json", "map.html"}
    assert made >= {"scores/scores.json", "sweep/sweep.png", "features/patient0.h5", "model-eva/eva-bach.yaml"}


@pytest.mark.long
def test_the_loops_of_the_pages_run_on_two_ranks(scratch: Path) -> None:
    assert main(["catalog", str(scratch / "slides"), "--out", "catalog"]) == 0
    for name, text in scripts().items():
        Path(name).write_text(text)
    words = [command.words for block in _of_language("sh") for command in commands(block)]
    loops = [some for some in words if some[0] == "torchrun"]
    assert loops
    for some in loops:
        _run_ranks(some)
