"""How fast a training step and the augmentation are, against others, in this run: `tilestream bench trainer`.

ViT-S/14 in float32, 2×224 + 8×98 px crops, the forward and backward pass of student and teacher. Each contender is a
process of its own; they take turns on the same crops and masks, and the median of several turns counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.table import TURNS, Line, line, memory_mib, report

GLOBAL_PX, LOCAL_PX, NUM_LOCAL, PATCH, TILE_PX = 224, 98, 8, 14, 256
PROTOTYPES, DROP_PATH, TEACHER_TEMP = 65536, 0.1, 0.05
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Inputs:
    """What all contenders are given: crops (2B, 3, g, g) and (8B, 3, l, l), masks bool (2B, N), view first."""

    global_: Tensor
    local: Tensor
    masks: Tensor

    @property
    def batch(self) -> int:
        """Tiles."""
        return len(self.global_) // 2


def our_step(inputs: Inputs, *, one_pass: bool = False) -> Step:
    """Our module; with `one_pass`, crops of both sizes go through its backbone together on a CPU, too."""
    from trainer.recipe.augment import Crops
    from trainer.recipe.masks import located
    from trainer.recipe.stochastic_depth import kept_crops
    from trainer.run.config import read_config
    from trainer.run.fit import make_module

    overrides = ["--model.drop_path", str(DROP_PATH), "--train.batch", str(inputs.batch)]
    overrides += ["--mask.group_size", str(min(inputs.batch, 4))]
    module = make_module(read_config("vits14", overrides), few_kernels=one_pass)
    crops = Crops(inputs.global_.unflatten(0, (2, -1)), inputs.local.unflatten(0, (NUM_LOCAL, -1)))
    masks, index = located(inputs.masks.unflatten(0, (2, -1))), torch.arange(inputs.batch)
    branches = module.student.backbone.num_branches

    def step() -> Tensor:
        module.zero_grad()
        kept = [kept_crops(index, views, branches, DROP_PATH, 0) for views in (range(2), range(2, 2 + NUM_LOCAL))]
        return module.loss(crops, masks, TEACHER_TEMP, kept)

    return step


def reference_step(inputs: Inputs, folder: str) -> Step:
    """The published implementation's modules and losses, in the order of its `forward_backward`.

    Its list form of two crop sizes needs kernels for GPUs: here the backbone sees one size after the other.
    """
    os.environ["XFORMERS_DISABLED"] = "1"
    sys.path.insert(0, folder)
    from dinov2.layers import DINOHead
    from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
    from dinov2.models.vision_transformer import vit_small

    store = tempfile.mktemp()
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    options = {"patch_size": PATCH, "img_size": GLOBAL_PX, "init_values": 1e-5, "block_chunks": 0}

    def network(drop_path: float) -> nn.ModuleDict:
        backbone = vit_small(**options, drop_path_rate=drop_path, drop_path_uniform=True)
        return nn.ModuleDict({"backbone": backbone, "head": DINOHead(384, PROTOTYPES)})

    student, teacher = network(DROP_PATH).train(), network(0.0).requires_grad_(False)
    dino, ibot, koleo = DINOLoss(PROTOTYPES), iBOTPatchLoss(PROTOTYPES), KoLeoLoss()
    indices = inputs.masks.flatten().nonzero().flatten()
    per_crop = inputs.masks.sum(-1).clamp(min=1)[:, None]
    weights, batch = (1 / per_crop).expand_as(inputs.masks)[inputs.masks], inputs.batch

    def masked(output: dict[str, Tensor]) -> Tensor:
        return output["x_norm_patchtokens"].flatten(0, 1).index_select(0, indices)

    def targets() -> tuple[Tensor, Tensor]:
        seen = teacher["backbone"](inputs.global_, is_training=True)
        swapped = torch.cat(seen["x_norm_clstoken"].chunk(2)[::-1])
        logits = teacher["head"](torch.cat([swapped, masked(seen)]))
        count = torch.full((1,), len(indices))
        first = dino.sinkhorn_knopp_teacher(logits[: len(swapped)], TEACHER_TEMP)
        second = ibot.sinkhorn_knopp_teacher(logits[len(swapped) :], TEACHER_TEMP, n_masked_patches_tensor=count)
        return first.view(2, batch, -1), second

    def step() -> Tensor:
        student.zero_grad()
        with torch.no_grad():
            class_targets, patch_targets = targets()
        large = student["backbone"](inputs.global_, masks=inputs.masks, is_training=True)
        small = student["backbone"](inputs.local, is_training=True)
        parts = [small["x_norm_clstoken"], large["x_norm_clstoken"], masked(large)]
        local, global_, patches = student["head"](torch.cat(parts)).split([len(part) for part in parts])
        terms = 2 + 2 * NUM_LOCAL
        loss = dino(local.chunk(NUM_LOCAL), class_targets) / terms
        loss = loss + dino([global_], [class_targets.flatten(0, 1)]) * 2 / terms
        loss = loss + 0.1 * sum(koleo(view) for view in large["x_norm_clstoken"].chunk(2))
        return loss + ibot.forward_masked(patches, patch_targets, student_masks_flat=inputs.masks, masks_weight=weights)

    return step


def lightly_step(inputs: Inputs) -> Step:
    """Lightly's modules and losses, put together as in its DINOv2 example, with a patch of 14 px."""
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import update_drop_path_rate
    from timm.models.vision_transformer import VisionTransformer

    def backbone() -> Any:
        vit = VisionTransformer(
            img_size=GLOBAL_PX, patch_size=PATCH, embed_dim=384, depth=12, num_heads=6, num_classes=0,
            dynamic_img_size=True, init_values=1e-5,
        )  # fmt: skip
        return MaskedVisionTransformerTIMM(vit=vit, antialias=False, pos_embed_initialization="skip")

    student, teacher = backbone().train(), backbone().eval().requires_grad_(False)
    update_drop_path_rate(student.vit, drop_path_rate=DROP_PATH, mode="uniform")
    student_head = DINOv2ProjectionHead(input_dim=384)
    teacher_head = DINOv2ProjectionHead(input_dim=384).eval().requires_grad_(False)
    dino, ibot, koleo = DINOLoss(), IBOTPatchLoss(), KoLeoLoss()
    mask = torch.cat([torch.zeros(len(inputs.masks), 1, dtype=torch.bool), inputs.masks], dim=1)
    side = GLOBAL_PX // PATCH
    block_mask = inputs.masks.view(-1, side, side)

    def step() -> Tensor:
        student.zero_grad()
        student_head.zero_grad()
        with torch.no_grad():
            seen = teacher.encode(inputs.global_)
            class_logits, patch_logits = teacher_head(seen[:, 0]), teacher_head(seen[mask])
        large = student.encode(inputs.global_, mask=mask)
        outputs = torch.cat([student_head(large[:, 0]), student_head(student.encode(inputs.local)[:, 0])])
        loss = dino(class_logits.chunk(2), outputs.chunk(2 + NUM_LOCAL), teacher_temp=TEACHER_TEMP)
        loss = loss + ibot(patch_logits, student_head(large[mask]), mask=block_mask, teacher_temp=TEACHER_TEMP)
        return loss + 0.1 * sum(koleo(view) for view in large[:, 0].chunk(2))

    return step


def torchvision_pipeline(tensors: bool) -> Callable[[Any], list[Tensor]]:
    """The reference's transforms of one sample with the same probabilities as ours.

    By torchvision's first transforms on PIL images, as the reference does, or by the second ones on tensors.
    """
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode, v2

    tv: Any = v2 if tensors else transforms

    def view(size: int, scale: tuple[float, float], blur: float) -> Any:
        cut = [tv.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC)]
        cut += [tv.RandomHorizontalFlip(), tv.RandomVerticalFlip()]
        colour = [
            tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            tv.RandomGrayscale(0.2),
            tv.RandomApply([tv.GaussianBlur(9, (0.1, 2.0))], p=blur),
        ]
        # On tensors, all but the cut is fastest in float32.
        as_float = [tv.ToDtype(torch.float32, scale=True)] if tensors else [tv.ToTensor()]
        steps = [*cut, *as_float, *colour] if tensors else [*cut, *colour, *as_float]
        return tv.Compose([*steps, tv.Normalize((0.5,) * 3, (0.5,) * 3)])

    views = [view(GLOBAL_PX, (0.32, 1.0), blur) for blur in (0.0, 0.9)]
    views += [view(LOCAL_PX, (0.05, 0.32), 0.5)] * NUM_LOCAL
    return lambda image: [one(image) for one in views]


def tiles(num: int) -> Tensor:
    """Smooth coloured tiles, uint8 (n, TILE_PX, TILE_PX, 3)."""
    noise = torch.rand(num, 3, TILE_PX // 8, TILE_PX // 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, size=TILE_PX, mode="bilinear") * 255
    return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def augmentation(batch: int, whose: str) -> Callable[[], Any]:
    """A whole batch's crops: by our batched augmentation, or sample by sample by torchvision."""
    pictures = tiles(batch)
    if whose != "ours":
        from PIL import Image

        pipeline, images = torchvision_pipeline(whose == "tensors"), list(pictures.permute(0, 3, 1, 2))
        if whose == "pil":
            images = [Image.fromarray(tile.numpy()) for tile in pictures]
        return lambda: [pipeline(image) for image in images]
    from trainer.recipe.augment import Augmentation

    return partial(Augmentation().multi_crop, pictures, torch.arange(batch), 0)


def serve_turns(work: Callable[[], Any], threads: int) -> None:
    """A contender's process: does the work once for each line it reads, and writes what it took."""
    torch.set_num_threads(threads)
    idle_mb = memory_mib("VmRSS")
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        if isinstance(result, Tensor):
            result.backward()
        spent = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        del result
        sys.stdout.write(json.dumps(spent | {"peak_mb": memory_mib("VmHWM") - idle_mb}) + "\n")
        sys.stdout.flush()


def run_worker(args: argparse.Namespace) -> None:
    """What a contender's process does."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if args.worker.startswith("augment"):
        return serve_turns(augmentation(args.batch, args.worker.removeprefix("augment-")), args.threads)
    inputs = Inputs(**torch.load(args.inputs))
    steps: dict[str, Callable[[], Step]] = {
        "ours": lambda: our_step(inputs),
        "one-pass": lambda: our_step(inputs, one_pass=True),
        "reference": lambda: reference_step(inputs, args.reference),
        "lightly": lambda: lightly_step(inputs),
    }
    serve_turns(steps[args.worker](), args.threads)


class Contender:
    """A process that takes a turn when asked."""

    def __init__(self, name: str, python: str, args: argparse.Namespace, inputs: Path, threads: int) -> None:
        command = [python, "-m", "benchmarks.trainer", "--worker", name, "--inputs", str(inputs)]
        command += ["--batch", str(args.batch)]
        command += ["--threads", str(threads), "--reference", str(args.reference or "")]
        from trainer.run.ranks_on_ray import RANK_ENVIRONMENT

        # For all alike, what our ranks get: large pages among it.
        own = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", **RANK_ENVIRONMENT}
        self.name, self.turns = name, list[dict[str, float]]()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | own
        )

    def turn(self) -> dict[str, float]:
        """One turn's seconds and megabytes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name}: its process ended; what it said stands above")
        return json.loads(answer)

    def median(self, field: str) -> float:
        """Over the turns that count."""
        return statistics.median(turn[field] for turn in self.turns)

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def take_turns(contenders: Sequence[Contender], turns: int) -> dict[str, Contender]:
    """One turn each to warm up, then alternating."""
    try:
        for number in range(turns + 1):
            for contender in contenders:
                spent = contender.turn()
                sys.stderr.write(f"{contender.name}: {spent['wall_s']:.2f} s, CPU {spent['cpu_s']:.2f} s\n")
                contender.turns += [spent] if number else []
    finally:
        for contender in contenders:
            contender.stop()
    return {contender.name: contender for contender in contenders}


def lightly_python(folder: Path) -> str:
    """The Python of an environment with lightly, made on demand; torch and timm are this one's."""
    python = folder / "bin" / "python"
    if not python.exists():
        sys.stderr.write(f"installing lightly into {folder}\n")
        venv.create(folder, with_pip=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(str(Path(torch.__file__).parents[1]))
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--no-deps", "lightly==1.6.*", "lightly_utils"], check=True
        )
    return str(python)


def make_inputs(batch: int, path: Path) -> None:
    """The crops and masks that all are given."""
    from trainer.recipe.masks import Masking, block_masks

    side = GLOBAL_PX // PATCH
    masks = block_masks(torch.arange(batch), (side, side), Masking(group_size=min(batch, 4)), 0).flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    crops = [
        torch.randn(num * batch, 3, size, size, generator=generator)
        for num, size in ((2, GLOBAL_PX), (NUM_LOCAL, LOCAL_PX))
    ]
    torch.save({"global_": crops[0], "local": crops[1], "masks": masks}, path)


def measure(args: argparse.Namespace) -> list[Line]:
    """All lines of the table."""
    inputs = Path(tempfile.mkdtemp(), "inputs.pt")
    make_inputs(args.batch, inputs)
    python, clock = sys.executable, f"{args.clock}_s"
    names = {"ours": python, "one-pass": python}
    names |= {"reference": python} if args.reference else {}
    names |= {} if args.no_lightly else {"lightly": lightly_python(args.folder / "lightly")}
    found = take_turns([Contender(n, p, args, inputs, args.threads) for n, p in names.items()], args.turns)
    ours, lines = found.pop("ours"), list[Line]()
    for name, other in found.items():
        most = 1.0 if name != "one-pass" else 0
        what = {"one-pass": "ours, both crop sizes in one pass"}.get(name, name)
        lines.append(line(f"step / {what}", ours.median(clock), other.median(clock), "s", most=most))
        lines.append(line(f"peak of a step / {what}", ours.median("peak_mb"), other.median("peak_mb"), "MB"))
    # One thread each: per core, since torchvision's way is to give each core a process.
    ways = [Contender(f"augment-{n}", python, args, inputs, 1) for n in ("pil", "tensors", "ours")]
    crops = take_turns(ways, args.turns + 2)
    pil, tensors, own = (1000 * crop.median("cpu_s") / args.batch for crop in crops.values())
    for theirs, what in ((pil, "PIL images"), (tensors, "tensors")):
        what = f"torchvision's augmentation of {what} on one core / ours, per tile"
        lines.append(line(what, theirs, own, "ms", least=3.0))
    step_cpu = 1000 * ours.median("cpu_s") / args.batch
    lines.append(line("our augmentation / our step, CPU per tile", own, step_cpu, "ms"))
    return [*lines, data_wait(args)] if args.wait_steps else lines


def data_wait(args: argparse.Namespace) -> Line:
    """What a rank on one core waits for tiles that a reader on another one streams, after the first step."""
    from benchmarks.common import made_catalog, made_slides
    from streaming import storage
    from trainer.run.config import read_config
    from trainer.run.train import train

    catalog = made_catalog([str(path) for path in made_slides(args.folder, 2)])
    with tempfile.TemporaryDirectory() as out:
        overrides = ["--data.catalog", catalog.uri, "--run.out", out, "--run.loggers", "[]", "--data.readers", "[1,1]"]
        overrides += ["--train.steps", str(args.wait_steps + 1), "--train.batch", str(args.batch)]
        overrides += ["--train.log_every", "1", "--optim.warmup_steps", "1"]
        overrides += ["--mask.group_size", str(min(args.batch, 4))]
        if not torch.cuda.is_available():
            overrides += ["--train.gpu", "false", "--train.rank_cpus", "1", "--train.precision", "32-true"]
        train(read_config("vits14", overrides))
        rows = storage.read_table(f"{out}/metrics.parquet").to_pylist()[1:]
    step_s = [args.batch / row["tiles_per_s"] for row in rows]
    waited_s = [row["data_wait_share"] * seconds for row, seconds in zip(rows, step_s, strict=True)]
    what = f"data wait of ViT-S on one core, a reader on another / its step, mean of {len(rows)} steps"
    return line(what, statistics.mean(waited_s), statistics.mean(step_s), "s", most=0.05)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 where a ratio does not hold."""
    parser = argparse.ArgumentParser(prog="tilestream bench trainer", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--reference", type=str, help="folder of a clone of the reference DINOv2; none: left out")
    parser.add_argument("--no-lightly", action="store_true", help="leave lightly out (else it is installed apart)")
    parser.add_argument("--batch", type=int, default=8, help="tiles of a step (8)")
    parser.add_argument("--threads", type=int, default=2, help="threads of a step (2)")
    parser.add_argument("--turns", type=int, default=TURNS, help=f"turns that count ({TURNS})")
    parser.add_argument("--wait-steps", type=int, default=5, help="steps whose wait for data is measured (5); 0: none")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="which seconds (wall); cpu when loaded"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir(), "tilestream-bench"), help="where lightly is kept"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--inputs", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        run_worker(args)
        return 0
    lines = measure(args)
    how = f"batch {args.batch}, {args.threads} threads, {args.clock} clock"
    return report(lines, args.json, turns=args.turns, torch=torch.__version__, how=how)


if __name__ == "__main__":
    sys.exit(main())
