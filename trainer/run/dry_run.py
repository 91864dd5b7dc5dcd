"""What a configuration would do, told before anything starts: `tilestream train CONFIG --dry-run`."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from torch import nn

from streaming import storage
from streaming.operate.prices import Prices
from streaming.plan.footprints import Corners
from streaming.plan.magnifications import mpp_text
from trainer.recipe.augment import NUM_GLOBAL
from trainer.recipe.flops import step_flops
from trainer.recipe.losses import LOSS_NBYTES
from trainer.recipe.schedule import Schedules
from trainer.run import starting_weights
from trainer.run.after_step import ProbeKind
from trainer.run.config import Config
from trainer.run.data import load_catalog, make_plan
from trainer.run.execution import TrainConfig
from trainer.run.fit import bare_module, check_model
from trainer.run.fitted import fitted
from trainer.run.metrics_log import METRICS
from trainer.run.validation import held_out_stream

_GIB = 2**30
_RECENT = 20  # steps whose rate counts
_SAMPLE = 4096  # tiles of which is told what they cost
# Micro-batches of a rank that lie in Ray's object store: two prefetched, one being read, one in training.
_BATCHES_IN_STORE = 4
_PROCESS_NBYTES = 6 * 10**9
# Bytes that a block keeps per token and channel for the backward pass, at 16 bits and with attention that is not kept
# (Korthikanti et al., arXiv 2205.05198, section 4); and how many it keeps of the tensors that blocks hand on, which are
# of all crops, and without shards in full precision.
_KEPT_PER_CHANNEL, _HANDED_ON = 34, 3


@dataclass(frozen=True, kw_only=True)
class Size:
    """Parameters of the student; the teacher has as many."""

    backbone: int
    heads: int
    depth: int
    width: int
    patches: tuple[int, int]
    """of a global and of a local crop"""
    prefix_tokens: int

    @property
    def parameters(self) -> int:
        """Of backbone and heads."""
        return self.backbone + self.heads


def model_size(config: Config) -> Size:
    """Counts the parameters of a configuration's model without memory for them.

    Raises:
        ValueError: a model or crops that make no sense.
    """
    student = bare_module(config).student
    vit, patch_grid = student.backbone.vit, student.backbone.patch_grid
    large, small = (2 * (side,) for side in (config.augment.global_size, config.augment.local_size))

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    backbone = count(student.backbone)
    return Size(
        backbone=backbone,
        heads=count(student) - backbone,
        depth=len(vit.blocks),
        width=vit.embed_dim,
        patches=(math.prod(patch_grid(*large)), math.prod(patch_grid(*small))),
        prefix_tokens=vit.num_prefix_tokens,
    )


def memory(config: Config, size: Size) -> dict[str, tuple[float, str]]:
    """Bytes per rank by purpose, each with its formula."""
    train, augment = config.train, config.augment
    micro, half = train.shape.micro, train.precision.startswith("bf16")
    shards = train.shares
    held, of = size.parameters / shards, f"parameters{f' / {shards} ranks' if shards > 1 else ''}"
    tokens = micro * (
        NUM_GLOBAL * (size.patches[0] + size.prefix_tokens) + augment.num_local * (size.patches[1] + size.prefix_tokens)
    )
    wide = 1 if half else 2
    handed_on = _HANDED_ON * (2 if half and train.strategy == "fsdp" else 4)
    of_channel = _KEPT_PER_CHANNEL * wide * (1 - config.model.drop_path) + handed_on
    block = of_channel * size.width * tokens
    kept = f"({_KEPT_PER_CHANNEL * wide} × {1 - config.model.drop_path:g} + {handed_on}) × {size.width} channels"
    kept += f" × {tokens:,} tokens"
    if train.activation_checkpointing:
        blocks = 2 * wide * size.width * tokens * size.depth + block
        block_text = f"{2 * wide} × channels × tokens × {size.depth} blocks + {kept} of one block"
    else:
        blocks, block_text = block * size.depth, f"{kept} × {size.depth} blocks"
    masked = sum(config.mask.tokens_per_crop(size.patches[0])) * micro // config.mask.group_size
    with_logits = masked if config.loss.patch == "ibot" else 0
    rows = micro * (NUM_GLOBAL + augment.num_local) + with_logits
    targets = micro * NUM_GLOBAL + with_logits
    prototypes = config.model.num_prototypes
    # The student's logits and their gradient; targets in float32; and what a cross-entropy works with.
    at_once = 2 * min(LOSS_NBYTES, 4 * prototypes * rows)
    logits = prototypes * (4 * wide * rows + 4 * targets) + at_once
    samples, num_views = _BATCHES_IN_STORE * micro, config.data.num_views
    tiles = samples * num_views * config.data.tile_size**2 * 3
    of_views = f" of {num_views} views" if num_views > 1 else ""
    # A student that stays gathered is whole, in the precision of products.
    whole = 2 * wide * size.parameters if train.keeps_gathered else 0
    whole_text = f" + {2 * wide} × parameters, gathered" if whole else ""
    return {
        "weights": (4 * held + whole, f"4 × {of}{whole_text}"),
        "gradients": (4 * held, f"4 × {of}"),
        "optimiser": (8 * held, f"8 × {of}"),
        "teacher": (4 * held, f"4 × {of}"),
        "activations of blocks": (blocks, block_text),
        "activations of heads": (
            logits,
            (f"{prototypes:,} prototypes × ({4 * wide} × {rows:,} rows + 4 × {targets:,} targets) + {at_once:,}"),
        ),
        "tiles in object store": (
            tiles,
            f"{_BATCHES_IN_STORE} × {micro} tiles{of_views} × {config.data.tile_size}² × 3 (host)",
        ),
    }


@dataclass(frozen=True, kw_only=True)
class NodeRoom:
    """What a node of some ranks needs besides its GPUs, in bytes."""

    memory: int
    """of the host, without Ray's object store"""
    store: int
    """of Ray's object store"""
    weights: int
    """of the disk that HF_HOME lies on: the file that `model.init` names, where a hub has it"""


def room_of_node(config: Config, size: Size, ranks: int) -> NodeRoom:
    """The room for so many ranks of a configuration on one node.

    The most is needed while checkpoints are written: the first rank, or the ranks of the first replica together, hold a
    copy of the state, 16 bytes a parameter (weights, teacher, two moments), and another one where the next is due
    before the first lies in storage. What a process of torch and CUDA takes by itself is an estimate.
    """
    tiles, _ = memory(config, size)["tiles in object store"]
    init = config.model.init or ""
    from_hub = init and "/" not in init and not init.endswith(starting_weights.FILES)
    return NodeRoom(
        memory=2 * 16 * size.parameters + ranks * _PROCESS_NBYTES,
        store=round(tiles) * ranks,
        weights=4 * size.backbone if from_hub else 0,
    )


def describe(
    config: Config,
    probe: ProbeKind | None = None,
    *,
    prices: Prices | None = None,
    schedules: str | None = None,
    formulae: bool = False,
) -> Iterator[str]:
    """A screen of lines that say what a run would do, and that the catalog can give it.

    Nothing is written, but a picture of the schedules where `schedules` says so. formulae tells how the memory is
    estimated.

    Raises:
        ConfigError, ValueError: a model, crops or schedules that make no sense.
        CatalogError, PlanError: no catalog, or one that can't give what is asked for.
        CheckpointError, StorageError: weights of `model.init` that don't fit, or no such file.
    """
    config, said = fitted(config)
    check_model(config, resumed=True)
    size, flops = model_size(config), step_flops(config.recipe, config.train.batch)
    train = config.train
    yield from said
    crops = f"{config.augment.global_size} and {config.augment.local_size} px"
    yield f"model         {config.model.backbone}, crops of {crops}"
    yield f"student       {size.backbone:,} parameters in the backbone, {size.heads:,} in the heads; the teacher alike"
    yield f"steps         {train.steps:,} optimiser steps of {train.batch:,} tiles: {_cut(train)}"
    fewer = [config.on(number).train for number in config.possible_ranks[:-1]]
    for part in fewer:
        yield f"              or {_cut(part)}, where there is no room for more"
    yield (
        f"FLOPs         {train.steps * flops.total:.3g} = {train.steps:,} steps × {flops.total:.3g}: "
        f"student, forward and backward, {flops.student:.3g}, teacher {flops.teacher:.3g}"
    )
    views = f", each of {config.data.num_views} views" if config.data.views else ""
    yield f"tiles seen    {train.steps * train.batch:,} of {config.data.tile_size} px{views}"
    least, most = config.data.readers
    yield f"readers       {least} to {most}, of {config.data.reader_cpus:g} CPU each"
    yield from _memory_lines(memory(config, size), formulae=formulae)
    first, other = (room_of_node(config, size, ranks).memory / _GIB for ranks in (1, 2))
    yield f"on the host   {first:.2f} GiB the first rank, {other - first:.2f} each other, while it saves"
    yield from _time_lines(config, prices)
    if schedules is not None:
        drawn = draw(Schedules(config.optim, train.steps, train.batch))
        storage.write_bytes(schedules, drawn, config.data.storage_options)
        yield f"schedules     {schedules}"
    if config.model.init:
        yield f"model.init    {_init_line(config)}"
    yield from _catalog_lines(config)
    if config.watch.knn_dataset and probe is not None:
        yield f"knn           {probe.check(config):,} tiles of {config.watch.knn_dataset}"


def _memory_lines(estimate: dict[str, tuple[float, str]], *, formulae: bool) -> Iterator[str]:
    on_device = {name: nbytes for name, (nbytes, _) in estimate.items() if "object store" not in name}
    parts = ", ".join(f"{name} {nbytes / _GIB:.2f}" for name, nbytes in on_device.items())
    yield f"memory        {sum(on_device.values()) / _GIB:.2f} GiB a rank, an estimate: {parts}"
    if formulae:
        for name, (nbytes, formula) in estimate.items():
            yield f"  {name:<21} {nbytes / _GIB:8.2f} GiB a rank = {formula} bytes"


def _time_lines(config: Config, prices: Prices | None) -> Iterator[str]:
    """How long it takes, and what that costs, at the rate that the run itself had."""
    train, options = config.train, config.data.storage_options
    metrics = storage.join(config.run.out, METRICS)
    if not storage.exists(metrics, options):
        yield "time          not known before it runs; `tilestream capacity` reckons with a rate"
        return
    table = storage.read_table(metrics, options)
    done, rate = int(table["step"][-1].as_py()), float(np.median(table["tiles_per_s"].to_numpy()[-_RECENT:]))
    left = max(0, train.steps - done)
    hours = left * train.batch / rate / 3600
    line = f"time          {hours:,.1f} h for {left:,} steps more, at the {rate:,.0f} tiles/s of {metrics}"
    if prices is not None and train.gpu:
        line += f": {hours * train.most_ranks * prices.gpu_hour:,.0f} {prices.currency} of GPUs"
    yield line


def _cut(train: TrainConfig) -> str:
    return f"{train.most_ranks} ranks × {train.shape.micro} tiles × {train.accumulate} rounds, {train.strategy}"


def _init_line(config: Config) -> str:
    """A first stage may still be under way: that a run has no checkpoint yet is told, not refused."""
    source = config.model.init or ""
    if starting_weights.is_awaited(source, config.data.storage_options):
        return f"{source}: no checkpoint there yet; the run would not start"
    check_model(config)
    return f"{source}: its names and shapes fit"


def _catalog_lines(config: Config) -> Iterator[str]:
    data = config.data
    if data.catalog is None:
        yield "catalog       none given, so not checked that it has the magnifications; add --data.catalog URI"
        return
    catalog = load_catalog(data)
    plan = make_plan(data, config.run.seed, catalog, config.held_out)
    for corners in get_args(Corners):
        of_corners = plan
        if corners != data.corners:
            if data.tiles is not None:
                continue
            of_corners = make_plan(replace(data, corners=corners), config.run.seed, catalog, config.held_out)
        costs = of_corners.block_costs(np.arange(_SAMPLE))
        taken = ", as is set" if corners == data.corners else ""
        if costs is not None:
            yield f"{corners:<13} {costs.line()}{taken}"
    if data.tiles is None:
        given = f"its {len(catalog)} slides give {data.tile_size} px tiles at {mpp_text(data.drawn_mpp)} µm/px"
    else:
        (slides, patients), num = plan.drawn_from, plan.num_tiles or 0
        given = f"{data.tiles} lists {num:,} tiles on {slides:,} slides of {patients:,} patients"
    yield f"catalog       {data.catalog}: {given}"
    for line in plan.mix_lines():
        yield f"              {line}"
    if config.held_out:
        num_slides, num_patients = held_out_stream(config, catalog).plan.drawn_from
        yield f"held out      {num_slides} slides of {num_patients} patients, for the loss on them"


def draw(schedules: Schedules, num_points: int = 500) -> bytes:
    """A PNG of the learning rate, weight decay, momentum and teacher temperature over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    total = schedules.run_steps
    steps = sorted({round(i * (total - 1) / (num_points - 1)) for i in range(num_points)})
    values = [schedules.at(step) for step in steps]
    panels = ("lr", "learning rate"), ("weight_decay", "weight decay"), ("momentum", "teacher's momentum")
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for ax, (name, title) in zip(axes.flat, (*panels, ("teacher_temp", "teacher's temperature")), strict=True):
        ax.plot(steps, [getattr(value, name) for value in values], color="#30638e")
        ax.set(title=title, xlabel="optimiser step", xlim=(0, total))
        ax.grid(alpha=0.3)
    last_layer = [value.last_layer_lr for value in values]
    axes[0, 0].plot(steps, last_layer, "--", color="#d1495b", label="heads' last layers")
    axes[0, 0].legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    plt.close(figure)
    return picture.getvalue()
