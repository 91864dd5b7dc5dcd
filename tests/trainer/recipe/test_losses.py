import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.recipe import losses
from trainer.recipe.losses import (
    centred,
    dino_loss,
    dino_terms,
    ibot_loss,
    kde,
    koleo,
    mask_weights,
    moved_centre,
    regression_loss,
    regression_targets,
    sinkhorn,
    soft_cross_entropy,
    teacher_entropy,
)

GOLDEN = Path(__file__).parents[2] / "data/dinov2_losses.npz"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-8}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(params=["32-true", "bf16-mixed"])
def precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test inside autocast, too: losses are float32 whatever the precision of the model."""
    with torch.autocast("cpu", torch.bfloat16, enabled=request.param == "bf16-mixed"):
        yield


in_either_precision = pytest.mark.usefixtures("precision")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_cross_entropy(student: np.ndarray, teacher: np.ndarray, temp: float) -> np.ndarray:
    out = np.zeros(len(student))
    for row in range(len(student)):
        scaled = [float(x) / temp for x in student[row]]
        log_sum = math.log(math.fsum(math.exp(x) for x in scaled))
        out[row] = -math.fsum(float(t) * (x - log_sum) for t, x in zip(teacher[row], scaled, strict=True))
    return out


@in_either_precision
def test_sinkhorn_equals_the_reference(golden: dict[str, Tensor]) -> None:
    temp = float(golden["teacher_temp"])
    torch.testing.assert_close(sinkhorn(golden["teacher"], temp), golden["teacher_sinkhorn"], **TOLERANCE)
    torch.testing.assert_close(sinkhorn(golden["teacher_patch"], temp), golden["teacher_patch_sinkhorn"], **TOLERANCE)


def _views(rows: Tensor, num: int) -> Tensor:
    return rows.unflatten(0, (num, -1))


@in_either_precision
def test_dino_loss_and_its_gradient_equal_the_reference(golden: dict[str, Tensor]) -> None:
    student = golden["student_local"].clone().requires_grad_()
    loss = dino_loss(_views(student, 4), _views(golden["teacher_sinkhorn"], 2), 0.1)
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["dino_local_sum"], **TOLERANCE)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, golden["dino_local_sum_grad"], rtol=1e-5, atol=1e-7)
    crossed = dino_loss(golden["student_global"][None], golden["teacher_sinkhorn"][None], 0.1)
    torch.testing.assert_close(crossed, golden["dino_global"], **TOLERANCE)


@in_either_precision
def test_ibot_loss_and_weights_equal_the_reference(golden: dict[str, Tensor]) -> None:
    weights = mask_weights(golden["masks"])
    torch.testing.assert_close(weights, golden["masks_weight"], **TOLERANCE)
    loss = ibot_loss(golden["student_patch"], golden["teacher_patch_sinkhorn"], weights, len(golden["masks"]), 0.1)
    torch.testing.assert_close(loss, golden["ibot"], **TOLERANCE)


@in_either_precision
def test_koleo_and_its_gradient_equal_the_reference(golden: dict[str, Tensor]) -> None:
    features = golden["koleo_in"].clone().requires_grad_()
    loss = koleo(features)
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["koleo"], **TOLERANCE)
    assert features.grad is not None
    torch.testing.assert_close(features.grad, golden["koleo_grad"], rtol=1e-5, atol=1e-7)


@in_either_precision
def test_sinkhorn_rows_sum_to_one_and_prototypes_are_used_evenly() -> None:
    probs = sinkhorn(torch.nn.functional.normalize(rand(40, 8), dim=1), 0.1, iterations=50)
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(probs.sum(dim=0), torch.full((8,), 5.0), rtol=1e-4, atol=0)


@in_either_precision
def test_sinkhorn_follows_the_published_algorithm_in_float64() -> None:
    logits = rand(6, 10).numpy().astype(np.float64)
    q = np.exp(logits / 0.5).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(axis=1, keepdims=True) * q.shape[0]
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
    expected = (q * q.shape[1]).T
    np.testing.assert_allclose(sinkhorn(torch.from_numpy(logits), 0.5).numpy(), expected, rtol=1e-5)


@in_either_precision
@given(st.integers(0, 2**32 - 1), st.floats(1, 1.7))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sinkhorn_follows_float64_where_trained_norms_spread_the_logits(seed: int, norm: float) -> None:
    logits = norm * torch.nn.functional.normalize(rand(12, 9, seed=seed), dim=1)
    logits[:6] -= norm  # rows far below the others, which a shift common to all would lose
    scaled = logits.double().numpy() / 0.04
    log_q = scaled - scaled.max()
    for _ in range(3):
        log_q -= np.logaddexp.reduce(log_q, axis=0, keepdims=True)
        log_q -= np.logaddexp.reduce(log_q, axis=1, keepdims=True)
    np.testing.assert_allclose(sinkhorn(logits, 0.04).numpy(), np.exp(log_q), rtol=1e-3, atol=1e-6)


def test_sinkhorn_is_finite_for_the_sharpest_cosines_and_for_no_rows() -> None:
    logits = torch.where(rand(8, 16) > 0, 1.0, -1.0)
    assert sinkhorn(logits, 0.04).isfinite().all()
    assert sinkhorn(torch.empty(0, 16), 0.04).shape == (0, 16)


def test_dino_loss_sums_the_cross_entropy_of_all_pairs() -> None:
    students = torch.stack([rand(3, 5, seed=s) for s in range(4)])
    teachers = torch.stack([rand(3, 5, seed=s).softmax(dim=1) for s in (10, 11)])
    expected = sum(naive_cross_entropy(s.numpy(), t.numpy(), 0.1).mean() for s in students for t in teachers)
    assert dino_loss(students, teachers, 0.1).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_local", [0, 3])
def test_dino_terms_pair_each_global_crop_with_the_other_view(num_local: int) -> None:
    student, local, teacher = rand(2, 3, 5), rand(num_local, 3, 5, seed=1), rand(2, 3, 5, seed=2).softmax(dim=2)

    def pair(s: Tensor, t: Tensor) -> float:
        return float(naive_cross_entropy(s.numpy(), t.numpy(), 0.1).mean())

    pairs = 2 + 2 * num_local
    global_term, local_term = dino_terms(student, local, teacher, 0.1)
    crossed = pair(student[0], teacher[1]) + pair(student[1], teacher[0])
    assert global_term.item() == pytest.approx(crossed / pairs, rel=1e-5)
    assert local_term.item() == pytest.approx(sum(pair(s, t) for s in local for t in teacher) / pairs, rel=1e-5)


def test_ibot_loss_averages_over_the_tokens_of_a_crop_then_over_crops() -> None:
    masks = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)
    student, teacher = rand(4, 6), rand(4, 6, seed=1).softmax(dim=1)
    tokens = naive_cross_entropy(student.numpy(), teacher.numpy(), 0.1)
    expected = (tokens[:3].mean() + tokens[3]) / 3
    assert ibot_loss(student, teacher, mask_weights(masks), 3, 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_ibot_loss_without_masked_tokens_is_zero_and_differentiable() -> None:
    student = torch.empty(0, 6, requires_grad=True)
    loss = ibot_loss(student, torch.empty(0, 6), mask_weights(torch.zeros(2, 4, dtype=torch.bool)), 2)
    loss.backward()
    assert loss.item() == 0


def test_koleo_of_a_square_is_minus_the_log_of_its_side() -> None:
    corners = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-2.0, 0.0], [0.0, -1.0]])
    assert koleo(corners).item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-6)


def test_koleo_of_duplicates_and_of_one_row_stays_finite() -> None:
    for features in (torch.ones(4, 8), torch.ones(1, 8), torch.ones(2, 8) + 1e-6 * rand(2, 8)):
        features.requires_grad_()
        loss = koleo(features)
        loss.backward()
        assert features.grad is not None
        assert loss.isfinite()
        assert features.grad.abs().max() < 1e4
    assert koleo(torch.ones(1, 8)).item() == 0


@in_either_precision
def test_losses_are_float32_for_half_precision_inputs() -> None:
    logits, probs = rand(4, 6).bfloat16(), rand(4, 6).softmax(dim=1)
    outputs = (sinkhorn(logits, 0.1), dino_loss(logits[None], probs[None]), ibot_loss(logits, probs, torch.ones(4), 4))
    assert {x.dtype for x in (*outputs, koleo(logits))} == {torch.float32}


def test_teacher_entropy_is_log_k_when_uniform_and_zero_when_one_hot() -> None:
    assert teacher_entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(math.log(8))
    assert teacher_entropy(torch.eye(8)).item() == 0


@in_either_precision
def test_centring_and_its_moving_mean_equal_the_reference(golden: dict[str, Tensor]) -> None:
    temp, centre = float(golden["teacher_temp"]), torch.zeros(64)
    torch.testing.assert_close(centred(golden["teacher"], centre, temp), golden["teacher_centered_first"], **TOLERANCE)
    centre = moved_centre(centre, golden["teacher"], 0.9)
    torch.testing.assert_close(centre, golden["center_after_one_update"][0], **TOLERANCE)
    torch.testing.assert_close(centred(golden["teacher"], centre, temp), golden["teacher_centered_second"], **TOLERANCE)


def test_the_centre_stays_where_no_token_is_masked() -> None:
    centre = rand(6)
    assert torch.equal(moved_centre(centre, torch.empty(0, 6), 0.9), centre)


@in_either_precision
@pytest.mark.parametrize("views", [(), (3,)])
@pytest.mark.parametrize("nbytes", [1, 168, 1 << 28])  # a row, two rows of three views, all
def test_soft_cross_entropy_has_the_gradient_of_autograds_own_chain(
    views: tuple[int, ...], nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOSS_NBYTES", nbytes)
    logits, upstream = rand(*views, 5, 7).requires_grad_(), rand(*views, 5, seed=2)
    targets = 2 * rand(5, 7, seed=1).softmax(dim=1)
    peer = logits.detach().clone().requires_grad_()
    expected = -(targets * torch.log_softmax(peer / 0.1, dim=-1)).sum(dim=-1)
    found = soft_cross_entropy(logits, targets, 0.1)
    torch.testing.assert_close(found, expected)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(logits.grad, peer.grad, rtol=1e-5, atol=1e-6)


@in_either_precision
def test_kde_is_the_mean_log_of_the_mean_kernel_over_the_others() -> None:
    features = rand(5, 4).numpy().astype(np.float64)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    rows = [np.log(np.mean([np.exp(5 * unit[i] @ unit[j]) for j in range(5) if j != i])) for i in range(5)]
    assert kde(torch.from_numpy(features), 5.0).item() == pytest.approx(np.mean(rows), rel=1e-5)


def test_kde_of_duplicates_is_the_concentration_and_of_opposites_its_negative() -> None:
    assert kde(torch.ones(4, 8), 5.0).item() == pytest.approx(5.0)
    assert kde(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 5.0).item() == pytest.approx(-5.0)
    assert kde(torch.ones(1, 8)).item() == 0


@pytest.mark.parametrize("regulariser", [kde, koleo])
def test_descending_a_regulariser_spreads_the_embeddings(regulariser: Callable[[Tensor], Tensor]) -> None:
    features = torch.tensor([[1.0, 0.1], [1.0, -0.1], [1.0, 0.3]], requires_grad=True)
    regulariser(features).backward()
    assert features.grad is not None
    before, after = features.detach(), features.detach() - 0.05 * features.grad
    cosines = [torch.nn.functional.normalize(x, dim=1) for x in (before, after)]
    assert torch.pdist(cosines[1]).mean() > torch.pdist(cosines[0]).mean()


class TinyModel(torch.nn.Module):
    """A student of eight numbers a crop, with a hidden token in one crop or another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(8, 5), torch.nn.Linear(5, 9)

    def forward(self, crops: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.body(crops)
        return features, self.head(features), self.head(self.body(tokens))


def test_regression_is_smooth_l1_on_normalised_tokens_and_weighs_each_masked_crop_alike() -> None:
    masks = torch.tensor([[True, True, True, False], [False] * 4, [True, False, False, False]])
    predicted, tokens = 3 * rand(4, 5), rand(4, 5, seed=1)
    targets = regression_targets(tokens)
    values = tokens.double().numpy()
    wanted = (values - values.mean(axis=1, keepdims=True)) / np.sqrt(values.var(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(targets.numpy(), wanted, rtol=1e-5, atol=1e-6)
    off = np.abs(predicted.double().numpy() - wanted)
    by_token = np.where(off < 1, off**2 / 2, off - 0.5).mean(axis=1)
    assert (off < 1).any()
    assert (off > 1).any()
    expected = (by_token[:3].mean() + by_token[3]) / 3  # two masked crops of three
    found = regression_loss(predicted, targets, mask_weights(masks), 3)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert regression_loss(predicted, regression_targets(tokens), mask_weights(masks), 3).item() == found.item()
    none = predicted[:0].requires_grad_()
    regression_loss(none, targets[:0], mask_weights(masks[1:2]), 1).backward()
    assert none.grad is not None


def losses_of(model: torch.nn.Module, crops: slice, tokens: slice) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and targets of a part of the global batch: 4 crops, 8 masked tokens."""
    masks = torch.zeros(4, 6, dtype=torch.bool)
    masks[0, :2], masks[1, 1:6], masks[3, 2] = True, True, True
    features, logits, patch_logits = model(rand(4, 8)[crops], rand(8, 8, seed=1)[tokens])
    targets = sinkhorn(rand(4, 9, seed=2)[crops], 0.5)
    patch_targets = sinkhorn(rand(8, 9, seed=3)[tokens], 0.5)
    named = {"targets": targets, "patch_targets": patch_targets}
    named["centred"] = centred(rand(4, 9)[crops], moved_centre(torch.zeros(9), rand(8, 9, seed=3)[tokens], 0.5), 0.1)
    terms = {
        "dino": dino_loss(logits[None], targets[None]),
        "ibot": ibot_loss(patch_logits, patch_targets, mask_weights(masks[crops]), len(targets)),
        "kde": kde(features),
        "koleo": koleo(features),
    }
    return torch.stack(list(terms.values())).sum(), named | {name: term.detach() for name, term in terms.items()}


def one_of_two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # The first two crops have seven masked tokens, the last two have one: unequal rows on purpose.
    part = (slice(0, 2), slice(0, 7)) if rank == 0 else (slice(2, 4), slice(7, 8))
    model = torch.nn.parallel.DistributedDataParallel(TinyModel())
    loss, named = losses_of(model, *part)
    loss.backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save({"named": named, "gradients": gradients}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_give_the_targets_losses_and_gradients_of_one_rank(tmp_path: Path) -> None:
    mp.spawn(one_of_two_ranks, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = TinyModel()
    loss, whole = losses_of(model, slice(None), slice(None))
    loss.backward()
    for name in ("targets", "patch_targets", "centred"):
        torch.testing.assert_close(torch.cat([first["named"][name], second["named"][name]]), whole[name])
    for name in ("dino", "ibot", "kde", "koleo"):
        torch.testing.assert_close((first["named"][name] + second["named"][name]) / 2, whole[name])
    for name, parameter in model.named_parameters():
        for rank in (first, second):
            torch.testing.assert_close(rank["gradients"][name], parameter.grad, rtol=1e-5, atol=1e-6)
    alone = sinkhorn(rand(4, 9, seed=2)[:2], 0.5)
    assert not torch.allclose(alone, first["named"]["targets"]), "the ranks must have balanced their rows together"
    assert not torch.allclose(kde(model.body(rand(4, 8)[:2])), first["named"]["kde"]), "and compared their crops"
