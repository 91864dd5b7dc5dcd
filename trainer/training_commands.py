"""The commands that begin with a training's configuration: `tilestream train`, `sweep` and `capacity`."""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentTypeError, Namespace
from dataclasses import asdict, replace
from typing import Any

from streaming.command_line import (
    add_command,
    add_options,
    add_storage_options,
    folder,
    out,
    read_options,
    storage_options,
)
from streaming.errors import ConfigError
from streaming.operate.capacity import (
    Capacity,
    StageCosts,
    Surroundings,
    costs_of_size,
    costs_of_views,
    costs_on_blocks,
    costs_with_jpeg2000,
    costs_without_rule,
    plan_capacity,
    read_costs,
)
from trainer.configs import presets
from trainer.model_commands import add_scoring, scoring

_SHARES, _BOUNDS = "0.01,0.1,1.0", "100,1000,inf"

_REPLAYED = ("loss", "dino_global", "dino_local", "ibot", "regression", "koleo", "kde", "teacher_entropy", "rankme")


def add_train(commands: Any) -> None:
    """`tilestream train`."""
    parser = add_command(
        commands,
        "train",
        "train DINOv2 on tiles streamed from slides; a run found in run.out goes on",
        "  tilestream train vits14 --data.catalog s3://bucket/catalog --run.out s3://bucket/runs/a --train.ranks 4\n"
        "  tilestream train debug --data.catalog catalog --debug",
        run_train,
        extra="train",
    )
    parser.usage = "tilestream train CONFIG [--section.key value ...] [--dry-run] [--debug] [--fields] [--print_config]"
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=f"a YAML file or a preset: {', '.join(presets())}")
    parser.add_argument("--debug", action="store_true", help="reader and trainer in this one process, for a debugger")
    parser.add_argument("--force", action="store_true", help="go on by another recipe, or after a breakdown")
    parser.add_argument(
        "--profile", type=int, metavar="N", help="trace N steps of the first rank into the run's folder"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained and what it needs, and leave")
    parser.add_argument("--prices", metavar="YAML", help="of --dry-run: price list; deploy/prices.yaml is an example")
    parser.add_argument("--schedules", metavar="URI", help="of --dry-run: PNG of the schedules, drawn there")
    parser.add_argument("--fields", action="store_true", help="list all fields of the configuration and leave")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and leave")
    parser.set_defaults(takes_overrides=True)


def run_train(args: Namespace) -> None:
    """Trains, and says where the checkpoint lies.

    Raises:
        ConfigError: bad input, or no run can be written to run.out.
    """
    from trainer.run.config import config_parser, read_config

    if args.fields:
        return config_parser().print_help()
    if args.config is None:
        raise ConfigError(f"no CONFIG given; name a YAML file or a preset: {', '.join(presets())}")
    config = read_config(args.config, args.overrides)
    if args.print_config:
        return out(config.to_yaml().rstrip())
    from trainer.evaluate.knn_watch import KnnWatch

    if args.dry_run:
        from streaming.operate.prices import read_prices
        from trainer.run.dry_run import describe

        prices = read_prices(args.prices) if args.prices else None
        lines = describe(config, KnnWatch, prices=prices, schedules=args.schedules, formulae=args.verbose)
        for line in lines:
            out(line)
        return None
    from trainer.run.train import train

    try:
        folder(config.run.out)
    except ArgumentTypeError as error:
        raise ConfigError(f"run.out: {error}") from None
    if args.profile is not None and args.profile < 1:
        raise ConfigError(f"--profile {args.profile}: give a number of steps, at least 1")
    result = train(
        config,
        KnnWatch,
        debug=args.debug,
        verbose=args.verbose,
        force=args.force,
        profile_steps=args.profile or 0,
    )
    for line in result.summary:
        sys.stderr.write(line + "\n")
    out(f"trained steps {result.start} to {result.steps}: {result.checkpoint}")
    if result.steps < result.planned:
        sys.stderr.write(f"stopped before step {result.planned}; start the same command again to go on\n")
        sys.exit(143)


def add_replay(commands: Any) -> None:
    """`tilestream replay`."""
    parser = add_command(
        commands,
        "replay",
        "make a step of a run again: its tiles, crops and masks as pictures and tensors, and its losses",
        "  tilestream replay runs/first --step 1234\n"
        "  tilestream replay s3://bucket/runs/a --step 1234 --only-ranks 0 5 --out step-1234 --train.gpu false",
        run_replay,
        extra="train",
    )
    parser.usage = (
        "tilestream replay RUN --step N [--only-ranks R ...] [--no-losses] [--out URI] [--section.key value ...]"
    )
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="as metrics.parquet counts, from 1")
    parser.add_argument("--only-ranks", type=int, nargs="+", metavar="R", help="whose tiles are drawn, from 0 (all)")
    parser.add_argument("--no-losses", action="store_true", help="train nothing again")
    parser.add_argument("--out", type=folder, metavar="URI", help="folder of the files (RUN/replay/step-N)")
    add_storage_options(parser)
    parser.set_defaults(takes_overrides=True)


def run_replay(args: Namespace) -> None:
    """Writes the files, trains again, and prints the losses beside those that were logged."""
    from streaming import storage
    from trainer.run.checkpoints import read_config
    from trainer.run.config import changed
    from trainer.run.data import load_catalog
    from trainer.run.messages import Row
    from trainer.run.replay import find_replay, logged_row, train_again
    from trainer.show.replay_pages import write_replay

    run, options = storage.canonical(args.run_folder), storage_options(args)
    config = changed(read_config(run, options), args.overrides, options)
    replay = find_replay(run, args.step, config, options)
    folder = args.out or storage.join(run, "replay", f"step-{args.step:08d}")
    ranks = range(replay.config.train.most_ranks) if args.only_ranks is None else args.only_ranks
    for uri in write_replay(replay, load_catalog(config.data), ranks, folder):
        out(uri)
    if args.no_losses:
        return
    tell(f"replay: training steps {replay.start + 1} to {args.step} again, from {replay.checkpoint or 'the start'}")
    rows: list[Row] = []

    def arrived(row: Row) -> None:
        rows.append(row)
        tell(f"replay: step {row['step']:.0f}: loss {row['loss']:.6g}")

    trouble = train_again(replay, arrived)
    again, logged = (rows[-1] if rows else {}), logged_row(replay)
    if trouble and again.get("step") != args.step:
        logged = {}
    out(f"{'step ' + format(int(again.get('step', 0)), ','):<28}{'again':>14}{'logged':>14}")
    for name in (name for name in again if name in _REPLAYED or name.startswith("grad_norm_")):
        beside = f"{logged[name]:>14.6g}" if name in logged else f"{'–':>14}"
        same = "" if name not in logged else "  the same" if str(again[name]) == str(logged[name]) else "  DIFFERENT"
        out(f"{name:<28}{again[name]:>14.6g}{beside}{same}")
    if trouble:
        out(trouble)


def add_sweep(commands: Any) -> None:
    """`tilestream sweep`."""
    parser = add_command(
        commands,
        "sweep",
        "train on growing parts of the data, or by values of any field, score and draw; a sweep found in --out goes on",
        "  tilestream sweep vits14 --data.catalog s3://bucket/catalog --evaluate tiles.csv --out s3://bucket/sweep \\\n"
        "      --slides 0.01,0.1,1.0 --tiles-per-slide 100,1000,inf\n"
        "  tilestream sweep vits14 --data.catalog s3://bucket/catalog --evaluate tiles.csv --out corners \\\n"
        "      --over data.corners=anywhere,blocks --over train.flops=1e17,1e18 --seeds 0,1,2",
        run_sweep,
        extra="train",
    )
    parser.usage = "tilestream sweep CONFIG --evaluate DATASET --out URI [options] [--section.key value ...]"
    parser.add_argument("config", metavar="CONFIG", help=f"a YAML file or a preset: {', '.join(presets())}")
    parser.add_argument("--evaluate", required=True, metavar="DATASET", help="labelled tiles, as for `evaluate`")
    parser.add_argument(
        "--out", type=folder, required=True, metavar="URI", help="folder of the runs, sweep.parquet and sweep.png"
    )
    parser.add_argument("--slides", metavar="SHARES", help=f"of the slides ({_SHARES}; with --over, as configured)")
    bounds = f"distinct tiles of each ({_BOUNDS}; with --over, as configured)"
    parser.add_argument("--tiles-per-slide", metavar="N", help=bounds)
    over = "a field and its values, any number of times: data.mpp={0.5: 1},{uniform: [0.25, 2.0]}"
    parser.add_argument("--over", action="append", default=[], metavar="FIELD=VALUES", help=over)
    parser.add_argument("--seeds", default="", metavar="N", help="a run each, e.g. 0,1,2 (run.seed)")
    parser.add_argument("--debug", action="store_true", help="reader and trainer in this one process, for a debugger")
    add_scoring(parser.add_argument_group("how each run is scored"))
    parser.set_defaults(takes_overrides=True)


def run_sweep(args: Namespace) -> None:
    """Trains and scores the runs, and prints a line a score."""
    from trainer.run.config import read_config
    from trainer.sweep import PICTURE, SEED, SLIDES, TABLE, TILES, Axis, read_axis, score_lines, sweep

    config = read_config(args.config, args.overrides)
    shares, bounds = ("", "") if args.over else (_SHARES, _BOUNDS)
    of_data = {
        "--slides": (SLIDES, args.slides or shares),
        "--tiles-per-slide": (TILES, args.tiles_per_slide or bounds),
    }
    axes = [
        *(Axis(key=key, values=numbers(name, text), option=name) for name, (key, text) in of_data.items() if text),
        *map(read_axis, args.over),
        *([Axis(key=SEED, values=numbers("--seeds", args.seeds), option="--seeds")] if args.seeds else []),
    ]
    rows = sweep(config, axes, args.evaluate, args.out, scoring(args), debug=args.debug, tell=tell)
    if rows is None:
        sys.stderr.write("stopped; start the same command again to go on\n")
        sys.exit(143)
    for line in score_lines(rows, [axis.column for axis in axes]):
        out(line)
    out(f"{args.out}: {TABLE}, {PICTURE}")


def numbers(option: str, text: str) -> tuple[str, ...]:
    """Numbers between commas, as a configuration has them.

    Raises:
        ConfigError: one of them is none.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return tuple("null" if math.isinf(float(part)) else part for part in parts)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: give numbers between commas ({error})") from error


def tell(line: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"{line}\n")


def add_capacity(commands: Any) -> None:
    """`tilestream capacity`."""
    parser = add_command(
        commands,
        "capacity",
        "readers, nodes, requests, bytes and costs that it takes to feed some GPUs",
        "  tilestream capacity vits14 --gpus 64 --tiles-per-second-per-gpu 40 --latency-ms 30 --prices prices.yaml",
        run_capacity,
        extra="embed",
    )
    options = "[--gpus N] [--tiles-per-second-per-gpu R] [--prices YAML]"
    parser.usage = f"tilestream capacity CONFIG {options} [--section.key value ...]"
    parser.add_argument("config", metavar="CONFIG", help=f"a YAML file or a preset: {', '.join(presets())}")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs, one rank each (train.ranks)")
    rate = "what one trains on (an H100's, estimated by the configuration's FLOPs)"
    parser.add_argument("--tiles-per-second-per-gpu", type=float, metavar="R", help=rate)
    latency = {
        "flag": "--latency-ms",
        "type": milliseconds,
        "metavar": "MS",
        "help": f"from a request to the first byte of its answer ({Surroundings.latency_s * 1e3:g})",
    }
    add_options(
        parser,
        Surroundings,
        only=("latency_s", "requests_in_flight"),
        latency_s=latency,
        requests_in_flight={"metavar": "N"},
    )
    parser.add_argument(
        "--costs", metavar="JSON", help="measured costs of a tile; `tilestream bench scale` writes them"
    )
    parser.add_argument(
        "--jpeg2000", type=float, default=0.0, metavar="SHARE", help="share of tiles from JPEG 2000 slides (0)"
    )
    parser.add_argument("--prices", metavar="YAML", help="price list; deploy/prices.yaml is an example")
    parser.add_argument("--json", action="store_true", help="print all numbers for a machine")
    parser.set_defaults(takes_overrides=True)


def milliseconds(text: str) -> float:
    """Seconds of a number of milliseconds."""
    return float(text) / 1e3


def run_capacity(args: Namespace) -> None:
    """Prints what is needed, the first limit, and the bill."""
    from streaming.operate.prices import bill, read_prices
    from trainer.run.config import read_config
    from trainer.run.pace import GPU_TFLOPS, UTILISATION, tiles_per_second_per_gpu

    config = read_config(args.config, args.overrides)
    prices = read_prices(args.prices) if args.prices else None
    gpus = config.train.most_ranks if args.gpus is None else args.gpus
    rate, rate_from = args.tiles_per_second_per_gpu, "as given"
    if rate is None:
        if not config.train.gpu and args.gpus is None:
            raise ConfigError(
                f"{args.config}: it trains on CPUs (train.gpu), whose rate nobody knows beforehand; give "
                "--tiles-per-second-per-gpu, of each rank, or --gpus"
            )
        rate = tiles_per_second_per_gpu(config)
        rate_from = f"estimated: {UTILISATION:.0%} of the {GPU_TFLOPS:g} TFLOP/s of an H100; give what yours does"
    around = read_options(args, Surroundings)
    if prices:
        node = {"node_cores": prices.reader_node_cores, "node_nbytes_s": prices.reader_node_gbit_s / 8 * 1e9}
        around = replace(around, **node)
    size = config.data.tile_size
    tile = costs_of_size(read_costs(args.costs) if args.costs else StageCosts(), size)
    tile = costs_with_jpeg2000(tile, args.jpeg2000)
    if not config.data.hsv_rule.min_share:
        tile = costs_without_rule(tile)
    if config.data.corners == "blocks":
        tile = costs_on_blocks(tile, size)
    tile = costs_of_views(tile, config.data.num_views)
    capacity = plan_capacity(
        tile,
        gpus=gpus,
        tiles_per_second_per_gpu=rate,
        micro_batch=config.train.shape.micro,
        around=around,
    )
    costs = bill(capacity, gpus, prices) if prices else []
    tiles = config.train.steps * config.train.batch
    hours = tiles / capacity.tiles_s / 3600
    if args.json:
        run = {"gpus": gpus, "tiles": tiles, "hours": hours, "cost": hours * costs[-1].an_hour if costs else None}
        numbers = {**asdict(capacity), "holds": capacity.holds, "costs": [asdict(cost) for cost in costs], "run": run}
        return out(json.dumps(numbers, indent=2))
    bought = f", {hours * costs[-1].an_hour:,.0f} {prices.currency}" if prices else ""
    out(f"{'run':<27}{tiles / 1e6:,.1f} million tiles in {hours:,.1f} h{bought}")
    out(f"{'GPUs':<27}{gpus:,} of {rate:,.1f} tiles/s, {rate_from}")
    measured = (
        args.costs or "built in, measured on 2026-11-28 on two cores (benchmarks/RESULTS.md); --costs takes yours"
    )
    out(f"{'costs of a tile':<27}{measured}")
    for line in capacity_lines(capacity, around.node_cores):
        out(line)
    if prices:
        out(f"{'costs, ' + prices.currency:<27}{'an hour':>12}{'1M tiles':>12}")
        for cost in costs:
            out(f"  {cost.what:<25}{cost.an_hour:>12,.2f}{cost.a_million_tiles:>12,.3f}")
    out(capacity.sentence())


def capacity_lines(capacity: Capacity, node_cores: int) -> list[str]:
    """The numbers as a table, one a line."""
    rows = {
        "tiles/s": f"{capacity.tiles_s:,.0f}",
        "readers": f"{capacity.readers:,} of {capacity.reader_tiles_s:,.0f} tiles/s, bound by {capacity.reader_bound}",
        "reader nodes": f"{capacity.reader_nodes:,} of {node_cores} cores",
        "GETs/s": f"{capacity.requests_s:,.0f}",
        "bytes out of the storage": f"{capacity.nbytes_s / 1e9:,.2f} GB/s",
        "pixels to the trainers": f"{capacity.network_nbytes_s / 1e9:,.2f} GB/s",
        "object store, reader node": f"at least {capacity.reader_store_nbytes / 1e9:,.2f} GB",
        "object store, each rank": f"at least {capacity.rank_store_nbytes / 1e9:,.2f} GB",
    }
    return [f"{name:<27}{value}" for name, value in rows.items()]
