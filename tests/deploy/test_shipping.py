"""What `ray job submit --working-dir .` would send to every machine, by Ray's own packer."""

import shutil
import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import _zip_files  # what the job server's client calls

ROOT = Path(__file__).parents[2]
# What the commands of the first page leave in a clone, and what lies beside them.
DATA = (
    *("patients.csv", ".env", ".env.local", "slides/a.svs", "slides/b.dcm", "slides/c.czi", "slides/d.mrxs"),
    *("catalog/slides.parquet", "catalog/blocks/0.bin", "embeddings/a.h5", "scores/scores.json", "stores/a.zarr/0"),
    *("runs/first/config.yaml", "model/model.safetensors", "model/config.json", "features/a.h5", "weights.pth"),
)


def test_code_goes_and_what_the_first_page_makes_stays(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for name in (".rayignore", ".gitignore", "pyproject.toml"):
        clone.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, clone)
    for name in (*DATA, "streaming/cli.py", "trainer/configs/debug.yaml", "mine.yaml"):
        path = clone / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    _zip_files(str(clone), [], str(tmp_path / "shipped.zip"), include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "shipped.zip") as file:
        shipped = {name for name in file.namelist() if not name.endswith("/")}
    assert not shipped & set(DATA)
    assert shipped >= {"streaming/cli.py", "trainer/configs/debug.yaml", "mine.yaml"}
