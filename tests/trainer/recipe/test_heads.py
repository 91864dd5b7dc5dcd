import pytest
import torch
from torch import Tensor

from trainer.recipe.backbone import create_backbone
from trainer.recipe.heads import DINOHead, Prototypes
from trainer.recipe.network import ModelConfig, Network


def head(*, norm_last_layer: bool = False, **sizes: int) -> DINOHead:
    torch.manual_seed(0)
    sizes = {"in_dim": 12, "num_prototypes": 20, "hidden_dim": 16, "bottleneck_dim": 8} | sizes
    return DINOHead(**sizes, norm_last_layer=norm_last_layer)


@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_a_fresh_head_outputs_cosines_of_the_bottleneck_with_each_prototype(norm_last_layer: bool) -> None:
    model, tokens = head(norm_last_layer=norm_last_layer), torch.randn(5, 3, 12)
    bottleneck, prototypes = model.mlp(tokens), model.last_layer.weight
    expected = torch.cosine_similarity(bottleneck[..., None, :], prototypes, dim=-1)
    torch.testing.assert_close(model(tokens), expected)
    assert model(tokens).abs().max() <= 1 + 1e-6


def test_the_last_layer_trains_as_torchs_weight_norm_does_directions_and_norms() -> None:
    torch.manual_seed(0)
    model, peer = Prototypes(8, 20), torch.nn.Linear(8, 20, bias=False)
    peer.weight.data.copy_(model.weight)
    parametrize = torch.nn.utils.parametrizations.weight_norm(peer).parametrizations.weight
    norms, directions = parametrize.original0, parametrize.original1
    assert isinstance(norms, Tensor)
    assert isinstance(directions, Tensor)
    norms.data.fill_(1.0)
    x, target = torch.randn(64, 8), torch.randn(64, 20)
    optimisers = [torch.optim.AdamW(one.parameters(), lr=0.01, weight_decay=0.04) for one in (model, peer)]
    for _ in range(20):
        for one, optimiser in zip((model, peer), optimisers, strict=True):
            optimiser.zero_grad()
            (one(x) - target).square().mean().backward()
            optimiser.step()
    assert model.scale is not None
    torch.testing.assert_close(model.scale.detach(), norms.detach())
    torch.testing.assert_close(model.weight.detach(), directions.detach())
    assert (model.scale - 1).abs().max() > 0.1, "the norms must have moved"


def test_norms_that_stay_one_are_no_parameter() -> None:
    assert [name for name, _ in Prototypes(8, 20, has_unit_norms=True).named_parameters()] == ["weight"]


@pytest.mark.parametrize("is_shard", [False, True])
def test_prototypes_in_bfloat16_keep_their_norms(is_shard: bool) -> None:
    torch.manual_seed(0)
    layer = Prototypes(384, 64)
    layer.weight.data.mul_(torch.rand(64, 1) * 10)
    if is_shard:  # as FSDP gathers it
        layer.bfloat16()
    eye = torch.eye(384, dtype=layer.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        norms = layer(eye).float().norm(dim=0)
    torch.testing.assert_close(norms, torch.ones(64), rtol=0, atol=1e-3)


def test_scaling_a_prototype_changes_nothing() -> None:
    model, tokens = head(), torch.randn(4, 12)
    before = model(tokens)
    model.last_layer.weight.data *= torch.linspace(0.1, 9, 20)[:, None]
    torch.testing.assert_close(model(tokens), before)


@pytest.mark.parametrize(("num_layers", "widths"), [(1, [12, 8]), (2, [12, 16, 8]), (3, [12, 16, 16, 8])])
def test_mlp_has_the_asked_layers_with_gelu_between(num_layers: int, widths: list[int]) -> None:
    mlp = head(num_layers=num_layers).mlp
    linears = [m for m in mlp if isinstance(m, torch.nn.Linear)]
    assert [linears[0].in_features, *[m.out_features for m in linears]] == widths
    assert sum(isinstance(m, torch.nn.GELU) for m in mlp) == num_layers - 1 == len(mlp) - num_layers


def test_mlp_starts_from_a_normal_of_deviation_0_02_and_no_bias() -> None:
    mlp = head(in_dim=200, hidden_dim=400).mlp
    assert mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not mlp[0].bias.any()


def test_impossible_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"num_prototypes=0, num_layers=0 must be at least 1"):
        head(num_prototypes=0, num_layers=0)


def test_separate_heads_have_bottlenecks_and_prototypes_of_their_own() -> None:
    sizes = {"num_prototypes": 20, "head_hidden": 8, "head_bottleneck": 6, "separate_heads": True}
    backbone = create_backbone("vit_tiny_patch16_224", img_size=32)
    backbone.vit.blocks = backbone.vit.blocks[:1]
    network = Network(backbone, ModelConfig(**sizes, ibot_bottleneck=4, ibot_prototypes=12))
    assert network.dino_head.last_layer.weight.shape == (20, 6)
    assert network.ibot_head is not None
    assert network.ibot_head.last_layer.weight.shape == (12, 4)
    images, chosen = torch.randn(2, 3, 32, 32), torch.tensor([0, 3, 5])
    cls, (logits,), patch_logits = network([images], [None], chosen)
    tokens = backbone(images)
    torch.testing.assert_close(cls[0], tokens.cls)
    torch.testing.assert_close(logits, network.dino_head(tokens.cls))
    torch.testing.assert_close(patch_logits, network.ibot_head(tokens.patches.flatten(0, 1)[chosen]))


def test_a_shared_head_takes_no_sizes_for_another_one() -> None:
    with pytest.raises(ValueError, match="separate_heads"):
        ModelConfig(ibot_bottleneck=256)
