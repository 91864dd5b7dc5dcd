import pytest
import torch

from trainer.recipe.backbone import create_backbone
from trainer.recipe.heads import DINOHead
from trainer.recipe.network import ModelConfig, Network


def head(**sizes: int) -> DINOHead:
    torch.manual_seed(0)
    return DINOHead(**{"in_dim": 12, "num_prototypes": 20, "hidden_dim": 16, "bottleneck_dim": 8} | sizes)


def test_head_outputs_cosines_of_the_bottleneck_with_each_prototype() -> None:
    model, tokens = head(), torch.randn(5, 3, 12)
    bottleneck, prototypes = model.mlp(tokens), model.last_layer.weight
    expected = torch.cosine_similarity(bottleneck[..., None, :], prototypes, dim=-1)
    torch.testing.assert_close(model(tokens), expected)
    assert model(tokens).abs().max() <= 1 + 1e-6


def test_last_layer_equals_torchs_weight_norm_with_norm_one_also_in_its_gradient() -> None:
    model = head()
    peer = torch.nn.Linear(8, 20, bias=False)
    peer.load_state_dict(model.last_layer.state_dict())
    torch.nn.utils.parametrizations.weight_norm(peer)
    peer.parametrizations.weight.original0.data.fill_(1.0)  # type: ignore[union-attr, operator]
    x, upstream = torch.randn(4, 8), torch.randn(4, 20)
    model.last_layer(x).backward(upstream)
    peer(x).backward(upstream)
    torch.testing.assert_close(model.last_layer(x), peer(x))
    torch.testing.assert_close(model.last_layer.weight.grad, peer.parametrizations.weight.original1.grad)  # type: ignore[union-attr]


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


def test_only_one_parameter_belongs_to_the_last_layer() -> None:
    names = [name for name, _ in head().named_parameters() if "last_layer" in name]
    assert names == ["last_layer.weight"]


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
    images, chosen = torch.randn(2, 3, 32, 32), torch.tensor([[True, False, False, True], [False] * 4])
    cls, (logits,), patch_logits = network([images], [None], chosen)
    tokens = backbone(images)
    torch.testing.assert_close(cls[0], tokens.cls)
    torch.testing.assert_close(logits, network.dino_head(tokens.cls))
    torch.testing.assert_close(patch_logits, network.ibot_head(tokens.patches[chosen]))


def test_a_shared_head_takes_no_sizes_for_another_one() -> None:
    with pytest.raises(ValueError, match="separate_heads"):
        ModelConfig(ibot_bottleneck=256)
