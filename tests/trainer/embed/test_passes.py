"""Batches through a model: in parts, in threads, compiled and in bfloat16, against one plain call."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from streaming.errors import ConfigError
from streaming.reading.batch import Batch
from trainer.embed.model import Model, model_of
from trainer.embed.options import EmbedOptions
from trainer.embed.passes import Passes
from trainer.embed.stages import EmbedTiles
from trainer.evaluate.options import EvaluateOptions
from trainer.recipe.augment import Augmentation
from trainer.recipe.backbone import Backbone, Tokens, create_backbone


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    backbone = create_backbone("test_vit", img_size=32, patch_size=8, layer_scale=None)
    return replace(model_of("made", Augmentation(), backbone), token="cls+patch")


@pytest.fixture(scope="module")
def batches() -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (num, 32, 48, 3), dtype=np.uint8) for num in (7, 7, 4)]


@pytest.mark.parametrize("compiled", [False, True])
def test_batches_come_in_order_with_embeddings_and_patch_tokens_in_rows_and_columns(
    model: Model, batches: list[NDArray[np.uint8]], compiled: bool
) -> None:
    torch.compiler.set_default_backend("eager")
    try:
        passes = Passes(replace(model, backbone=_copy(model)), patches=True, compiled=compiled)
        found = list(passes.through(iter(batches)))
    finally:
        torch.compiler.set_default_backend(None)
    for tiles, made in zip(batches, found, strict=True):
        np.testing.assert_allclose(made.embeddings, model.embed(tiles), rtol=1e-5, atol=1e-5)
        assert made.patches is not None
        assert made.patches.shape == (len(tiles), 4, 6, model.backbone.embed_dim)
        mean = made.patches.astype(np.float32).mean(axis=(1, 2))
        np.testing.assert_allclose(mean, made.embeddings[:, model.backbone.embed_dim :], atol=5e-3)


def _copy(model: Model) -> Backbone:
    backbone = create_backbone("test_vit", img_size=32, patch_size=8, layer_scale=None)
    backbone.load_state_dict(model.backbone.state_dict())
    return backbone.eval()


class Narrow(Backbone):
    """A backbone whose memory holds so many images."""

    most = 3

    def forward(self, images: Tensor) -> Tokens:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        tokens = super().forward(images)
        assert isinstance(tokens, Tokens)
        return tokens


def test_what_memory_does_not_hold_goes_through_in_halves_and_one_tile_must_fit(
    model: Model, batches: list[NDArray[np.uint8]]
) -> None:
    narrow = Narrow(_copy(model).vit).eval()
    passes = Passes(replace(model, backbone=narrow), patches=False)
    for tiles, made in zip(batches, passes.through(batches), strict=True):
        np.testing.assert_allclose(made.embeddings, model.embed(tiles), rtol=1e-5, atol=1e-5)
    narrow.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        passes.begin(batches[0])


def test_a_gpu_gets_larger_batches_in_bfloat16_unless_told_otherwise() -> None:
    assert [(one.products, one.batch) for one in (EmbedOptions(), EmbedOptions(gpu=True))] == [
        ("32", 64),
        ("bf16", 256),
    ]
    told = EmbedOptions(gpu=True, precision="32", model_batch=8)
    assert (told.products, told.batch) == ("32", 8)
    options = [EvaluateOptions(gpu=gpu, protocol=protocol) for gpu in (False, True) for protocol in ("quick", "eva")]
    assert [one.products for one in options] == ["32", "32", "bf16", "32"], "eva's is 32"
    assert EvaluateOptions(gpu=True, protocol="eva", precision="bf16").products == "bf16"
    for kind in (EmbedOptions, EvaluateOptions):
        with pytest.raises(ConfigError, match="'16'; take one of 32, bf16"):
            kind(precision="16")  # pyright: ignore[reportArgumentType]


def test_several_threads_get_the_embeddings_of_their_own_tiles(
    model: Model, batches: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(model.backbone.vit.state_dict(), path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    embed = EmbedTiles(str(path), {}, "cls+patch", "32", tokens=True, gpu=False)

    def through(tiles: NDArray[np.uint8]) -> Batch:
        return embed({"tile": tiles, "reason": np.full(len(tiles), "", object)})

    alone = [through(tiles) for tiles in batches]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(through, [*batches, *batches]))
    for one, two in zip([*alone, *alone], together, strict=True):
        assert one.keys() == two.keys() == {"embedding", "tokens", "reason"}
        np.testing.assert_allclose(one["embedding"], two["embedding"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(one["tokens"], two["tokens"], atol=1e-3)


def test_a_model_that_broke_down_embeds_no_slide(
    model: Model, batches: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    weights = {name: torch.full_like(weight, torch.nan) for name, weight in model.backbone.vit.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    embed = EmbedTiles(str(tmp_path / "model.safetensors"), {}, "cls", "32", tokens=False, gpu=False)
    tiles = batches[0]
    reasons = np.full(len(tiles), "", object)
    reasons[0] = "unreadable"
    first, *others = embed({"tile": tiles, "reason": reasons})["reason"]
    assert first == "unreadable"
    assert {*others} == {
        "its embeddings are not finite: the model broke down; take an earlier checkpoint, or --precision 32"
    }
