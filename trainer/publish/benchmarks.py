"""Files by which other people's benchmarks run an export: TRIDENT, Patho-Bench, THUNDER.

Each is one Python file beside the model, which reads the folder that it lies in: `exported_network.py` with a class of
the benchmark's own interface behind it.
"""

from __future__ import annotations

from importlib import resources

TRIDENT_FILE = "trident_encoder.py"
PATHO_BENCH_FILE = "patho_bench_encoder.py"
THUNDER_FILE = "thunder_model.py"

# TRIDENT 0.3.0, trident/patch_encoder_models/load.py: an encoder builds (model, transforms, precision), and the
# command line takes the names of `encoder_registry`.
_TRIDENT = '''

from trident.patch_encoder_models.load import BasePatchEncoder, encoder_registry

NAME = {name!r}


class Encoder(BasePatchEncoder):
    """The patch encoder that `--patch_encoder {name}` takes."""

    def _build(self):
        self.enc_name = NAME
        network = ExportedNetwork(Path(__file__).parent).eval()
        return network, network.transform, torch.float32


encoder_registry[NAME] = Encoder

if __name__ == "__main__":
    # python {file} --task all --wsi_dir slides --job_dir features --patch_encoder {name} --mag 20 --patch_size 256
    from run_batch_of_slides import main

    main()
'''

# Patho-Bench 0.0.1 reads features that TRIDENT or `tilestream embed --format h5` wrote, and pools them by a slide
# encoder of TRIDENT's, whose mean knows only the widths of encoders that are listed there.
_PATHO_BENCH = '''

from trident.slide_encoder_models.load import BaseSlideEncoder, encoder_registry

WIDTH = {width}
NAME = "mean-{name}"


class MeanEncoder(BaseSlideEncoder):
    """The mean embedding of a slide, for Patho-Bench's `model_name = NAME`."""

    def _build(self, model_name=NAME):
        self.enc_name = model_name
        return None, torch.float32, WIDTH

    def forward(self, batch, device="cuda"):
        return batch["features"].to(device).mean(dim=1)


encoder_registry[NAME] = MeanEncoder
'''

# THUNDER 0.2.2, docs/custom_model.md: `thunder benchmark custom:{file} DATASET TASK`.
_THUNDER = '''

from thunder.models import PretrainedModel


class Model(PretrainedModel):
    """What `thunder benchmark custom:{file} DATASET TASK` runs."""

    def __init__(self):
        super().__init__()
        self.network = ExportedNetwork(Path(__file__).parent).eval()
        self.name = {name!r}
        self.emb_dim, self.emb_dim_seg = self.network.width, self.network.patch_width

    def get_transform(self):
        return self.network.transform

    def get_linear_probing_embeddings(self, x):
        return self.network(x)

    def get_segmentation_embeddings(self, x):
        return self.network.patches(x)
'''

FILES = (TRIDENT_FILE, PATHO_BENCH_FILE, THUNDER_FILE)
_BEHIND = {TRIDENT_FILE: _TRIDENT, PATHO_BENCH_FILE: _PATHO_BENCH, THUNDER_FILE: _THUNDER}


def benchmark_file(file: str, name: str, width: int) -> str:
    """The text of one of the files, for a model of that name and width of embeddings."""
    network = resources.files("trainer.publish").joinpath("exported_network.py").read_text(encoding="utf-8")
    return network + _BEHIND[file].format(name=name, width=width, file=file)
