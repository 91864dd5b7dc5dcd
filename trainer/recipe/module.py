"""DINOv2 as a Lightning module: student, EMA teacher, one optimiser step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainer.recipe import diagnostics, losses
from trainer.recipe.augment import Crops
from trainer.recipe.masks import Masks
from trainer.recipe.network import Network
from trainer.recipe.recipe import Recipe
from trainer.recipe.schedule import Schedules, parameter_groups, set_group_values
from trainer.recipe.step_input import Drawn, StepInput

Prepare = Callable[[Network, DeviceMesh | None], None]
"""Makes a network ready for its ranks, to be sharded over a mesh if there is one."""

Fill = Callable[["DinoModule"], object]
"""Gives a module that was made on the meta device memory on its own, and its weights."""


class DinoModule(pl.LightningModule):
    """Trains the student on the teacher's targets; the teacher is the student's moving average.

    A step is the algorithm of DINOv2 (arXiv 2304.07193): crops and masks from (seed, index), the teacher's targets by
    Sinkhorn-Knopp, the losses of the student, AdamW, the moving average.

    Args:
        recipe: what is trained.
        seed: decides the first weights, the crops, the masks and the stochastic depth.
        steps: optimiser steps of the whole run, over which its schedules go.
        batch: tiles of an optimiser step, over all ranks and accumulation rounds.
        log_every: steps between two for which the metrics are to be complete.
        few_kernels: whether a step is of few large kernels, as a GPU wants it: crops of all sizes go through the
            backbone together, colours are changed for all images at once. Only rounding depends on it.
        compile_crops: whether crops are cut by one compiled function, which takes few kernels.
        prepare: makes student and teacher ready for their ranks, once.
        fill: is asked once they are.

    Raises:
        ValueError: a model, crops or schedules that make no sense.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        *,
        steps: int,
        batch: int,
        log_every: int = 1,
        few_kernels: bool = False,
        compile_crops: bool = False,
        prepare: Prepare | None = None,
        fill: Fill | None = None,
    ) -> None:
        super().__init__()
        self.recipe, self._seed = recipe, seed
        self._steps, self._log_every, self._prepare, self._fill = steps, log_every, prepare, fill
        self._few_kernels = few_kernels
        augment, model = recipe.augment, recipe.model
        self._cut = augment.crops
        if compile_crops:
            self._cut = torch.compile(augment.crops, fullgraph=True, dynamic=False)
        self.student = recipe.network(seed)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher.predictor = None
        self.patch_grid = self.student.backbone.patch_grid(augment.global_size, augment.global_size)
        self.student.backbone.patch_grid(augment.local_size, augment.local_size)
        if recipe.loss.centring == "centring":
            self.register_buffer("class_centre", torch.zeros(model.num_prototypes))
            self.register_buffer("patch_centre", torch.zeros(model.ibot_prototypes or model.num_prototypes))
        self.schedules = Schedules(recipe.optim, steps, batch)
        self.step_metrics: dict[str, Tensor | float] = {}

    def drawn(self, batch: Mapping[str, Tensor]) -> Drawn:
        """All that is drawn for a micro-batch on the host: `tile` uint8 (B, S, S, 3), `index` int64 (B,).

        Where local crops are cut from other tiles, these are `local_tile`.
        """
        branches, local_tiles = self.student.backbone.num_branches, batch.get("local_tile")
        return self.recipe.drawn(
            batch["tile"], batch["index"], self.patch_grid, branches, self._seed, local_tiles=local_tiles
        )

    def step_input(self, drawn: Drawn) -> StepInput:
        """What a step needs of it, on the device that it is on."""
        local_tiles = drawn.local_tile[0] if drawn.local_tile else None
        crops = self._cut(drawn.tile, drawn.draws, local_tiles=local_tiles, few_kernels=self._few_kernels)
        return StepInput(crops, drawn.sample_index, drawn.masks, drawn.kept)

    def training_step(self, batch: StepInput, batch_idx: int) -> Tensor:
        """The loss of one micro-batch on the module's device; nothing is drawn, sent or asked for on the way."""
        temperature = self.schedules.at(self.global_step).teacher_temp
        return self.loss(batch.crops, batch.masks, temperature, batch.kept)

    @torch.no_grad()
    def validation_terms(self, batch: StepInput) -> dict[str, Tensor]:
        """The loss of such a micro-batch and its terms, without stochastic depth; nothing is changed by it.

        Targets are as sharp as those of the step that was trained last.
        """
        temperature = self.schedules.at(max(self.global_step - 1, 0)).teacher_temp
        was_training = self.training
        self.eval()
        crops, masks = batch.crops, batch.masks
        _, class_targets, patch_targets = self._targets(crops.global_, masks, temperature)
        terms = self._terms(crops, masks, class_targets, patch_targets)
        self.train(was_training)
        return {"loss": self._weighted(terms), **terms}

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        config = self.recipe.loss
        loss = (
            config.dino_weight * (terms["dino_global"] + terms["dino_local"]) + config.ibot_weight * terms[config.patch]
        )
        if config.regulariser != "none":
            loss = loss + config.regulariser_weight * terms[config.regulariser]
        return loss

    def loss(self, crops: Crops, masks: Masks, teacher_temp: float, kept: Sequence[Tensor] = ()) -> Tensor:
        """The loss of one micro-batch of crops, with masks of the global ones. Its terms go to `step_metrics`.

        kept: which crops of each size the student's residual branches see; empty: all.
        """
        teacher_cls, class_targets, patch_targets = self._targets(crops.global_, masks, teacher_temp)
        terms = self._terms(crops, masks, class_targets, patch_targets, kept)
        loss = self._weighted(terms)
        self.step_metrics |= {name: term.detach() for name, term in {"loss": loss, **terms}.items()}
        if self.is_logged(self.global_step + 1):
            self.step_metrics |= diagnostics.teacher_metrics(class_targets, teacher_cls)
        return loss

    @torch.no_grad()
    def _targets(self, crops: Tensor, masks: Masks, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of the global crops (2, B, 3, H, W): the teacher's class tokens, and its targets for class and masked tokens.

        They are (2·B, D), (2·B, K) and (masked patches, K), with regression (masked patches, D), view first.
        """
        (cls,), (class_logits,), patches = self.teacher([crops.flatten(0, 1)], [None], masks.position)
        class_targets = self._target("class_centre", class_logits, temperature)
        if self.recipe.loss.patch == "regression":
            return cls, class_targets, losses.regression_targets(patches)
        return cls, class_targets, self._target("patch_centre", patches, temperature)

    def _terms(
        self,
        crops: Crops,
        masks: Masks,
        class_targets: Tensor,
        patch_targets: Tensor,
        kept: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """The terms of the student's loss by name, without their weights."""
        config, hidden = self.recipe.loss, masks.hidden.flatten(0, 1)
        num_views, size = masks.hidden.shape[:2]
        images = [crops.global_.flatten(0, 1), crops.local.flatten(0, 1)][: 2 if len(crops.local) else 1]
        cls, class_logits, patches = self.student(
            images, [hidden, None][: len(images)], masks.position, kept, in_one_pass=self._few_kernels
        )
        global_logits, local_logits = (
            logits.unflatten(0, (-1, size)) for logits in (class_logits[0], class_logits[-1])
        )
        dino_global, dino_local = losses.dino_terms(
            global_logits,
            local_logits if len(images) > 1 else local_logits[:0],
            class_targets.unflatten(0, (num_views, size)),
            config.student_temp,
        )
        weights, num_crops = masks.weight, num_views * size
        if config.patch == "regression":
            patch = losses.regression_loss(patches, patch_targets, weights, num_crops)
        else:
            patch = losses.ibot_loss(patches, patch_targets, weights, num_crops, config.student_temp)
        terms = {"dino_global": dino_global, "dino_local": dino_local, config.patch: patch}
        if config.regulariser != "none":
            views = cls[0].unflatten(0, (num_views, size))
            terms[config.regulariser] = torch.stack([self._regulariser(view) for view in views]).sum()
        return terms

    def is_logged(self, step: int) -> bool:
        """Whether the metrics get a row for that step, counted from 1."""
        return step % self._log_every == 0 or step == self._steps

    def configure_model(self) -> None:
        """Makes the model ready for its ranks, once; Lightning calls this before the optimiser is made."""
        prepare, self._prepare = self._prepare, None
        if prepare is not None:
            for network in (self.student, self.teacher):
                prepare(network, self.device_mesh)
        fill, self._fill = self._fill, None
        if fill is not None:
            fill(self)

    def _target(self, centre: str, logits: Tensor, temperature: float) -> Tensor:
        """The teacher's targets (M, K) of its logits; in training with centring, the named centre then moves."""
        loss = self.recipe.loss
        if loss.centring == "sinkhorn":
            return losses.sinkhorn(logits, temperature)
        held = self.get_buffer(centre)
        targets = losses.centred(logits, held, temperature)
        if self.training:
            held.copy_(losses.moved_centre(held, logits, loss.centre_momentum))
        return targets

    def _regulariser(self, features: Tensor) -> Tensor:
        loss = self.recipe.loss
        if loss.regulariser == "koleo":
            return losses.koleo(features, over_ranks=loss.regulariser_over_ranks)
        return losses.kde(features, loss.kde_concentration, over_ranks=loss.regulariser_over_ranks)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the student; learning rates and weight decays are written before each step."""
        optim = self.recipe.optim
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
            norm = nn.utils.clip_grad_norm_(part.parameters(), self.recipe.optim.clip)
            self.step_metrics[f"grad_norm_{name}"] = _whole(norm.detach())

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
        learned = dict(self.student.named_parameters())
        names, held = zip(*self.teacher.named_parameters(), strict=True)
        average(list(held), [learned[name] for name in names], 0)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor that the shards of all ranks make up, on each; one that is not sharded as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
