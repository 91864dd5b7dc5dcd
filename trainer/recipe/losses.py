"""The losses of DINOv2 (arXiv 2304.07193) as pure functions, each in float32 whatever the precision of the model.

Per rank every loss is a mean over that rank's crops, so averaging gradients over ranks (as data parallelism does) gives
the loss of the global batch. What compares crops with each other (targets, regularisers) takes those of all ranks;
without a process group there is one.

Libraries looked at: lightly 1.6 centres its DINO and iBOT targets by the mean alone, without Sinkhorn-Knopp, and its
KoLeo, equal in value, neither floors the distance nor sees other ranks; none has the KDE regulariser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-30  # below any sum that matters; keeps a prototype without any mass finite
LOSS_NBYTES = 1 << 28
"""bytes of a float32 tensor at most, of which a cross-entropy works with two beside its input and output"""


_P = ParamSpec("_P")


def _in_float32(function: Callable[Concatenate[Tensor, _P], Tensor]) -> Callable[Concatenate[Tensor, _P], Tensor]:
    """The function without autocast, which would make float32 products in bfloat16."""

    @wraps(function)
    def wrapped(x: Tensor, /, *args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapped


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and temperatures of the loss terms."""

    dino_weight: float = 1.0
    """weight of the class-token term"""
    ibot_weight: float = 1.0
    """weight of the masked-token term, whatever `patch` says it is"""
    patch: Literal["ibot", "regression"] = "ibot"
    """what the student foretells of masked patches: the teacher's prototypes, or its tokens themselves"""
    regulariser: Literal["koleo", "kde", "none"] = "koleo"
    """what spreads the class tokens of each global view"""
    koleo_weight: float = 0.1
    """weight of the KoLeo regulariser, per view"""
    kde_weight: float = 0.05
    """weight of the KDE regulariser, per view"""
    kde_concentration: float = 5.0
    """concentration κ of its kernel exp(κ·cosine)"""
    regulariser_over_ranks: bool = True
    """whether it compares the crops of all ranks; the reference's KoLeo stays on its own"""
    centring: Literal["sinkhorn", "centring"] = "sinkhorn"
    """how the teacher's targets are kept from collapse: Sinkhorn-Knopp, or DINO's moving mean"""
    centre_momentum: float = 0.9
    """momentum of that mean"""
    student_temp: float = 0.1
    """temperature of the student's softmax"""

    @property
    def regulariser_weight(self) -> float:
        """The weight of the one that is chosen; 0 without."""
        return {"koleo": self.koleo_weight, "kde": self.kde_weight, "none": 0.0}[self.regulariser]

    def __post_init__(self) -> None:
        if not 0 <= self.centre_momentum < 1:
            raise ValueError(f"centre_momentum is {self.centre_momentum}; it must be in [0, 1)")
        if not (self.kde_concentration > 0 and self.student_temp > 0):
            raise ValueError(
                f"kde_concentration {self.kde_concentration}, student_temp {self.student_temp}: both must be above 0"
            )


def _over_ranks(x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, op=op)
    return x


class _OfAllRanks(torch.autograd.Function):
    """Rows of all ranks, rank after rank; a row's gradient is the sum of those that the ranks have for it.

    torch's own (`distributed.nn.functional.all_gather`) is deprecated, and its successor is private to torch 2.14.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        ctx.num_rows = len(rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        first = dist.get_rank() * ctx.num_rows
        return grad[first : first + ctx.num_rows]


def _with_other_ranks(rows: Tensor, over_ranks: bool) -> tuple[Tensor, Tensor]:
    """Rows (B, D) with those of all ranks (n, D), B the same on each, and which of them (B,) are the own ones."""
    own = torch.arange(len(rows), device=rows.device)
    if not over_ranks or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows, own
    gathered: Any = _OfAllRanks.apply(rows)
    return gathered, own + dist.get_rank() * len(rows)


@torch.no_grad()
@_in_float32
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Teacher targets of Sinkhorn-Knopp centring: prototypes used evenly, each row a distribution.

    logits (M, K); M may differ by rank and be 0. Rows of all ranks are balanced together. Returns float32 (M, K) whose
    rows sum to 1. The reference also divides by the number of rows, of prototypes and by the total; each of these
    constants cancels in the normalisation that follows it, so no row count is exchanged here. Source: SwAV, arXiv
    2006.09882, as in DINOv2's `sinkhorn_knopp_teacher`.
    """
    # Each row is shifted by its own highest, so that none is lost where prototypes of large norms spread the logits.
    # The first scales of the rows take the shift back: without, a finite number of iterations would end elsewhere.
    highest = logits.amax(dim=1).float()
    kernel = _below(logits, highest[:, None]).div_(temperature).exp_()
    of_all = highest.max() if len(highest) else highest.new_full((), -torch.inf)
    # Only the scales of rows and columns are iterated: the matrix is read twice a turn and written once at the end.
    rows = ((highest - _over_ranks(of_all, dist.ReduceOp.MAX)) / temperature).exp_()
    columns = kernel.new_ones(kernel.shape[1])
    for _ in range(iterations):
        columns = 1 / _over_ranks(rows @ kernel).clamp(min=_TINY)
        rows = 1 / (kernel @ columns)
    return kernel.mul_(columns).mul_(rows[:, None])


@torch.no_grad()
@_in_float32
def centred(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Teacher targets of DINO's centring: softmax of (logits − centre) / temperature.

    logits (M, K), centre (K,). Returns float32 (M, K). Source: DINO, arXiv 2104.14294.
    """
    return torch.softmax((logits.float() - centre) / temperature, dim=-1)


@torch.no_grad()
@_in_float32
def moved_centre(centre: Tensor, logits: Tensor, momentum: float) -> Tensor:
    """The centre (K,) for the next step: a moving average of the mean of all ranks' logits (M, K), M may differ.

    Without any row the centre stays. The reference's iBOT variant takes the mean over prototypes instead of tokens,
    which leaves no centre at all; this one is right for both.
    """
    total = _over_ranks(torch.cat([logits.float().sum(dim=0), centre.new_full((1,), len(logits))]))
    mean = total[:-1] / total[-1].clamp(min=1)
    return torch.where(total[-1] > 0, torch.lerp(mean, centre, momentum), centre)


def _below(logits: Tensor, highest: Tensor) -> Tensor:
    """Logits less their rows' highest, in new float32 memory: the only one, whatever the logits' type."""
    return torch.sub(logits, highest, out=torch.empty_like(logits, dtype=torch.float32))


class _SoftCrossEntropy(torch.autograd.Function):
    """Cross-entropy by row with targets that need no gradient; keeps the logits as they are, and two numbers a row.

    Autograd's own chain keeps and writes several tensors of their size in float32, which for 65,536 prototypes is most
    of a small model's memory. Here no more than some rows of them are in float32 at once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        highest = logits.amax(dim=-1, keepdim=True).float()
        norms, found = torch.empty_like(highest), torch.empty_like(highest[..., 0])
        for rows in _some_rows(logits):
            scaled = _below(logits[:, rows], highest[:, rows]).div_(temperature)
            met = torch.einsum("vmk,mk->vm", scaled, targets[rows])
            norms[:, rows] = scaled.exp_().sum(dim=-1, keepdim=True).log_()
            found[:, rows] = (norms[:, rows, 0] * targets[rows].sum(dim=-1)).sub_(met)
        ctx.save_for_backward(logits, targets, highest, norms)
        ctx.temperature = temperature
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits, targets, highest, norms = ctx.saved_tensors
        scale = (grads[0] / ctx.temperature)[..., None]
        grad = torch.empty_like(logits)
        for rows in _some_rows(logits):
            probs = _below(logits[:, rows], highest[:, rows]).div_(ctx.temperature).sub_(norms[:, rows]).exp_()
            away = probs.mul_(targets[rows].sum(dim=-1, keepdim=True)).sub_(targets[rows])
            grad[:, rows] = away.mul_(scale[:, rows])
        return grad, None, None


def _some_rows(logits: Tensor) -> list[slice]:
    """The rows of (V, M, K), V alike at once, cut so that each part is of a bounded size."""
    num_views, num_rows, width = logits.shape
    most = max(LOSS_NBYTES // max(4 * num_views * width, 1), 1)
    return [slice(first, first + most) for first in range(0, num_rows, most)]


@_in_float32
def soft_cross_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy (…, M) of softmax(logits / temperature) against targets, which get no gradient.

    logits (M, K), or (V, M, K) of V views that have the same targets; targets (M, K).
    """
    views = logits if logits.ndim == 3 else logits[None]
    found: Any = _SoftCrossEntropy.apply(views, targets.detach().float(), temperature)
    return found if logits.ndim == 3 else found[0]


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, student_temp: float = 0.1) -> Tensor:
    """Sum over all student/teacher pairs of the batch-mean cross-entropy.

    student_logits (V, B, K) and teacher_probs (W, B, K), first index the view, rows of the same sample at the same
    place; teacher_probs sum to 1 by row. Returns a float32 scalar. Source: DINOv2's `DINOLoss.forward`.
    """
    # Cross-entropy is linear in the targets: one log-softmax against the sum of the views instead of one per pair.
    return soft_cross_entropy(student_logits, teacher_probs.float().sum(dim=0), student_temp).mean(dim=-1).sum()


def dino_terms(
    student_global: Tensor, student_local: Tensor, teacher_probs: Tensor, student_temp: float = 0.1
) -> tuple[Tensor, Tensor]:
    """The DINO loss of 2 global and L local crops, as its (global, local) terms, to be added with weight 1 each.

    student_global (2, B, K), student_local (L, B, K), teacher_probs (2, B, K), first index the view. A global crop
    learns from the teacher's other view, a local crop from both. Both terms are divided by 2 + 2L, the number of
    pairs; L = 0 gives a local term of 0. Source: DINOv2's `SSLMetaArch.forward_backward`.
    """
    num_pairs = 2 + 2 * len(student_local)
    crossed = teacher_probs.flip(0).flatten(0, 1)
    across = soft_cross_entropy(student_global.flatten(0, 1), crossed, student_temp).mean()
    if not len(student_local):
        return 2 * across / num_pairs, torch.zeros_like(across)
    return 2 * across / num_pairs, dino_loss(student_local, teacher_probs, student_temp) / num_pairs


def mask_weights(masks: Tensor) -> Tensor:
    """Weight 1 / (masked tokens of its crop) of each masked token, so that every masked crop counts the same.

    masks bool (B, N). Returns float32 (M,), in the order of `tokens[masks]`.
    """
    per_crop = masks.sum(dim=1, keepdim=True)
    return (1.0 / per_crop.clamp(min=1)).expand(masks.shape)[masks]


def ibot_loss(
    student_patch_logits: Tensor,
    teacher_patch_probs: Tensor,
    weights: Tensor,
    num_crops: int,
    student_temp: float = 0.1,
) -> Tensor:
    """Weighted cross-entropy over the masked tokens, divided by the number of crops, masked or not.

    student_patch_logits and teacher_patch_probs (M, K), weights (M,) of `mask_weights`. M = 0 gives 0 with a gradient.
    Returns a float32 scalar. Source: iBOT, arXiv 2111.07832, as in DINOv2's `iBOTPatchLoss.forward_masked`.
    """
    return (soft_cross_entropy(student_patch_logits, teacher_patch_probs, student_temp) * weights).sum() / num_crops


@torch.no_grad()
@_in_float32
def regression_targets(patches: Tensor) -> Tensor:
    """The teacher's patch tokens (M, D) as regression wants them: each normalised to mean 0 and variance 1.

    Else the smaller all tokens are, the better they are foretold. Source: I-JEPA, arXiv 2301.08243, whose published
    code does so.
    """
    return F.layer_norm(patches.float(), patches.shape[-1:])


@_in_float32
def regression_loss(predictions: Tensor, targets: Tensor, weights: Tensor, num_crops: int) -> Tensor:
    """Smooth L1 between predictions and targets (M, D), each token's mean weighted as in `ibot_loss`.

    targets by `regression_targets`; weights (M,) of `mask_weights`. M = 0 gives 0 with a gradient. Returns a float32
    scalar. Source: I-JEPA's published code has smooth L1 of that threshold, 1; so has MedARC-AI/nanopath's DINO with
    I-JEPA's term in iBOT's place, from which the weights are.
    """
    errors = F.smooth_l1_loss(predictions.float(), targets, reduction="none").mean(dim=-1)
    return (errors * weights).sum() / num_crops


@_in_float32  # bfloat16 cosines would pick the wrong neighbour
def koleo(features: Tensor, floor: float = 1e-4, *, over_ranks: bool = True) -> Tensor:
    """Kozachenko-Leonenko regulariser: minus the mean log distance to the nearest other row on the unit sphere.

    features (B, D), not yet normalised; neighbours are sought on all ranks, or on the own one only, as in DINOv2. The
    distance d enters as sqrt(d² + floor²): near-duplicate tiles then push with a gradient of at most 1/(2·floor), and
    exact duplicates not at all, where the reference goes to infinity. One row gives 0. Returns a float32 scalar.
    Source: arXiv 1806.03198; DINOv2's `KoLeoLoss`.
    """
    unit = F.normalize(features.float(), dim=-1)
    others, own = _with_other_ranks(unit, over_ranks)
    if len(others) < 2:
        return unit.sum() * 0
    with torch.no_grad():
        nearest = (unit @ others.T).scatter_(1, own[:, None], -torch.inf).argmax(dim=1)
    # Not 2 − 2·cosine: for near neighbours that cancels to noise.
    squared = (unit - others[nearest]).square().sum(dim=-1)
    return -0.5 * torch.log(squared + floor**2).mean()


@_in_float32
def kde(features: Tensor, concentration: float = 5.0, *, over_ranks: bool = True) -> Tensor:
    """Kernel density regulariser: mean log of the mean over *other* rows of exp(concentration · cosine).

    features (B, D), not yet normalised; the others are those of all ranks, or of the own one. Minimising it spreads the
    embeddings; unlike KoLeo it stays finite for duplicates. One row gives 0. Returns a float32 scalar, in
    −concentration..concentration. Source: Virchow2, arXiv 2408.00738, with the von Mises-Fisher kernel.
    """
    unit = F.normalize(features.float(), dim=-1)
    others, own = _with_other_ranks(unit, over_ranks)
    if len(others) < 2:
        return unit.sum() * 0
    similarity = (concentration * unit @ others.T).scatter(1, own[:, None], -torch.inf)
    return (torch.logsumexp(similarity, dim=1) - math.log(len(others) - 1)).mean()


@torch.no_grad()
def teacher_entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of the rows of (M, K) in nats, log K when uniform, 0 when one-hot; for logging collapse."""
    return torch.special.entr(probabilities.float()).sum(dim=-1).mean()
