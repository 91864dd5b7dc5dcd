"""The commands that need no model: `tilestream catalog`, `stream`, `tiles`, `bench` and `doctor`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from streaming import storage
from streaming.catalog.given import MppFrom
from streaming.catalog.idc import IdcOptions
from streaming.catalog.masks import MaskOptions
from streaming.command_line import (
    SLIDES_HELP,
    add_command,
    add_options,
    add_storage_options,
    file,
    folder,
    out,
    pair,
    read_options,
    storage_options,
)
from streaming.delivery.failures import MAX_FAILED_SHARE
from streaming.delivery.segments import Readers
from streaming.errors import ConfigError
from streaming.plan_options import add_plan_options, plan_of
from streaming.reading.filters import Filters
from streaming.reading.reader import ReaderOptions
from streaming.storage.staging import Staging

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from streaming.delivery.stream import TileStream
    from streaming.plan import TilePlan


_CLASS = {"metavar": "CLASS"}
_MOST_SHOWN, _SHOWN_PX = 400, 128  # tiles of a mosaic, and their side there
_SAMPLE = 4096  # tiles of which the dry run tells what they cost


def add_catalog(commands: Any) -> None:
    """`tilestream catalog`."""
    parser = add_command(
        commands,
        "catalog",
        "build a catalog of slides, or extend one",
        "  tilestream catalog s3://bucket/slides /data/more/*.svs --out s3://bucket/catalog --metadata patients.csv",
        run_catalog,
    )
    parser.add_argument("slides", nargs="*", metavar="SLIDES", help=SLIDES_HELP)
    parser.add_argument(
        "--out", type=folder, required=True, metavar="URI", help="folder of the catalog; extended if it exists"
    )
    add_options(parser, IdcOptions, where={"metavar": "SQL"}, idc_index={"metavar": "URI"})
    of_slides = "µm/px at level 0 of slides whose metadata has none"
    parser.add_argument("--slide-mpp", type=float, metavar="µm/px", help=of_slides)
    parser.add_argument(
        "--metadata",
        metavar="CSV",
        help="free columns by slide (patient, site, organ, cohort, stain, mpp, …); first column: address, name or stem",
    )
    parser.add_argument(
        "--mpp-from",
        choices=get_args(MppFrom),
        default="metadata",
        help="whose mpp counts where the slide's metadata and the CSV tell both (metadata)",
    )
    add_options(parser, MaskOptions, masks={"metavar": "URI"}, masks_include=_CLASS, masks_exclude=_CLASS)
    parser.add_argument(
        "--preview",
        action="store_true",
        help="write a page into the catalog, preview.html: thumbnails with the tissue grid, rejected slides and why",
    )
    parser.add_argument("--recheck", action="store_true", help="look at all slides anew, unchanged ones too")
    add_storage_options(parser)


def run_catalog(args: Namespace) -> None:
    """Builds the catalog, says what became of the slides, and draws them if asked to.

    Raises:
        ConfigError: neither slides nor a preview are asked for, or options are given that only slides need.
    """
    if args.slides:
        _build(args)
    elif given := _of_slides(args):
        raise ConfigError(f"{', '.join(given)}: says how slides are looked at; name SLIDES, too")
    elif not args.preview:
        raise ConfigError(f"catalog: no SLIDES; name {SLIDES_HELP}")
    if args.preview:
        from streaming.show.preview import write_preview

        where, num = write_preview(args.out, storage_options(args))
        out(f"{where}: {num} slides to look at")


def _of_slides(args: Namespace) -> list[str]:
    """The options that are given, and change nothing where no slides are named."""
    idc, masks = read_options(args, IdcOptions), read_options(args, MaskOptions)
    values = {
        "--where": idc.where,
        "--idc-index": idc.idc_index,
        "--slide-mpp": args.slide_mpp,
        "--metadata": args.metadata,
        "--masks": masks.masks,
        "--recheck": args.recheck or None,
    }
    return [option for option, value in values.items() if value is not None]


def _build(args: Namespace) -> None:
    """Builds the catalog and says what became of the slides."""
    from streaming.catalog.build import build_catalog
    from streaming.catalog.inspection import COARSE_MPP
    from streaming.catalog.schema import REJECTED, SKIPPED, TABLE
    from streaming.catalog.sources import counted

    report = build_catalog(
        args.slides,
        args.out,
        mpp=args.slide_mpp,
        metadata_csv=args.metadata,
        mpp_from=args.mpp_from,
        recheck=args.recheck,
        masks=read_options(args, MaskOptions),
        idc=read_options(args, IdcOptions),
        options=storage_options(args),
        staging=Staging(),
        verbose=args.verbose,
    )
    for entry in report.rejected[:5]:
        sys.stderr.write(f"rejected: {entry.slide}: {entry.reason}\n")
    if len(report.rejected) > 5:
        sys.stderr.write(f"… and {len(report.rejected) - 5} more rejected\n")
    for slide, colour in report.odd_glass[:5]:
        sys.stderr.write(
            f"{slide}: its glass is not grey but of red, green, blue {colour}: its colours are decoded or described "
            "wrongly; look at it beside its source before training on it\n"
        )
    if len(report.odd_glass) > 5:
        sys.stderr.write(f"… and {len(report.odd_glass) - 5} more slides whose glass is not grey\n")
    if report.without_levels:
        slide, cost = max(report.without_levels, key=lambda found: found[1])
        others = f" and {len(report.without_levels) - 1} more" if len(report.without_levels) > 1 else ""
        sys.stderr.write(f"{slide}{others}: {_no_level(COARSE_MPP, cost)}\n")
    if report.left_out:
        slide, what = report.left_out[0]
        others = f"; so it is of {len(report.left_out) - 1} more slides" if len(report.left_out) > 1 else ""
        sys.stderr.write(f"{slide}: {what} are not read{others}\n")
    if report.contradicted:
        slide, own, given = report.contradicted[0]
        others = f"; so it is with {len(report.contradicted) - 1} more slides" if len(report.contradicted) > 1 else ""
        remedy = (
            "to let the table decide: --mpp-from csv" if given.mpp_from == TABLE else "a table may decide, see --help"
        )
        sys.stderr.write(
            f"{slide}: its metadata says {own:.4g} µm/px, the {given.mpp_from} {given.mpp:.4g}: the metadata counts "
            f"({remedy}){others}\n"
        )
    if report.unmatched:
        sys.stderr.write(f"{args.metadata}: {report.unmatched} of {report.total} slides have no row in it\n")
    if report.unmasked:
        first, num = report.unmasked[0], len(report.unmasked)
        sys.stderr.write(f"{num} slides have no mask (first: {first}): our own rule tells their tissue\n")
    if report.odd_masks:
        num = len(report.odd_masks)
        sys.stderr.write(f"{num} files beside the masks are no slide's mask (first: {report.odd_masks[0]})\n")
    if report.unknown_classes:
        wrong, there = ", ".join(report.unknown_classes), ", ".join(report.mask_classes[:9])
        more = ", …" if len(report.mask_classes) > 9 else ""
        sys.stderr.write(
            f"--masks-include, --masks-exclude: no mask has {wrong}; they have {there}{more}: spell it so, and the "
            "slides are looked at anew\n"
        )
    done = [f"{report.added} added", f"{report.changed} changed", f"{report.unchanged} unchanged"]
    done.append(f"{len(report.rejected)} rejected")
    if report.rejected:
        done[-1] += f" (reasons in {storage.join(args.out, REJECTED)})"
    if report.skipped:
        kinds, where = counted(report.skipped), storage.join(args.out, SKIPPED)
        done.append(f"{report.skipped.total()} files skipped: {kinds} (named in {where})")
    out(f"{args.out}: {report.total} slides: {', '.join(done)}")


def _no_level(mpp: float, cost: float) -> str:
    return (
        f"no level near {mpp:g} µm/px: a tile there is made of {cost:.0f} times its pixels; convert it with "
        "`vips tiffsave … --tile --pyramid`, or leave that magnification out"
    )


def add_stream(commands: Any) -> None:
    """`tilestream stream`."""
    parser = add_command(
        commands,
        "stream",
        "pull batches of tiles and print the rate",
        "  tilestream stream s3://bucket/catalog --steps 0:100 --batch 256 --ranks 2 --digest",
        run_stream,
    )
    parser.add_argument("catalog", metavar="CATALOG", help="what `tilestream catalog` wrote")
    parser.add_argument("--steps", type=pair, default=(0, 100), metavar="A:B", help="steps A to B-1 (0:100)")
    parser.add_argument("--batch", type=int, default=256, metavar="G", help="tiles of a step, over all ranks (256)")
    parser.add_argument("--ranks", type=int, default=1, metavar="W", help="consumers that share the batch (1)")
    shared = "consumers that share a dataset of Ray Data, and their part of the readers (all)"
    parser.add_argument("--ranks-per-stream", type=int, metavar="N", help=shared)
    count = {"flag": "--readers", "metavar": "MIN:MAX"}
    add_options(parser, Readers, only=("count", "segment_minutes"), count=count, segment_minutes={"metavar": "MIN"})
    add_options(parser, ReaderOptions, only=("requests_in_flight",), requests_in_flight={"metavar": "N"})
    parser.add_argument(
        "--max-failed-share",
        type=float,
        default=MAX_FAILED_SHARE,
        metavar="SHARE",
        help=f"unreadable tiles that are put up with ({MAX_FAILED_SHARE})",
    )
    parser.add_argument(
        "--log", type=folder, metavar="URI", help="folder for failures.parquet, the tiles that could not be read"
    )
    parser.add_argument("--digest", action="store_true", help="print a SHA-256 of each step's tiles in index order")
    parser.add_argument("--dry-run", action="store_true", help="read nothing; print how well the steps are mixed")
    many = "read nothing; print what so many tiles contain, by magnification and metadata (1000000)"
    parser.add_argument("--census", type=int, nargs="?", const=1_000_000, metavar="TILES", help=many)
    parser.add_argument(
        "--mosaic", type=file, metavar="URI", help="write a picture (.png, .jpg) of the first step's tiles, by index"
    )
    add_plan_options(parser)
    group = parser.add_argument_group("filters beside the HSV rule")
    share, functions = {"metavar": "SHARE"}, {"flag": "--filter", "metavar": "MODULE:NAME"}
    add_options(group, Filters, blur={"metavar": "VARIANCE"}, pen=share, white=share, functions=functions)
    add_storage_options(parser)


def run_stream(args: Namespace) -> None:
    """Pulls the steps and prints a digest a step, then the rate, where the time went and how well it was mixed."""
    import numpy as np

    from streaming.catalog import Catalog
    from streaming.delivery.stream import BatchShape, TileStream, check_steps
    from streaming.plan.census import census

    options = storage_options(args)
    if args.census is not None and args.census < 1:
        raise ConfigError(f"--census {args.census}; it is a number of tiles, at least 1")
    if args.mosaic:
        from streaming.show.pictures import kind_of

        kind_of(args.mosaic)
        if args.dry_run:
            raise ConfigError(f"--mosaic {args.mosaic}: a dry run reads no tiles; leave out --dry-run")
    shape = BatchShape(args.batch, args.ranks)
    check_steps(*args.steps)
    catalog = Catalog.load(args.catalog, options)
    plan = plan_of(args, catalog)
    if args.census is not None:
        for line in census(plan, catalog, args.census).lines():
            out(line)
        return
    if args.dry_run:
        some = _some_batches(args.steps, args.batch)
        _print_mix(plan, [plan.slides_of(index) for index in some], args.batch)
        for line in plan.mix_lines():
            out(line)
        if costs := plan.block_costs(np.concatenate(some)[:_SAMPLE]):
            out(f"blocks: {costs.line()}")
        for mpp, slides, cost in plan.without_levels():
            others = f" and {len(slides) - 1} more" if len(slides) > 1 else ""
            sys.stderr.write(f"{slides[0]}{others}: {_no_level(mpp, cost)}\n")
        return
    filters = read_options(args, Filters)
    reader = read_options(args, ReaderOptions, storage_options=options, filters=filters)
    readers = read_options(args, Readers)
    stream = TileStream(
        catalog,
        plan,
        shape,
        reader=reader,
        readers=readers.count,
        segment_minutes=readers.segment_minutes,
        ranks_per_stream=args.ranks_per_stream,
    )
    _pull(stream, readers.count[1], args)


def add_tiles(commands: Any) -> None:
    """`tilestream tiles`."""
    parser = add_command(
        commands,
        "tiles",
        "write a list of tiles: a grid on the tissue of all slides, or what a plan draws",
        "  tilestream tiles s3://bucket/catalog --out list.parquet --mpp 0.5\n"
        "  tilestream tiles s3://bucket/catalog --out list.parquet --draws 1000000",
        run_tiles,
    )
    parser.add_argument("catalog", metavar="CATALOG", help="what `tilestream catalog` wrote")
    parser.add_argument("--out", type=file, required=True, metavar="URI", help="Parquet file of the list")
    draws = "the first tiles of the plan, by sample index, instead of a grid edge to edge"
    parser.add_argument("--draws", type=int, metavar="N", help=draws)
    add_plan_options(parser)
    add_storage_options(parser)


def run_tiles(args: Namespace) -> None:
    """Writes the list and tells what is in it.

    Raises:
        ConfigError: fewer than one tile is asked for, or a grid at a range of magnifications.
    """
    from streaming.catalog import Catalog
    from streaming.plan.list_writing import drawn_tiles, grid_tiles, write_list

    if args.draws is not None and args.draws < 1:
        raise ConfigError(f"--draws {args.draws}; it is a number of tiles, at least 1")
    options = storage_options(args)
    catalog = Catalog.load(args.catalog, options)
    if args.views:
        raise ConfigError("--views: a list has single tiles; leave it out")
    plan = plan_of(args, catalog)
    found = grid_tiles(plan, catalog, args.min_tissue) if args.draws is None else drawn_tiles(plan, args.draws)
    num, slides = write_list(args.out, found, options)
    out(f"{args.out}: {num:,} tiles of {slides:,} slides; draw them by `data.tiles` or `--tiles`")


def _some_batches(steps: tuple[int, int], batch: int) -> list[NDArray[np.int64]]:
    """The indices of the steps, of a thousand at most."""
    import numpy as np

    return [np.arange(step * batch, (step + 1) * batch) for step in range(*steps)[:1000]]


def _print_mix(plan: TilePlan, batches: list[NDArray[np.int32]], batch: int) -> None:
    if plan.num_tiles is not None:
        epoch = f"an epoch is {plan.num_tiles / batch:,.1f} steps" if plan.is_exhaustive else "drawn with replacement"
        out(f"universe: {plan.num_tiles:,} tiles, {epoch}")
    out(f"mix: {plan.shuffle_quality(batches).line()}")


def _pull(stream: TileStream, most_readers: int, args: Namespace) -> None:
    """Takes the steps' tiles, and tells what it saw."""
    import numpy as np
    from rich.console import Console

    from streaming import cluster
    from streaming.delivery.failures import FailureBudget, FailureLog
    from streaming.delivery.stream import step_digest
    from streaming.delivery.time_use import TimeUse
    from streaming.progress import Pace, ProgressLine
    from streaming.reading.batch import failures_of

    first, last = args.steps
    steps = iter(stream.steps(first, last))
    cluster.connect(most_readers + 1, verbose=args.verbose)
    log = FailureLog(args.log, storage_options(args)) if args.log else None
    budget, use, drawn, shown = FailureBudget(args.max_failed_share), TimeUse(), list[Any](), list[Any]()
    started, pace = time.perf_counter(), Pace()
    first_at = started
    with ProgressLine("stream", "steps", total=last - first) as progress, log or contextlib.nullcontext():
        for step in range(first, last):
            asked = time.perf_counter()
            batches = next(steps)
            if step == first:
                first_at, shown = time.perf_counter(), batches
            else:  # the first one waits for readers to start
                use.waited(time.perf_counter() - asked)
            for batch in batches:
                if log:
                    log.add(failures_of(batch))
                budget.add(batch)
                use.add(batch, time.time())
            drawn = [*drawn[-999:], np.concatenate([batch["slide"] for batch in batches])]
            if args.digest:
                out(f"step {step} {step_digest(batches)}")
            rate = pace.at(budget.tiles)
            progress.update(step + 1 - first, f"{rate:,.0f} tiles/s" if rate else "")
    took_s = time.perf_counter() - first_at
    if args.mosaic:
        _draw(shown, args)
    for line in budget.summary():
        sys.stderr.write(line + "\n")
    use.print(took_s, Console())
    _print_mix(stream.plan, drawn, args.batch)
    told = f"{(budget.tiles - args.batch) / took_s:,.0f} tiles/s" if last - first > 1 else "one step"
    told += "; a trainer that takes fewer would not have waited" if last - first > 1 else ""
    out(f"{budget.tiles:,} tiles of {last - first} steps: {told}; after the first batch at {first_at - started:.1f} s")


def _draw(batches: Sequence[Mapping[str, NDArray[Any]]], args: Namespace) -> None:
    """Writes a picture of a step's tiles, in the order of their indices."""
    import numpy as np

    from streaming.reading.batch import tile_columns
    from streaming.show.pictures import mosaic, write_picture

    names = tile_columns(batches[0])
    order = np.argsort(np.concatenate([batch["index"] for batch in batches]))[: _MOST_SHOWN // len(names)]
    # The views of a place side by side.
    views = [np.concatenate([batch[name] for batch in batches])[order] for name in names]
    shown = [tile for place in zip(*views, strict=True) for tile in place]
    columns = math.ceil(math.ceil(len(shown) ** 0.5) / len(views)) * len(views)
    write_picture(args.mosaic, mosaic(shown, columns, _SHOWN_PX), storage_options(args))


def add_bench(commands: Any) -> None:
    """`tilestream bench`."""
    parser = add_command(
        commands,
        "bench",
        "measure against others, side by side on this machine",
        "  tilestream bench reader\n  tilestream bench reader --json",
        run_bench,
    )
    parser.usage = "tilestream bench [NAME ...] [arguments of the benchmark]"
    parser.add_argument("names", nargs="*", metavar="NAME", help="catalog, reader, stream, soak, … (default: all)")
    parser.set_defaults(takes_overrides=True)


def run_bench(args: Namespace) -> None:
    """Runs benchmarks of the source tree, each in a process of its own.

    Raises:
        ConfigError: there is no such benchmark, or no source tree.
    """
    folder = Path(__file__).parents[1] / "benchmarks"
    shared = ("common", "latency_server", "mission", "table")
    known = sorted(path.stem for path in folder.glob("*.py") if path.stem not in shared)
    if not known:
        raise ConfigError(f"{folder}: no benchmarks here; they are part of the source tree: run this in a clone")
    for name in args.names or known:
        if name not in known:
            raise ConfigError(f"bench {name}: no such benchmark; take {', '.join(known)}")
        # As modules of one package, found wherever this is run.
        environment = os.environ | {"PYTHONPATH": str(folder.parent), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", f"benchmarks.{name}", *args.overrides]
        status = subprocess.run(command, env=environment).returncode
        if status:
            sys.exit(status)


def add_doctor(commands: Any) -> None:
    """`tilestream doctor`."""
    parser = add_command(
        commands,
        "doctor",
        "check this machine, the cluster and the storage, and say what to mend",
        "  tilestream doctor --catalog s3://bucket/catalog\n  tilestream doctor --json",
        run_doctor,
    )
    parser.add_argument("--catalog", metavar="URI", help="also check the storage, and read a sample of its tiles")
    parser.add_argument("--no-ray", action="store_true", help="start or reach no Ray")
    parser.add_argument("--json", action="store_true", help="print the findings for a machine")
    add_storage_options(parser)


def run_doctor(args: Namespace) -> None:
    """Prints the findings; exit status 1 if something must be mended."""
    from streaming.operate.doctor import Finding, examine

    findings: list[Finding] = []
    for finding in examine(args.catalog, storage_options(args), ray=not args.no_ray):
        findings.append(finding)
        if not args.json:
            out(f"{finding.state:<5} {finding.check:<13} {finding.what}")
            if finding.remedy:
                out(f"{'':<19} → {finding.remedy}")
    if args.json:
        out(json.dumps([asdict(finding) for finding in findings], indent=2))
    if any(finding.state == "mend" for finding in findings):
        sys.exit(1)
