"""Files for TRIDENT, Patho-Bench and THUNDER: run against their interfaces, and in their own environments where given.

`TILESTREAM_TRIDENT_PYTHON`, `…_PATHO_BENCH_PYTHON` and `…_THUNDER_PYTHON` name a Python that has the benchmark;
`…_PYTHONPATH` a folder with its sources where they are not installed.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from streaming.errors import ConfigError
from tests.trainer.publish.test_export import saved
from trainer.embed.model import load_model
from trainer.publish.export import export
from trainer.publish.options import ExportOptions

# What of each interface an export relies on, as TRIDENT 0.3.0 and THUNDER 0.2.2 have it.
TRIDENT_PATCH = """
import torch
encoder_registry = {}
class BasePatchEncoder(torch.nn.Module):
    def __init__(self, weights_path=None, **build_kwargs):
        super().__init__()
        self.enc_name, self.weights_path = None, weights_path
        self.model, self.eval_transforms, self.precision = self._build(**build_kwargs)
    def forward(self, x):
        return self.model(x)
"""
TRIDENT_SLIDE = """
import torch
encoder_registry = {}
class BaseSlideEncoder(torch.nn.Module):
    def __init__(self, freeze=True, **build_kwargs):
        super().__init__()
        self.enc_name = None
        self.model, self.precision, self.embedding_dim = self._build(**build_kwargs)
"""
THUNDER = """
from abc import ABC
import torch
class PretrainedModel(torch.nn.Module, ABC):
    pass
"""

OF_TRIDENT = """
import numpy, torch
from PIL import Image
import trident_encoder
from trident.patch_encoder_models import load
encoder = load.encoder_registry["mine"]()
assert encoder.precision == torch.float32 and encoder.enc_name == "mine"
numpy.save("found.npy", encoder(encoder.eval_transforms(Image.open("tile.png"))[None]).detach().numpy())
"""
OF_PATHO_BENCH = """
import numpy, torch
import patho_bench_encoder
from trident.slide_encoder_models import load
encoder = load.encoder_registry[patho_bench_encoder.NAME](model_name=patho_bench_encoder.NAME)
assert encoder.embedding_dim == 384 and encoder.precision == torch.float32
features = torch.arange(4 * 384.0).view(1, 4, 384)
numpy.save("found.npy", encoder.forward({"features": features}, "cpu").numpy())
"""
OF_THUNDER = """
import inspect, numpy, thunder_model
from PIL import Image
from thunder.models import PretrainedModel
(kind,) = [v for v in vars(thunder_model).values() if inspect.isclass(v) and issubclass(v, PretrainedModel)
           and v is not PretrainedModel]
model = kind()
image = model.get_transform()(Image.open("tile.png"))[None]
assert (model.name, model.emb_dim, model.emb_dim_seg) == ("mine", 384, 192)
assert model.get_segmentation_embeddings(image).shape == (1, 16, 192)
numpy.save("found.npy", model.get_linear_probing_embeddings(image).detach().numpy())
"""
PROGRAMS = {"trident": OF_TRIDENT, "patho_bench": OF_PATHO_BENCH, "thunder": OF_THUNDER}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all three files, and a tile."""
    folder = tmp_path_factory.mktemp("exported")
    options = ExportOptions(token="cls+patch", name="mine", trident=True, patho_bench=True, thunder=True)
    export(saved(folder / "run", "--model.num_registers", "4"), str(folder / "model"), options)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "tile.png")
    return folder


def check(exported: Path, benchmark: str) -> None:
    """Compares what a benchmark's program left with our own embedding."""
    found = np.load(exported / "found.npy")
    if benchmark == "patho_bench":
        wanted = np.arange(4 * 384.0).reshape(4, 384).mean(axis=0)[None]
    else:
        wanted = load_model(str(exported / "model")).embed(np.asarray(Image.open(exported / "tile.png"))[None])
    np.testing.assert_allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("benchmark", list(PROGRAMS))
def test_the_file_for_a_benchmark_gives_the_exports_embeddings(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benchmark: str
) -> None:
    for place, text in {
        "trident/patch_encoder_models/load.py": TRIDENT_PATCH,
        "trident/slide_encoder_models/load.py": TRIDENT_SLIDE,
        "thunder/models.py": THUNDER,
    }.items():
        file = tmp_path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in [name for name in sys.modules if name.split(".")[0] in ("trident", "thunder")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(exported / "model"))
    monkeypatch.chdir(exported)
    exec(compile(PROGRAMS[benchmark], benchmark, "exec"), {})
    check(exported, benchmark)


@pytest.mark.long
@pytest.mark.parametrize("benchmark", list(PROGRAMS))
def test_the_benchmark_itself_runs_its_file(exported: Path, benchmark: str) -> None:
    variable = f"TILESTREAM_{benchmark.upper()}_PYTHON"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no Python that has {benchmark}")
    path = os.pathsep.join([str(exported / "model"), os.environ.get(f"{variable}PATH", "")])
    command = [os.environ[variable], "-c", PROGRAMS[benchmark]]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=exported, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    check(exported, benchmark)


def test_a_name_or_layout_that_a_benchmark_can_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"name 'a b': other programs take letters"):
        ExportOptions(name="a b", thunder=True)
    with pytest.raises(ConfigError, match="--patho-bench wants timm's layout"):
        ExportOptions(layout="transformers", patho_bench=True)


def test_the_class_token_alone_is_what_an_export_of_it_gives(tmp_path: Path) -> None:
    options = ExportOptions(token="cls", name="mine", thunder=True)
    export(saved(tmp_path / "run"), str(tmp_path / "model"), options)
    from trainer.publish.exported_network import ExportedNetwork

    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network = ExportedNetwork(tmp_path / "model").eval()
    tokens = load_model(str(tmp_path / "model")).backbone(images)
    torch.testing.assert_close(network(images), tokens.cls, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(network.patches(images), tokens.patches, atol=1e-4, rtol=1e-4)
