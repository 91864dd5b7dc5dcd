"""The command line: `tilestream COMMAND …`. Exit status 0, 2 for bad input (one line says which), 1 for the rest."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, fields, replace
from typing import Any

from streaming.capacity import Capacity
from streaming.cli import (
    OneLineParser,
    add_bench,
    add_catalog,
    add_command,
    add_doctor,
    add_storage_options,
    add_stream,
    out,
    pair,
    storage_options,
)
from streaming.errors import ConfigError, TilestreamError, root_cause
from trainer.configs import presets


def add_demo(commands: Any) -> None:
    """`tilestream demo`."""
    parser = add_command(
        commands,
        "demo",
        "make slides, catalog, train, embed and report, in minutes on this machine",
        "  tilestream demo --out demo-output",
        run_demo_command,
    )
    parser.add_argument("--out", default="demo-output", metavar="FOLDER", help="where all of it goes (demo-output)")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps (60)")


def run_demo_command(args: Namespace) -> None:
    """Runs the demo."""
    from trainer.demo import run_demo

    run_demo(args.out, steps=args.steps)


def add_train(commands: Any) -> None:
    """`tilestream train`."""
    parser = add_command(
        commands,
        "train",
        "train DINOv2 on tiles streamed from slides; a run found in run.out goes on",
        "  tilestream train vits14 --data.catalog s3://bucket/catalog --run.out s3://bucket/runs/a --train.ranks 4\n"
        "  tilestream train debug --data.catalog catalog --debug",
        run_train,
    )
    parser.usage = "tilestream train CONFIG [--section.key value ...] [--dry-run] [--debug] [--fields] [--print_config]"
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=f"a YAML file or a preset: {', '.join(presets())}")
    parser.add_argument("--debug", action="store_true", help="reader and trainer in this one process, for a debugger")
    parser.add_argument("--force", action="store_true", help="go on with a run by another recipe than it began with")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained and what it needs, and leave")
    parser.add_argument("--fields", action="store_true", help="list all fields of the configuration and leave")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and leave")
    parser.set_defaults(takes_overrides=True)


def run_train(args: Namespace) -> None:
    """Trains, and says where the checkpoint lies."""
    from trainer.config import config_parser, read_config

    if args.fields:
        return config_parser().print_help()
    if args.config is None:
        raise ConfigError(f"no CONFIG given; name a YAML file or a preset: {', '.join(presets())}")
    config = read_config(args.config, args.overrides)
    if args.print_config:
        return out(config.to_yaml().rstrip())
    if args.dry_run:
        from trainer.preview import describe

        for line in describe(config):
            out(line)
        return None
    from trainer.train import train

    result = train(config, debug=args.debug, verbose=args.verbose, force=args.force)
    for line in result.summary:
        sys.stderr.write(line + "\n")
    out(f"trained steps {result.start} to {result.steps}: {result.checkpoint}")
    if result.steps < config.train.steps:
        sys.stderr.write(f"stopped before step {config.train.steps}; start the same command again to go on\n")
        sys.exit(143)


def add_embed(commands: Any) -> None:
    """`tilestream embed`."""
    parser = add_command(
        commands,
        "embed",
        "embed every tissue tile of slides, a file a slide",
        "  tilestream embed s3://bucket/runs/a s3://bucket/slides --out s3://bucket/embeddings --token cls+patch\n"
        "  tilestream embed vit_small_patch14_dinov2.lvd142m slides --out features --format h5 --gpu --precision bf16",
        run_embed,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run or one of its checkpoints/step-…, an export, or a timm model"
    )
    parser.add_argument("slides", nargs="+", metavar="SLIDES", help="files, folders, globs, s3:// (or other) prefixes")
    parser.add_argument("--out", required=True, metavar="URI", help="folder of the files; done slides stay")
    parser.add_argument(
        "--format", choices=("parquet", "h5"), default="parquet", help="h5: HDF5 as CLAM and TRIDENT read it"
    )
    parser.add_argument("--mpp", type=float, default=0.5, help="µm/px of the tiles (0.5)")
    parser.add_argument("--size", type=int, default=256, help="side of a tile in px (256)")
    parser.add_argument("--min-tissue", type=float, default=0.4, help="share that must be tissue (0.4)")
    parser.add_argument(
        "--token", choices=("cls", "patch", "cls+patch"), default="cls", help="class token, mean patch token, both"
    )
    parser.add_argument("--tokens", action="store_true", help="keep all patch tokens too (float16), for segmentation")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32", help="bf16: products in bfloat16")
    parser.add_argument("--batch", type=int, default=64, help="tiles that the model sees at once (64)")
    parser.add_argument("--readers", type=pair, default=(1, 2), metavar="MIN:MAX", help="reader actors (1:2)")
    parser.add_argument("--models", type=int, default=1, help="actors that hold the model (1)")
    parser.add_argument("--model-cpus", type=int, default=1, help="CPU slots and threads of each (1)")
    parser.add_argument("--gpu", action="store_true", help="each of them takes a GPU")
    parser.add_argument("--slide-mpp", type=float, metavar="µm/px", help="level-0 mpp of slides that have none")
    add_storage_options(parser)


def run_embed(args: Namespace) -> None:
    """Embeds, and says what became of the slides."""
    from streaming import storage
    from trainer.embed import REJECTED, EmbedOptions, embed

    options = EmbedOptions(**{entry.name: getattr(args, entry.name) for entry in fields(EmbedOptions)})
    report = embed(args.checkpoint, args.slides, args.out, options, storage_options(args), verbose=args.verbose)
    for entry in report.rejected[:5]:
        sys.stderr.write(f"rejected: {entry.slide}: {entry.reason}\n")
    rejected = f"{len(report.rejected)} rejected"
    if report.rejected:
        rejected += f" (reasons in {storage.join(args.out, REJECTED)})"
    done = f"{report.tiles:,} tiles of {report.slides} slides embedded"
    out(f"{args.out}: {done}, {report.skipped} slides done before, {rejected}")


def add_evaluate(commands: Any) -> None:
    """`tilestream evaluate`."""
    parser = add_command(
        commands,
        "evaluate",
        "score a model's embeddings on labelled data, with confidence intervals over patients or slides",
        "  tilestream evaluate runs/first tiles.csv --task knn linear --out scores\n"
        "  tilestream evaluate vit_small_patch14_dinov2.lvd142m images-by-class",
        run_evaluate,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run, an exported folder, a name of timm's hub; embeddings for slides",
    )
    parser.add_argument("dataset", metavar="DATASET", help="a folder of images by class, a .csv or a .parquet file")
    parser.add_argument(
        "--task",
        nargs="+",
        metavar="TASK",
        default=[],
        help="knn, linear, logistic, quality; slide; segmentation; detection",
    )
    parser.add_argument("--out", metavar="URI", help="folder of scores.parquet and scores.json")
    parser.add_argument(
        "--token", choices=("cls", "patch", "cls+patch"), help="class token, mean patch token, both (cls)"
    )
    parser.add_argument("--k", type=int, default=20, help="neighbours (20)")
    parser.add_argument("--steps", type=int, default=12500, help="of the linear probe (12500)")
    parser.add_argument("--epochs", type=int, default=20, help="of attention MIL and of decoders (20)")
    parser.add_argument("--radius", type=float, default=12, metavar="PX", help="within which a point is found (12)")
    parser.add_argument("--folds", type=int, default=5, help="of the cross-validation, where there is no split (5)")
    parser.add_argument("--seed", type=int, default=0, help="of folds, probes and resamples (0)")
    parser.add_argument("--batch", type=int, default=64, help="tiles that the model sees at once (64)")
    parser.add_argument("--resize", type=int, metavar="PX", help="side that tiles are resized to")
    parser.add_argument("--mpp", type=float, default=0.5, help="µm/px of tiles cut from annotated slides (0.5)")
    parser.add_argument("--size", type=int, default=256, help="side of these tiles in px (256)")
    parser.add_argument("--slide-mpp", type=float, metavar="µm/px", help="level-0 mpp of slides that have none")
    parser.add_argument("--gpu", action="store_true", help="run the model on a GPU")
    add_storage_options(parser)


def run_evaluate(args: Namespace) -> None:
    """Scores, and prints the table."""
    from trainer.evaluate.annotations import TileGrid
    from trainer.evaluate.run import EvaluateOptions, evaluate, table_lines

    names = ("token", "k", "steps", "epochs", "radius", "folds", "seed", "batch", "resize", "gpu")
    options = EvaluateOptions(
        tasks=tuple(args.task),
        grid=TileGrid(mpp=args.mpp, size=args.size, slide_mpp=args.slide_mpp),
        **{name: getattr(args, name) for name in names},
    )
    for line in table_lines(evaluate(args.checkpoint, args.dataset, options, storage_options(args), out=args.out)):
        out(line)


def add_picture(commands: Any) -> None:
    """`tilestream picture`."""
    parser = add_command(
        commands,
        "picture",
        "draw embeddings: heatmap, token map, neighbours, map in the plane, GeoJSON for QuPath",
        "  tilestream picture tokens embeddings/a-1f2e.parquet --out pictures\n"
        "  tilestream picture heatmap embeddings --dataset tissue.csv --class tumour --out pictures\n"
        "  tilestream picture map embeddings --out map.html",
        run_picture,
    )
    parser.add_argument(
        "kind",
        choices=("heatmap", "tokens", "neighbours", "map", "geojson"),
        metavar="KIND",
        help="heatmap, tokens, geojson: a file a slide; neighbours, map: one of all slides",
    )
    parser.add_argument("embeddings", nargs="+", metavar="EMBEDDINGS", help="files or folders of `tilestream embed`")
    parser.add_argument("--out", required=True, metavar="URI", help="folder of the files; of neighbours, map: the file")
    parser.add_argument("--dataset", metavar="URI", help="labelled tiles that teach a class (heatmap, geojson)")
    parser.add_argument("--class", dest="name", metavar="NAME", help="that class")
    parser.add_argument("--queries", type=int, default=6, help="query tiles, a row each (neighbours; 6)")
    parser.add_argument("-k", type=int, default=8, help="neighbours of each (8)")
    parser.add_argument("--across", action="store_true", help="neighbours from other slides than the query's alone")
    parser.add_argument("--method", choices=("tsne", "pca"), default="tsne", help="of the map (tsne)")
    parser.add_argument("--most", type=int, default=2000, metavar="N", help="tiles on the map, drawn at random (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (0)")
    add_storage_options(parser)


def run_picture(args: Namespace) -> None:
    """Draws, and says where the files are."""
    from trainer.picture_files import PictureOptions, draw

    options = PictureOptions(**{entry.name: getattr(args, entry.name) for entry in fields(PictureOptions)})
    for uri in draw(args.embeddings, args.out, options, storage_options(args)):
        out(uri)


def add_capacity(commands: Any) -> None:
    """`tilestream capacity`."""
    parser = add_command(
        commands,
        "capacity",
        "readers, nodes, requests, bytes and costs that it takes to feed some GPUs",
        "  tilestream capacity vits14 --gpus 64 --tiles-per-second-per-gpu 40 --latency-ms 30 --prices prices.yaml",
        run_capacity,
    )
    parser.usage = "tilestream capacity CONFIG --gpus N --tiles-per-second-per-gpu R [--section.key value ...]"
    parser.add_argument("config", metavar="CONFIG", help=f"a YAML file or a preset: {', '.join(presets())}")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs, one rank each")
    parser.add_argument("--tiles-per-second-per-gpu", type=float, required=True, metavar="R", help="what one trains on")
    parser.add_argument("--latency-ms", type=float, default=30, help="of one GET to its first byte (30)")
    parser.add_argument("--requests-in-flight", type=int, default=32, help="of one reader (32)")
    parser.add_argument(
        "--costs", metavar="JSON", help="measured costs of a tile; `tilestream bench scale` writes them"
    )
    parser.add_argument("--prices", metavar="YAML", help="price list; deploy/prices.yaml is an example")
    parser.add_argument("--json", action="store_true", help="print all numbers for a machine")
    parser.set_defaults(takes_overrides=True)


def run_capacity(args: Namespace) -> None:
    """Prints what is needed, the first limit, and the bill."""
    from streaming.capacity import StageCosts, Surroundings, costs_of_size, plan_capacity, read_costs
    from streaming.prices import bill, read_prices
    from trainer.config import read_config

    config = read_config(args.config, args.overrides)
    prices = read_prices(args.prices) if args.prices else None
    around = Surroundings(latency_s=args.latency_ms / 1e3, requests_in_flight=args.requests_in_flight)
    if prices:
        node = {"node_cores": prices.reader_node_cores, "node_nbytes_s": prices.reader_node_gbit_s / 8 * 1e9}
        around = replace(around, **node)
    capacity = plan_capacity(
        costs_of_size(read_costs(args.costs) if args.costs else StageCosts(), config.data.tile_size),
        gpus=args.gpus,
        tiles_per_second_per_gpu=args.tiles_per_second_per_gpu,
        micro_batch=config.train.shape.micro,
        around=around,
    )
    costs = bill(capacity, args.gpus, prices) if prices else []
    if args.json:
        numbers = {**asdict(capacity), "holds": capacity.holds, "costs": [asdict(cost) for cost in costs]}
        return out(json.dumps(numbers, indent=2))
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


def add_export(commands: Any) -> None:
    """`tilestream export`."""
    parser = add_command(
        commands,
        "export",
        "write a checkpoint's teacher as a folder that timm or transformers load, with a model card",
        "  tilestream export s3://bucket/runs/a --out model --token cls+patch --license cc-by-nc-4.0",
        run_export,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or one of its checkpoints/step-…")
    parser.add_argument("--out", required=True, metavar="URI", help="folder of the model")
    parser.add_argument("--layout", choices=("timm", "transformers"), default="timm", help="who is to load it (timm)")
    parser.add_argument(
        "--token", choices=("cls", "patch", "cls+patch"), default="cls", help="what an embedding is, for the card"
    )
    parser.add_argument("--license", default="other", metavar="SPDX", help="licence of the weights (other)")
    parser.add_argument("--name", default="tilestream-model", help="name of the model in its card")
    parser.add_argument(
        "--eva",
        metavar="TASK.yaml",
        action="append",
        default=[],
        help="a configuration of kaiko's eva, written beside the model with it as backbone; may be repeated",
    )
    add_storage_options(parser)


def run_export(args: Namespace) -> None:
    """Exports, and says how to load it."""
    from trainer.export import ExportOptions, export

    options = ExportOptions(
        layout=args.layout, token=args.token, license=args.license, name=args.name, eva=tuple(args.eva)
    )
    for uri in export(args.checkpoint, args.out, options, storage_options(args)):
        out(uri)


def build_parser() -> ArgumentParser:
    """The parser of all commands."""
    parser = OneLineParser(
        prog="tilestream",
        description="Training tiles for pathology foundation models, streamed from the original whole-slide images.",
        allow_abbrev=False,
    )
    commands: Any = parser.add_subparsers(metavar="COMMAND", required=True)
    data, model = (add_catalog, add_stream, add_doctor), (add_train, add_embed, add_picture, add_export, add_evaluate)
    for add in (add_demo, *data, *model, add_capacity, add_bench):
        add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "takes_overrides", False):
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    args.overrides = rest
    if not args.verbose:
        # What libraries warn their own callers of is nothing that a user of the command could act on.
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    try:
        args.run(args)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except Exception as error:
        cause = root_cause(error)
        if args.verbose:
            traceback.print_exc()
        if isinstance(cause, TilestreamError):
            sys.stderr.write(f"tilestream: {cause}\n")
            return 2
        what = " ".join(str(cause).split())[:400]
        sys.stderr.write(f"tilestream: unexpected {type(cause).__name__}: {what}; --verbose shows the traceback\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
