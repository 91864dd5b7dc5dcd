import copy
from functools import cache

import pytest
import timm
import torch
from torch import Tensor

from trainer.recipe.backbone import Backbone, Tokens, create_backbone
from trainer.recipe.network import ModelConfig
from trainer.recipe.stochastic_depth import kept_crops

NAME = "vit_tiny_patch16_224"


@cache
def whole(num_registers: int | None, layer_scale: float) -> Backbone:
    torch.manual_seed(0)
    model = create_backbone(NAME, img_size=64, num_registers=num_registers, layer_scale=layer_scale)
    model.vit.blocks = model.vit.blocks[:2]
    torch.nn.init.normal_(model.mask_token)
    return model.eval()


def backbone(num_registers: int | None = None, layer_scale: float = 1.0) -> Backbone:
    return copy.deepcopy(whole(num_registers, layer_scale))


def images(num: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(num, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_registers", [None, 0, 4])
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (48, 80)])
def test_unmasked_tokens_equal_timms_own_features(num_registers: int | None, size: tuple[int, int]) -> None:
    model = Backbone(backbone(num_registers).vit, interpolation="timm").eval()
    tokens, timms = model(images(2, *size)), model.vit.forward_features(images(2, *size))
    num_patches = size[0] * size[1] // 16**2
    assert tokens.patches.shape == (2, num_patches, 192)
    torch.testing.assert_close(tokens.cls, timms[:, 0])
    torch.testing.assert_close(tokens.patches, timms[:, -num_patches:])


def cubic(t: float) -> float:
    """Keys' kernel with a = −0.75, as PyTorch's and OpenCV's bicubic."""
    t = abs(t)
    if t <= 1:
        return 1.25 * t**3 - 2.25 * t**2 + 1
    return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_positions_are_resampled_as_the_reference_does_without_registers(rows: int) -> None:
    model = backbone()
    assert model.vit.pos_embed is not None
    plane = model.vit.pos_embed.detach()[0, 1:].view(4, 4, 192)
    matrix = torch.zeros(rows, 4)
    for row in range(rows):  # the scale is that of a grid 0.1 larger; four taps, no antialiasing, borders repeated
        centre = (row + 0.5) * 4 / (rows + 0.1) - 0.5
        for tap in range(int(centre // 1) - 1, int(centre // 1) + 3):
            matrix[row, min(max(tap, 0), 3)] += cubic(centre - tap)
    expected = torch.einsum("rs,stc,ut->ruc", matrix, plane, matrix).reshape(1, rows * rows, 192)
    black = torch.zeros(1, 3, 16 * rows, 16 * rows)
    found = model.embed(black)[:, 1:] - model.vit.patch_embed(black).flatten(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(model.embed(black)[:, :1], (model.vit.cls_token + model.vit.pos_embed[:, :1]).detach())


@pytest.mark.parametrize("side", [32, 48, 112])
def test_positions_are_resampled_antialiased_with_registers(side: int) -> None:
    model = backbone(4)
    torch.testing.assert_close(
        model(images(1, side, side)).cls, model.vit.forward_features(images(1, side, side))[:, 0]
    )


def test_an_empty_mask_changes_nothing() -> None:
    model = backbone(4)
    plain, masked = model(images()), model(images(), torch.zeros(2, 16, dtype=torch.bool))
    torch.testing.assert_close(plain, masked)


def test_masked_patches_are_the_mask_token_plus_their_position() -> None:
    model = backbone(4)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = mask[1, :7] = True
    embedded = model.embed(images(), mask)[:, 5:]
    position = model.vit.pos_embed
    assert position is not None
    expected = (model.mask_token + position).expand(2, -1, -1)
    torch.testing.assert_close(embedded[mask], expected[mask])
    torch.testing.assert_close(embedded[~mask], model.embed(images())[:, 5:][~mask])


def test_the_pixels_of_a_masked_patch_do_not_matter() -> None:
    model, mask = backbone(), torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 6] = True
    changed = images()
    changed[:, :, 16:32, 32:48] += 5.0  # patch 6 of a 4×4 grid
    torch.testing.assert_close(model(images(), mask), model(changed, mask))
    assert not torch.allclose(model(images()).cls, model(changed).cls)


def test_the_mask_token_learns_only_from_masked_patches() -> None:
    model = backbone()
    model(images(), torch.zeros(2, 16, dtype=torch.bool)).cls.sum().backward()
    assert model.mask_token.grad is not None
    assert not model.mask_token.grad.any()
    model(images(), torch.ones(2, 16, dtype=torch.bool)).patches[..., 0].sum().backward()
    assert model.mask_token.grad.any()


def test_keys_are_timms_after_stripping_vit() -> None:
    own = create_backbone("vit_small_patch14_reg4_dinov2", img_size=98).state_dict()
    timms = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=98).state_dict()
    stripped = {key.removeprefix("vit."): value.shape for key, value in own.items() if key != "mask_token"}
    assert stripped == {key: value.shape for key, value in timms.items()}


def test_stochastic_depth_leaves_out_what_it_is_told_to_and_keeps_the_expectation() -> None:
    model = backbone()
    block, x = model.vit.blocks[0], torch.randn(8, 17, 192)
    model.vit.blocks = torch.nn.Sequential(block)
    with torch.no_grad():
        residual = block.ls1(block.attn(block.norm1(x)))
        block.mlp.fc2.weight.zero_()  # one branch alone, so that the expectation is exact
        block.mlp.fc2.bias.zero_()
        model.vit.norm = torch.nn.Identity()
        model.embed = lambda images, mask=None: x  # type: ignore[method-assign]
        kept = torch.tensor([[0, 2, 3, 7], [1, 4, 5, 6]])
        added = model(images(8), kept=[kept]).cls - x[:, 0]
    seen = added.abs().amax(dim=1) > 0
    assert seen.nonzero().flatten().tolist() == [0, 2, 3, 7]
    torch.testing.assert_close(added[seen], 2 * residual[seen][:, 0], rtol=1e-4, atol=1e-5)


def test_each_block_takes_its_own_two_branches() -> None:
    model = backbone()
    seen: list[Tensor] = []
    for block in model.vit.blocks:
        for norm in (block.norm1, block.norm2):
            norm.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))  # type: ignore[union-attr]
    kept = torch.tensor([[0], [1], [2], [3]])
    model(images(4), kept=[kept])
    first = model.embed(images(4))
    assert [len(one) for one in seen] == [17] * 4
    torch.testing.assert_close(seen[0], first[0])
    torch.testing.assert_close(seen[1], first[1])
    assert not torch.allclose(seen[0], seen[1])


def gradients(model: Backbone, tokens: list[Tokens]) -> dict[str, Tensor]:
    model.zero_grad()
    upstream = torch.Generator().manual_seed(2)
    values = [part for one in tokens for part in one]
    torch.autograd.backward(values, [torch.randn(v.shape, generator=upstream) for v in values])
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("num_registers", "drop_path"), [(None, 0.0), (4, 0.5), (None, 0.5)])
def test_one_pass_over_two_crop_sizes_gives_the_tokens_and_gradients_of_two_passes(
    num_registers: int | None, drop_path: float
) -> None:
    model = backbone(num_registers).train()
    kept = [kept_crops(torch.arange(num), range(1), model.num_branches, drop_path, 0) for num in (4, 6)]
    large, small = images(4), images(6, 32, 32)
    mask = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    one_pass = model([large, small], [mask, None], kept)
    found = gradients(model, one_pass)
    two_passes = [model(large, mask, kept[:1]), model(small, kept=kept[1:])]
    expected = gradients(model, two_passes)
    torch.testing.assert_close(one_pass, two_passes)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        rounding = 1e-5 * max(float(expected[name].abs().max()), 1)  # sums over all tokens, in another order
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=rounding)


def test_swiglu_has_the_hidden_width_of_dinov2() -> None:
    with torch.device("meta"):
        mlp = create_backbone("vit_large_patch14_dinov2", img_size=98, ffn="swiglu").vit.blocks[0].mlp
    assert mlp.fc1.weight.shape == (2 * 2736, 1024)
    assert mlp.fc2.weight.shape == (1024, 2736)


def test_swiglu_is_silu_of_the_first_half_times_the_second_and_starts_like_every_matrix() -> None:
    mlp = create_backbone("vit_tiny_patch16_224", img_size=32, ffn="swiglu").vit.blocks[0].mlp
    gate, value = mlp.fc1.weight.chunk(2)
    x = torch.randn(3, 192)
    torch.testing.assert_close(mlp(x), mlp.fc2(torch.nn.functional.silu(x @ gate.T) * (x @ value.T)))
    for half in (gate, value):
        assert half.std().item() == pytest.approx(0.02, rel=0.05)
    assert not mlp.fc1.bias.any()


def test_a_plain_mlp_can_be_asked_of_a_model_that_has_swiglu() -> None:
    with torch.device("meta"):
        mlp = create_backbone("vit_giant_patch14_dinov2", img_size=98, ffn="mlp").vit.blocks[0].mlp
    assert mlp.fc1.weight.shape == (6144, 1536)


def test_layer_scale_is_set_in_every_block() -> None:
    model = backbone(layer_scale=1e-5)
    for block in model.vit.blocks:
        for scale in (block.ls1, block.ls2):
            assert torch.equal(scale.gamma, torch.full((192,), 1e-5))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [(64, 70, r"64×70 px: patch size 16 .* 64 and 80"), (8, 16, r"8×16 px: patch size 16 .* nearest: 16$")],
)
def test_a_crop_that_the_patch_size_does_not_divide_is_refused(height: int, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone()(images(1, height, width))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask \(2, 9\): 2 crops of 16 patches"):
        backbone()(images(), torch.zeros(2, 9, dtype=torch.bool))


def test_an_unknown_name_is_refused_with_close_matches() -> None:
    with pytest.raises(ValueError, match=r"'vit_smal_patch14_dinov2'; close: vit_small_patch14_dinov2"):
        create_backbone("vit_smal_patch14_dinov2", img_size=98)


@pytest.mark.parametrize("name", ["resnet18", "vit_base_patch16_siglip_224", "vit_base_patch16_rpn_224"])
def test_another_family_is_refused(name: str) -> None:
    refused = pytest.raises(ValueError, match=f"'{name}' is no plain vision transformer with a class token")
    with refused, torch.device("meta"):
        create_backbone(name, img_size=64)


def test_drop_path_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"drop_path=1\.0"):
        ModelConfig(drop_path=1.0)
