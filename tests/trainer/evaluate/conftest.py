import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.run import checkpoints
from trainer.run.config import read_config
from trainer.run.fit import make_module

SMALL = [
    *("--augment.global_size", "32", "--augment.local_size", "16", "--data.tile_size", "32"),
    *("--model.num_prototypes", "32", "--model.head_hidden", "16", "--model.head_bottleneck", "8"),
]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run as training leaves it, with random weights."""
    out = str(tmp_path_factory.mktemp("run"))
    config = read_config("debug", [*SMALL, "--run.out", out])
    state = {"state_dict": make_module(config).state_dict(), "global_step": 3}
    checkpoints.write(checkpoints.checkpoint_uri(out, 3), state, config, "0123")
    return out


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as a CSV and tells where."""

    def write(rows: list[dict[str, object]], name: str = "dataset.csv") -> str:
        columns = list(rows[0])
        lines = [",".join(columns), *(",".join(str(row.get(column, "")) for column in columns) for row in rows)]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


@pytest.fixture
def geojson(tmp_path: Path) -> Callable[..., str]:
    """Writes features as QuPath does and tells where."""

    def write(features: list[dict[str, object]], name: str = "slide.geojson") -> str:
        path = tmp_path / name
        path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        return str(path)

    return write
