"""An exported model loads where this project is not, and gives the same tokens."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from streaming.errors import CheckpointError, ConfigError
from trainer.embed.model import load_backbone, load_model
from trainer.publish.export import export
from trainer.publish.options import ExportOptions
from trainer.run import checkpoints
from trainer.run.config import Config, read_config
from trainer.run.fit import make_module
from trainer.run.slide_sources import SlideSource

SMALL = [
    *("--augment.global_size", "64", "--augment.local_size", "32", "--data.tile_size", "64"),
    *("--model.num_prototypes", "32", "--model.head_hidden", "16", "--model.head_bottleneck", "8"),
]


SOURCES = [
    SlideSource(
        collection="tcga_brca",
        license="CC BY 3.0",
        doi="10.5281/zenodo.12689962",
        slides=1060,
        patients=1000,
        share=0.75,
    ),
    SlideSource(collection=None, license=None, doi=None, slides=12, patients=3, share=0.25),
]


def saved(out: Path, *overrides: str) -> str:
    """A checkpoint as training writes it, its weights moved off their initial values."""
    config: Config = read_config("debug", [*SMALL, *overrides, "--run.out", str(out)])
    module = make_module(config)
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    uri = checkpoints.checkpoint_uri(str(out), 3)
    checkpoints.write(uri, {"state_dict": module.state_dict(), "global_step": 3}, config, "0123", SOURCES)
    return str(out)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("registers", ["0", "4"])
def test_timm_builds_the_exported_network_and_gives_the_same_tokens(
    tmp_path: Path, images: torch.Tensor, registers: str
) -> None:
    run, out = saved(tmp_path / "run", "--model.num_registers", registers), tmp_path / "export"
    export(run, str(out))
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    _, backbone = load_backbone(run)
    with torch.no_grad():
        tokens, ours = model.forward_features(images), backbone(images)
    torch.testing.assert_close(tokens[:, 0], ours.cls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[:, model.num_prefix_tokens :], ours.patches, rtol=1e-5, atol=1e-5)
    settings = json.loads((out / "config.json").read_text())
    by_name = timm.create_model(
        settings["architecture"], checkpoint_path=str(out / "model.safetensors"), **settings["model_args"]
    )
    for key, weight in by_name.state_dict().items():
        assert torch.equal(weight, model.state_dict()[key]), key
    data = timm.data.resolve_model_data_config(model)
    assert (list(data["mean"]), list(data["std"]), data["input_size"]) == ([0.5] * 3, [0.5] * 3, (3, 64, 64))


@pytest.mark.parametrize("registers", ["0", "4"])
def test_transformers_loads_every_weight_and_gives_the_same_tokens(
    tmp_path: Path, images: torch.Tensor, registers: str
) -> None:
    transformers = pytest.importorskip("transformers")
    run, out = saved(tmp_path / "run", "--model.num_registers", registers), tmp_path / "export"
    export(run, str(out), ExportOptions(layout="transformers"))
    model, info = transformers.AutoModel.from_pretrained(str(out), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _, backbone = load_backbone(run)
    with torch.no_grad():
        tokens, ours = model.eval()(images).last_hidden_state, backbone(images)
    torch.testing.assert_close(tokens[:, 0], ours.cls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[:, 1 + int(registers) :], ours.patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("registers", ["0", "4"])
@pytest.mark.parametrize("layout", ["timm", "transformers"])
@pytest.mark.parametrize("patch", ["16", "14"])
def test_the_card_s_own_lines_give_what_embed_gives_on_a_png_of_a_tile(
    tmp_path: Path, layout: Literal["timm", "transformers"], patch: str, registers: str
) -> None:
    if layout == "transformers":
        pytest.importorskip("transformers")
    # Crops of other sizes than tiles: positions are resampled; 96 px are no multiple of 14.
    sizes = ("--data.tile_size", "96", "--augment.global_size", str(4 * int(patch)), "--augment.local_size", patch)
    options = ("--model.patch_size", patch, "--model.num_registers", registers)
    run, out = saved(tmp_path / "run", *sizes, *options), tmp_path / "export"
    export(run, str(out), ExportOptions(layout=layout, token="cls+patch"))
    tile = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(tile).save(tmp_path / "tile.png")
    (lines,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    names = {"image": Image.open(tmp_path / "tile.png")}
    with torch.no_grad():
        exec(lines.replace("PATH-OF-THIS-FOLDER", str(out)), names)
    theirs = cast(torch.Tensor, names["embedding"]).numpy()
    for source in (run, str(out)):
        ours = load_model(source, "cls+patch").embed(tile[None])
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)


def test_an_export_tells_its_own_licence_and_size_and_nothing_of_timm_s_weights_of_that_name(tmp_path: Path) -> None:
    out = tmp_path / "export"
    options = ("--model.backbone", "vit_small_patch14_dinov2", "--data.tile_size", "64", "--augment.global_size", "28")
    export(
        saved(tmp_path / "run", *options, "--augment.local_size", "14"), str(out), ExportOptions(license="cc-by-4.0")
    )
    settings = json.loads((out / "config.json").read_text())
    assert settings["pretrained_cfg"]["license"] == "cc-by-4.0"
    assert "lvd142m" not in json.dumps(settings)
    assert "tag" not in settings["pretrained_cfg"]
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"]) == ((3, 56, 56), 1.0)


def test_an_export_embeds_as_its_checkpoint(tmp_path: Path) -> None:
    run, out = saved(tmp_path / "run"), tmp_path / "export"
    export(run, str(out), ExportOptions(token="cls+patch"))
    tiles = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    ours = load_model(checkpoints.find(run), "cls+patch").embed(tiles)
    np.testing.assert_allclose(load_model(str(out), "cls+patch").embed(tiles), ours, rtol=1e-5, atol=1e-5)
    larger = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    ours_larger, theirs_larger = (load_model(source, "cls").embed(larger) for source in (run, str(out)))
    np.testing.assert_allclose(theirs_larger, ours_larger, rtol=1e-5, atol=1e-5)
    half = replace(load_model(run, "cls+patch"), precision="bf16").embed(tiles)
    assert 1e-4 < np.abs(half - ours).max() / np.abs(ours).max() < 0.05
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        tokens = model.forward_features((torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5)
    theirs = torch.cat((tokens[:, 0], tokens[:, model.num_prefix_tokens :].mean(dim=1)), dim=1)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)
    about = json.loads((out / "config.json").read_text())["tilestream"]
    assert (about["embedding"], about["embedding_dim"], about["steps"]) == ("cls+patch", ours.shape[1], 3)


def test_the_card_is_filled_in_and_the_weights_are_no_pickle(tmp_path: Path) -> None:
    run, out = saved(tmp_path / "run"), tmp_path / "export"
    export(run, str(out), ExportOptions(license="cc-by-4.0", name="tiny"))
    card = (out / "README.md").read_text()
    doi = "10.5281/zenodo.12689962"
    for text in (
        *("license: cc-by-4.0", "# tiny", "0.25, 0.5, 1, 2 µm/px", "3 steps of 32 tiles: 96 tiles", "1,072 slides"),
        f"| tcga_brca | 1,060 | 1,000 | 75.0% | CC BY 3.0 | [{doi}](https://doi.org/{doi}) |",
        "| not told | 12 | 3 | 25.0% | not told | not told |",
    ):
        assert text in card, text
    assert load_file(out / "model.safetensors")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("registers", "interpolation", "said"),
    [
        ("0", "reference", "in training by DINOv2's rule, not antialiased, by timm antialiased."),
        ("0", "timm", "in training antialiased, by timm antialiased."),
        ("4", "reference", None),
    ],
)
def test_the_card_says_how_positions_are_resampled_where_that_differs(
    tmp_path: Path, registers: str, interpolation: str, said: str | None
) -> None:
    options = ("--model.num_registers", registers, "--model.interpolation", interpolation)
    export(saved(tmp_path / "run", *options), str(tmp_path / "export"))
    card = (tmp_path / "export/README.md").read_text()
    assert said in card if said else "positions" not in card


def test_a_folder_of_something_else_and_a_missing_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        export(str(tmp_path / "nothing"), str(tmp_path / "export"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files"):
        export(str(tmp_path / "nothing"), str(tmp_path / "thesis"))
    with pytest.raises(ConfigError, match="layout 'onnx'"):
        replace(ExportOptions(), layout="onnx")


def test_an_export_in_the_place_of_one_in_another_layout_is_whole(tmp_path: Path) -> None:
    run, out = saved(tmp_path / "run"), str(tmp_path / "export")
    export(run, out, ExportOptions(layout="transformers"))
    written = export(run, out)
    assert sorted(written) == sorted(str(path) for path in (tmp_path / "export").iterdir())
