"""Options that say which tiles a command is about, and the plan that they mean."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, get_args

from streaming.command_line import add_options, magnifications, named_weights, read_options
from streaming.errors import ConfigError
from streaming.plan.footprints import Corners
from streaming.plan.magnifications import DEFAULT_MPP
from streaming.plan.plan import MIN_TISSUE
from streaming.plan.strata import Strata
from streaming.plan.universe import Universe
from streaming.plan.views import View
from streaming.slide.geometry import MAX_UPSAMPLING, MPP_TOLERANCE

if TYPE_CHECKING:
    from streaming.catalog import Catalog
    from streaming.plan import TilePlan


def add_plan_options(parser: ArgumentParser) -> None:
    """Options for seed, mix and universe."""
    parser.add_argument("--seed", type=int, default=0, help="seed of the plan (0)")
    mpp = ",".join(f"{value:g}" for value in DEFAULT_MPP)
    parser.add_argument(
        "--mpp", type=magnifications, metavar="LIST", help=f"µm/px, with weights if wanted, or uniform:0.25:2 ({mpp})"
    )
    views = "in place of --mpp, µm/px of views of one place, around one centre: a sample has a tile of each: 0.5,1.0"
    parser.add_argument("--views", type=views_of_one_place, metavar="LIST", default=(), help=views)
    parser.add_argument(
        "--mpp-tolerance",
        type=float,
        default=MPP_TOLERANCE,
        metavar="SHARE",
        help=f"how far a slide's own pixels may be off it and be taken as they are; 0: none ({MPP_TOLERANCE:g})",
    )
    bound = f"times that a slide's pixels may be enlarged; past it, it serves none ({MAX_UPSAMPLING:g})"
    parser.add_argument("--max-upsampling", type=float, default=MAX_UPSAMPLING, metavar="TIMES", help=bound)
    where = "where tiles begin: anywhere, or on as few compressed blocks as can be (anywhere)"
    parser.add_argument("--corners", choices=get_args(Corners), default="anywhere", help=where)
    parser.add_argument("--size", type=int, default=256, help="side of a tile in px (256)")
    least = "share of a tile's area that is tissue, at least (0.4)"
    parser.add_argument("--min-tissue", type=float, default=MIN_TISSUE, metavar="SHARE", help=least)
    group = parser.add_argument_group("which tiles may be drawn (all of all slides)")
    add_options(
        group,
        Universe,
        slides={"metavar": "SHARE"},
        tiles_per_slide={"metavar": "K"},
        replacement={"help": "each of those once before any comes again"},
        seed={"flag": "--universe-seed"},
        window={"metavar": "TILES"},
        window_slides={"metavar": "N"},
    )
    group.add_argument("--cohorts", type=named_weights, metavar="LIST", help="cohorts and weights: a=2,b=1")
    columns = {"flag": "--strata", "metavar": "COLUMN"}
    add_options(group, Strata, columns=columns, power={"flag": "--strata-power", "metavar": "POWER"})
    what = "weights by value of --strata in place of the power; others are not drawn: lung=2,skin=1"
    group.add_argument("--strata-weights", type=named_weights, metavar="LIST", default={}, help=what)
    listed = "a list of tiles to draw: Parquet with slide, x, y, mpp, and if wanted weight or cluster"
    group.add_argument("--tiles", metavar="URI", help=listed)


def views_of_one_place(text: str) -> tuple[View, ...]:
    """Views around one centre.

    Raises:
        ValueError: what is between the commas is no number.
    """
    return tuple(View(mpp=float(part), same_centre=number > 0) for number, part in enumerate(text.split(",")))


def plan_of(args: Namespace, catalog: Catalog) -> TilePlan:
    """The plan of a command line; what of a list is left out is told on stderr.

    Raises:
        ConfigError: options that make no sense together.
        PlanError: the catalog, or a list, can't give what is asked for.
    """
    from streaming.plan import TilePlan

    if args.tiles and args.mpp:
        raise ConfigError("--tiles and --mpp: a list has the mpp of its tiles; leave out --mpp")
    if args.views and args.mpp:
        raise ConfigError("--views and --mpp: views have their own µm/px; leave out --mpp")
    plan = TilePlan(
        catalog,
        args.seed,
        args.mpp or DEFAULT_MPP,
        args.size,
        cohorts=args.cohorts,
        strata=read_options(args, Strata, weights=args.strata_weights),
        min_tissue=args.min_tissue,
        max_upsampling=args.max_upsampling,
        mpp_tolerance=args.mpp_tolerance,
        corners=args.corners,
        universe=read_options(args, Universe),
        tiles=args.tiles,
        views=args.views,
    )
    for line in plan.left_out:
        sys.stderr.write(f"{line}\n")
    return plan
