"""The losses of DINOv2 (arXiv 2304.07193) as pure functions, each in float32 whatever the precision of the model.

Per rank every loss is a mean over that rank's crops, so averaging gradients over ranks (as data parallelism does) gives
the loss of the global batch. Only `sinkhorn` talks to other ranks; without a process group it sums over one.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def _over_ranks(x: Tensor, op: "dist.ReduceOp.RedOpType" = dist.ReduceOp.SUM) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, op=op)
    return x


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Teacher targets of Sinkhorn-Knopp centring: prototypes used evenly, each row a distribution.

    logits (M, K), cosines in −1..1 where they come from a DINO head; M may differ by rank and be 0. Rows of all ranks
    are balanced together. Returns float32 (M, K) whose rows sum to 1. The reference also divides by the number of
    rows, of prototypes and by the total; each of these constants cancels in the normalisation that follows it, so no
    row count is exchanged here. Source: SwAV, arXiv 2006.09882, as in DINOv2's `sinkhorn_knopp_teacher`.
    """
    logits = logits.float()
    # One shift for all rows and ranks: a shift per row would change the result of a finite number of iterations.
    highest = logits.max() if logits.numel() else logits.new_tensor(-torch.inf)
    probabilities = ((logits - _over_ranks(highest, dist.ReduceOp.MAX)) / temperature).exp_()
    for _ in range(iterations):
        probabilities /= _over_ranks(probabilities.sum(dim=0))
        probabilities /= probabilities.sum(dim=1, keepdim=True)
    return probabilities


def dino_loss(student_logits: Sequence[Tensor], teacher_probs: Sequence[Tensor], student_temp: float = 0.1) -> Tensor:
    """Sum over all student/teacher pairs of the batch-mean cross-entropy.

    Both are sequences of (B, K), one per view, rows of the same sample at the same place; teacher_probs sum to 1 by
    row. Returns a float32 scalar. Source: DINOv2's `DINOLoss.forward`.
    """
    # Cross-entropy is linear in the targets: one log-softmax against the sum of the views instead of one per pair.
    targets = torch.stack([probs.float() for probs in teacher_probs]).sum(dim=0)
    losses = [-(targets * F.log_softmax(s.float() / student_temp, dim=-1)).sum(dim=-1).mean() for s in student_logits]
    return torch.stack(losses).sum()


def dino_terms(
    student_global: Tensor, student_local: Tensor, teacher_probs: Tensor, student_temp: float = 0.1
) -> tuple[Tensor, Tensor]:
    """The DINO loss of 2 global and L local crops, as its (global, local) terms, to be added with weight 1 each.

    student_global (2, B, K), student_local (L, B, K), teacher_probs (2, B, K), first index the view. A global crop
    learns from the teacher's other view, a local crop from both. Both terms are divided by 2 + 2L, the number of
    pairs; L = 0 gives a local term of 0. Source: DINOv2's `SSLMetaArch.forward_backward`.
    """
    num_pairs = 2 + 2 * len(student_local)
    across = dino_loss([student_global.flatten(0, 1)], [teacher_probs.flip(0).flatten(0, 1)], student_temp)
    if not len(student_local):
        return 2 * across / num_pairs, torch.zeros_like(across)
    return 2 * across / num_pairs, dino_loss(list(student_local), list(teacher_probs), student_temp) / num_pairs


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
    log_probs = F.log_softmax(student_patch_logits.float() / student_temp, dim=-1)
    return -((teacher_patch_probs * log_probs).sum(dim=-1) * weights).sum() / num_crops


def koleo(features: Tensor, floor: float = 1e-4) -> Tensor:
    """Kozachenko-Leonenko regulariser: minus the mean log distance to the nearest other row on the unit sphere.

    features (B, D), not yet normalised; neighbours are sought on the own rank only, as in DINOv2. The distance d enters
    as sqrt(d² + floor²): near-duplicate tiles then push with a gradient of at most 1/(2·floor), and exact duplicates
    not at all, where the reference goes to infinity. B = 1 gives 0. Returns a float32 scalar.
    Source: arXiv 1806.03198; DINOv2's `KoLeoLoss`.
    """
    with torch.autocast(features.device.type, enabled=False):  # bfloat16 cosines would pick the wrong neighbour
        unit = F.normalize(features.float(), dim=-1)
        if len(unit) < 2:
            return unit.sum() * 0
        with torch.no_grad():
            nearest = (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(dim=1)
        # Not 2 − 2·cosine: for near neighbours that cancels to noise.
        squared = (unit - unit[nearest]).square().sum(dim=-1)
        return -0.5 * torch.log(squared + floor**2).mean()


@torch.no_grad()
def teacher_entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of the rows of (M, K) in nats, log K when uniform, 0 when one-hot; for logging collapse."""
    return torch.special.entr(probabilities.float()).sum(dim=-1).mean()
