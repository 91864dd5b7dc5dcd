"""Starting from published weights and from checkpoints, at a size that no one publishes."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from streaming.errors import CheckpointError, StorageError
from trainer.recipe.backbone import Backbone, create_backbone
from trainer.run import checkpoints
from trainer.run.config import Config, read_config
from trainer.run.fit import check_model, make_module
from trainer.run.starting_weights import is_awaited, load_published, read_weights, resize_positions
from trainer.run.weight_layouts import timm_names


@cache
def _one_block(num_registers: int, img_size: int) -> Backbone:
    model = create_backbone("vit_tiny_patch16_224", img_size=img_size, num_registers=num_registers)
    model.vit.blocks = model.vit.blocks[:1]
    return model


def small(num_registers: int = 0, img_size: int = 32) -> Backbone:
    return copy.deepcopy(_one_block(num_registers, img_size))


def published(num_registers: int = 0, img_size: int = 64) -> dict[str, Tensor]:
    """Random weights as timm publishes them: no mask token."""
    model = small(num_registers, img_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return {key.removeprefix("vit."): w for key, w in model.state_dict().items() if key != "mask_token"}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_published_weights_of_a_file_are_all_in_the_backbone(suffix: str, tmp_path: Path) -> None:
    weights, path = published(img_size=32), str(tmp_path / f"dinov2.{suffix}")
    save_file(weights, path) if suffix == "safetensors" else torch.save({"model": weights}, path)
    model = small()
    load_published(model, read_weights(path), path)
    for key, weight in weights.items():
        assert torch.equal(model.vit.state_dict()[key], weight)
    assert not model.mask_token.any()


def test_positions_with_registers_are_resized_antialiased_and_without_them_by_the_reference_s_offset() -> None:
    for num_registers in (0, 4):
        weights, model = published(num_registers), small(num_registers)
        load_published(model, weights, "file")
        prefix = 0 if num_registers else 1
        grid = weights["pos_embed"][:, prefix:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        how = {"size": (2, 2), "antialias": True} if num_registers else {"scale_factor": (2.1 / 4, 2.1 / 4)}
        expected = F.interpolate(grid, mode="bicubic", **how).permute(0, 2, 3, 1).flatten(1, 2)
        assert model.vit.pos_embed is not None
        torch.testing.assert_close(model.vit.pos_embed[:, prefix:], expected)
        assert torch.equal(model.vit.pos_embed[:, :prefix], weights["pos_embed"][:, :prefix])


def test_positions_grow_for_larger_crops_and_a_smooth_field_stays_smooth() -> None:
    model = small(img_size=112)
    ramp = torch.linspace(0, 1, 4).repeat(4, 1).flatten()[None, :, None].expand(1, 16, 192)
    grown = resize_positions(torch.cat([torch.zeros(1, 1, 192), ramp], dim=1), model)
    assert grown.shape == (1, 50, 192)
    rows = grown[0, 1:, 0].view(7, 7)
    assert (rows[:, 1:] - rows[:, :-1]).min() > 0


def test_the_reference_s_own_names_give_what_timm_s_converter_gives() -> None:
    torch.manual_seed(0)
    theirs = {
        "cls_token": torch.randn(1, 1, 8),
        "pos_embed": torch.randn(1, 5, 8),
        "register_tokens": torch.randn(1, 4, 8),
        "mask_token": torch.randn(1, 8),
        "blocks.0.mlp.w12.weight": torch.randn(4, 8),
        "blocks.0.mlp.w3.bias": torch.randn(8),
        "norm.weight": torch.randn(8),
    }
    expected = timm.models.vision_transformer._convert_dinov2(dict(theirs), None)
    found = timm_names(theirs)
    assert torch.equal(found.pop("mask_token"), theirs["mask_token"][None])
    assert found.keys() == expected.keys()
    for key, weight in found.items():
        assert torch.equal(weight, expected[key])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("norm.bias"), r"1 missing \(vit.norm.bias\)"),
        (lambda w: w.update({"head.weight": torch.zeros(2, 2)}), r"1 left over \(vit.head.weight\)"),
        (lambda w: w.update({"cls_token": torch.zeros(1, 1, 384)}), r"1 of another shape \(vit.cls_token"),
        (lambda w: w.update({"reg_token": torch.zeros(1, 4, 192)}), r"left over \(vit.reg_token\)"),
    ],
)
def test_weights_that_do_not_fit_key_by_key_are_refused(change: object, named: str) -> None:
    weights = published(img_size=32)
    change(weights)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=f"dinov2.pth: .*{named}"):
        load_published(small(), weights, "dinov2.pth")


def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.safetensors", b"<html>404</html>"), ("b.pth", b"<html>404</html>")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name}: 16 bytes that are no weights"):
            read_weights(str(tmp_path / name))
    torch.save({"model": 3}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"c\.pth: .* holds no map of names to tensors"):
        read_weights(str(tmp_path / "c.pth"))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    sizes = ["--model.num_prototypes", "16", "--model.head_hidden", "8", "--model.head_bottleneck", "4"]
    return read_config("debug", [*sizes, "--run.out", str(tmp_path / "run")])


def test_a_checkpoint_of_ours_gives_student_teacher_and_heads_also_to_larger_crops(config: Config) -> None:
    first = make_module(config)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_()
    state = {"global_step": 3, "state_dict": first.state_dict()}
    checkpoints.write(checkpoints.checkpoint_uri(config.run.out, 3), state, config, "c0ffee")
    larger = replace(
        config,
        augment=replace(config.augment, global_size=112),
        model=replace(config.model, init=config.run.out),
    )
    found, expected = make_module(larger).state_dict(), first.state_dict()
    for key, weight in expected.items():
        if key.endswith("pos_embed"):
            assert found[key].shape == (1, 50, 192)
        else:
            assert torch.equal(found[key], weight), key
    assert not torch.equal(
        expected["student.dino_head.last_layer.weight"], expected["teacher.dino_head.last_layer.weight"]
    )


def test_a_checkpoint_with_prototypes_of_norm_one_starts_a_model_that_learns_their_norms(config: Config) -> None:
    first = make_module(replace(config, model=replace(config.model, norm_last_layer=True)))
    state = {"global_step": 3, "state_dict": first.state_dict()}
    checkpoints.write(checkpoints.checkpoint_uri(config.run.out, 3), state, config, "c0ffee")
    second = make_module(replace(config, model=replace(config.model, init=config.run.out)))
    tokens = torch.randn(5, 192)
    for before, after in ((first.student, second.student), (first.teacher, second.teacher)):
        assert torch.equal(before.dino_head(tokens), after.dino_head(tokens))
    assert {name for name, _ in second.student.dino_head.last_layer.named_parameters()} == {"weight", "scale"}


def test_whether_weights_to_start_from_fit_is_told_without_reading_them(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"global_step": 3, "state_dict": make_module(config).state_dict()}
    checkpoints.write(checkpoints.checkpoint_uri(config.run.out, 3), state, config, "c0ffee")
    save_file(published(), tmp_path / "a.safetensors")
    torch.save(published(), tmp_path / "a.pth")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    for reader in ("trainer.run.starting_weights.read_weights", "trainer.run.checkpoints.load"):
        monkeypatch.setattr(reader, None)

    def check(init: str, **model: object) -> None:
        check_model(replace(config, model=replace(config.model, init=init, **model)))

    check(config.run.out)
    check("vit_tiny_patch16_224.augreg_in21k", layer_scale=None)
    for init, named in (
        ("vit_tiny_patch16_224.augreg_in21k", "weights of another architecture: 24 missing"),
        (str(tmp_path / "a.safetensors"), r"a\.safetensors: weights of another architecture: .* missing"),
        (str(tmp_path / "a.pth"), r"a\.pth: weights of another architecture: .* missing"),
        (str(tmp_path / "cut.safetensors"), "its end is missing"),
    ):
        with pytest.raises(CheckpointError, match=named):
            check(init)
    with pytest.raises(CheckpointError, match="of another shape"):
        check(config.run.out, head_hidden=9)
    with pytest.raises(StorageError, match=r"none\.pth"):
        check(str(tmp_path / "none.pth"))
    assert is_awaited(str(tmp_path / "run-to-come"), None)
    assert not is_awaited(config.run.out, None)


def test_published_weights_start_student_and_teacher_alike(config: Config, tmp_path: Path) -> None:
    model = create_backbone("vit_tiny_patch16_224", img_size=64, layer_scale=0.1)
    nn.init.normal_(model.vit.norm.weight)
    weights = {key.removeprefix("vit."): w for key, w in model.state_dict().items() if key != "mask_token"}
    save_file(weights, tmp_path / "a.safetensors")
    init = replace(config, model=replace(config.model, init=str(tmp_path / "a.safetensors")))
    module = make_module(init)
    for network in (module.student, module.teacher):
        assert torch.equal(network.backbone.vit.norm.weight, model.vit.norm.weight)


def test_a_source_without_a_mask_token_is_told_when_it_is_checked(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = create_backbone("vit_tiny_patch16_224", img_size=64, layer_scale=0.1)
    timms = {key.removeprefix("vit."): w for key, w in model.state_dict().items()}
    for name, weights in (("with", timms), ("without", {k: w for k, w in timms.items() if k != "mask_token"})):
        save_file(weights, tmp_path / f"{name}.safetensors")
        check_model(replace(config, model=replace(config.model, init=str(tmp_path / f"{name}.safetensors"))))
    (told,) = caplog.messages
    assert told.endswith("without.safetensors: has no mask token; it begins at 0, as in any file of timm's")


def test_an_init_that_is_neither_file_nor_checkpoint_nor_hub_name_says_what_it_can_be(config: Config) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint here.*\.safetensors.*vit_small_patch14_dinov2\.lvd142m"):
        make_module(replace(config, model=replace(config.model, init="vit_small_dinov2")))
