"""DINOv2 as a Lightning module: student, EMA teacher, one optimiser step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainer.recipe import diagnostics, losses
from trainer.recipe.augment import Crops
from trainer.recipe.backbone import Backbone, build_backbone
from trainer.recipe.counter_random import random_bits
from trainer.recipe.heads import DINOHead
from trainer.recipe.masks import block_masks
from trainer.recipe.schedule import parameter_groups, set_group_values
from trainer.run import starting_weights
from trainer.run.config import Config, ModelConfig
from trainer.run.strategy import prepare, whole

# No crop has this number, so its random numbers are nobody else's.
_GENERATOR_VIEW = 1 << 20


class Network(nn.Module):
    """A backbone with its heads; the student and the teacher are one each."""

    def __init__(self, backbone: Backbone, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = backbone

        def head(num_prototypes: int, bottleneck: int) -> DINOHead:
            return DINOHead(
                backbone.embed_dim, num_prototypes, hidden_dim=config.head_hidden, bottleneck_dim=bottleneck
            )

        self.dino_head = head(config.num_prototypes, config.head_bottleneck)
        self.ibot_head = None
        if config.separate_heads:
            self.ibot_head = head(
                config.ibot_prototypes or config.num_prototypes, config.ibot_bottleneck or config.head_bottleneck
            )

    def forward(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None], chosen: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Crops of several sizes: class tokens and their logits by size, and logits of patch tokens.

        images and masks as the backbone takes them; chosen bool (B, N) says which patches of the first size have
        logits. A shared head sees all of these tokens at once.
        """
        if in_one_pass(images[0].device):
            tokens = self.backbone(images, masks)
        else:
            tokens = [self.backbone(image, mask) for image, mask in zip(images, masks, strict=True)]
        cls, patches = [one.cls for one in tokens], tokens[0].patches[chosen]
        if self.ibot_head is None:
            *class_logits, patch_logits = self._logits(self.dino_head, [*cls, patches])
            return cls, class_logits, patch_logits
        return cls, self._logits(self.dino_head, cls), self.ibot_head(patches)

    @staticmethod
    def _logits(head: nn.Module, tokens: list[Tensor]) -> list[Tensor]:
        return list(head(torch.cat(tokens)).split([len(part) for part in tokens]))


def in_one_pass(device: torch.device) -> bool:
    """Whether crops of all sizes go through the backbone together.

    That halves the kernels to start. A CPU starts none, and its allocator reuses the memory of smaller tensors only:
    there, one size after the other took 0.88 of the time and 0.94 of the memory (`tilestream bench trainer`).
    """
    return device.type != "cpu"


class DinoModule(pl.LightningModule):
    """Trains the student on the teacher's targets; the teacher is the student's moving average.

    A step is the algorithm of DINOv2 (arXiv 2304.07193): crops and masks from (seed, index), the teacher's targets by
    Sinkhorn-Knopp, the losses of the student, AdamW, the moving average.

    Args:
        config: the whole of it.
        resumed: whether weights will come from a checkpoint of this run, so that `model.init` need not be read.

    Raises:
        ValueError: a model or crops that make no sense.
        CheckpointError: weights of `model.init` that don't fit the model.
    """

    def __init__(self, config: Config, *, resumed: bool = False) -> None:
        super().__init__()
        self.config = config
        size = config.augment.global_size
        torch.manual_seed(config.run.seed)
        self.student = Network(build_backbone(config.model, size, drop_path=config.model.drop_path), config.model)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.backbone.set_drop_path(0.0)
        self.grid = self.student.backbone.grid(size, size)
        self.student.backbone.grid(config.augment.local_size, config.augment.local_size)
        if config.model.init and not resumed:
            starting_weights.start_from(config.model.init, self.student, self.teacher, config.data.storage_options)
        if config.loss.centring == "centring":
            self.register_buffer("class_centre", torch.zeros(config.model.num_prototypes))
            patch_prototypes = config.model.ibot_prototypes or config.model.num_prototypes
            self.register_buffer("patch_centre", torch.zeros(patch_prototypes))
        self.schedules = config.optim.schedules(config.train.steps, config.train.batch)
        self.step_metrics: dict[str, Tensor | float] = {}
        self._is_prepared = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one micro-batch: `tile` uint8 (B, S, S, 3), `index` int64 (B,)."""
        config, seed = self.config, self.config.run.seed
        values = self.schedules.at(self.global_step)
        # Stochastic depth draws from torch's generator: seeded by the tiles, it draws the same in a resumed run.
        torch.manual_seed(int(random_bits(seed, batch["index"][:1], _GENERATOR_VIEW, 0)))
        crops = config.augment.multi_crop(batch["tile"], batch["index"], seed)
        masks = block_masks(batch["index"].cpu(), self.grid, config.mask, seed).to(batch["index"].device)
        return self.loss(crops, masks, values.teacher_temp)

    def loss(self, crops: Crops, masks: Tensor, teacher_temp: float) -> Tensor:
        """The loss of one micro-batch of crops; masks bool (2, B, N) of the global ones. Terms go to `step_metrics`."""
        config = self.config
        globals_, flat_masks = crops.global_.flatten(0, 1), masks.flatten(0, 1)
        num_views, size = masks.shape[:2]

        with torch.no_grad():
            (teacher_cls,), (class_logits,), patch_logits = self.teacher([globals_], [None], flat_masks)
            class_targets = self._targets("class_centre", class_logits, teacher_temp)
            patch_targets = self._targets("patch_centre", patch_logits, teacher_temp)
            del class_logits, patch_logits

        sizes = [globals_, crops.local.flatten(0, 1)] if len(crops.local) else [globals_]
        cls, class_logits, patch_logits = self.student(sizes, [flat_masks, None][: len(sizes)], flat_masks)
        global_logits, local_logits = (
            logits.unflatten(0, (-1, size)) for logits in (class_logits[0], class_logits[-1])
        )
        dino_global, dino_local = losses.dino_terms(
            global_logits,
            local_logits if len(sizes) > 1 else local_logits[:0],
            class_targets.unflatten(0, (num_views, size)),
            config.loss.student_temp,
        )
        ibot = losses.ibot_loss(
            patch_logits, patch_targets, losses.mask_weights(flat_masks), num_views * size, config.loss.student_temp
        )
        spread = [self._regulariser(view) for view in cls[0].unflatten(0, (num_views, size))]
        weight = {"koleo": config.loss.koleo_weight, "kde": config.loss.kde_weight, "none": 0.0}
        regulariser = torch.stack(spread).sum()
        loss = (
            config.loss.dino_weight * (dino_global + dino_local)
            + config.loss.ibot_weight * ibot
            + weight[config.loss.regulariser] * regulariser
        )
        self.step_metrics |= {
            "loss": loss.detach(),
            "dino_global": dino_global.detach(),
            "dino_local": dino_local.detach(),
            "ibot": ibot.detach(),
        }
        if config.loss.regulariser != "none":
            self.step_metrics[config.loss.regulariser] = regulariser.detach()
        if self.is_logged(self.global_step + 1):
            self.step_metrics |= diagnostics.teacher_metrics(class_targets, teacher_cls)
        return loss

    def is_logged(self, step: int) -> bool:
        """Whether the metrics get a row for that step, counted from 1."""
        return step % self.config.train.log_every == 0 or step == self.config.train.steps

    def configure_model(self) -> None:
        """Makes the model ready for its ranks, once; Lightning calls this before the optimiser is made."""
        if not self._is_prepared:
            mesh = self.device_mesh["data_parallel"] if self.device_mesh is not None else None
            for network in (self.student, self.teacher):
                blocks, parts = network.backbone.vit.blocks, [network.dino_head, network.ibot_head]
                prepare(network, blocks, [part for part in parts if part is not None], self.config.train, mesh)
            self._is_prepared = True

    def _targets(self, centre: str, logits: Tensor, temperature: float) -> Tensor:
        """The teacher's targets (M, K) of its logits; with centring, the named centre then moves towards them."""
        if self.config.loss.centring == "sinkhorn":
            return losses.sinkhorn(logits, temperature)
        held = self.get_buffer(centre)
        targets = losses.centred(logits, held, temperature)
        held.copy_(losses.moved_centre(held, logits, self.config.loss.centre_momentum))
        return targets

    def _regulariser(self, features: Tensor) -> Tensor:
        loss = self.config.loss
        if loss.regulariser == "koleo":
            return losses.koleo(features, over_ranks=loss.regulariser_over_ranks)
        if loss.regulariser == "kde":
            return losses.kde(features, loss.kde_concentration, over_ranks=loss.regulariser_over_ranks)
        return features.new_zeros(())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the student; learning rates and weight decays are written before each step."""
        optim = self.config.optim
        groups = parameter_groups(
            dict(self.student.named_children()),
            layer_decay=optim.layer_decay,
            patch_embed_lr_mult=optim.patch_embed_lr_mult,
        )
        return torch.optim.AdamW(groups, lr=self.schedules.lr, betas=(0.9, optim.beta2), fused=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the backbone and each head by itself, as DINOv2 does."""
        for name, part in self.student.named_children():
            norm = nn.utils.clip_grad_norm_(part.parameters(), self.config.optim.clip)
            self.step_metrics[f"grad_norm_{name}"] = whole(norm.detach())

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """One step of the schedules, AdamW and the teacher."""
        values = self.schedules.at(self.global_step)
        set_group_values(optimizer.param_groups, values)
        optimizer.step(closure=optimizer_closure)
        self.step_metrics |= {"lr": values.lr, "momentum": values.momentum, "teacher_temp": values.teacher_temp}
        self.update_teacher(values.momentum)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Teacher ← momentum · teacher + (1 − momentum) · student."""
        average = get_ema_multi_avg_fn(momentum)  # one kernel for many tensors where the device has it
        average(list(self.teacher.parameters()), list(self.student.parameters()), 0)
