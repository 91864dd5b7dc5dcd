"""The command line: `tilestream COMMAND …`. Exit status 0, 2 for bad input (one line says which), 1 for the rest."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from importlib import metadata
from typing import Any

from streaming import storage
from streaming.cli import add_bench, add_catalog, add_doctor, add_stream, add_tiles
from streaming.command_line import OneLineParser, add_command, folder, is_unread, terminal
from streaming.errors import TilestreamError, UnreachableError, root_cause
from streaming.secrets import without_secrets
from trainer.model_commands import add_embed, add_evaluate, add_export, add_lazyslide, add_picture, add_report
from trainer.training_commands import add_capacity, add_replay, add_sweep, add_train


def add_demo(commands: Any) -> None:
    """`tilestream demo`."""
    parser = add_command(
        commands,
        "demo",
        "make slides, catalog, train, embed and report, in minutes on this machine",
        "  tilestream demo --out demo-output",
        run_demo_command,
        extra="train",
    )
    parser.add_argument(
        "--out", type=folder, default="demo-output", metavar="FOLDER", help="where all of it goes (demo-output)"
    )
    parser.add_argument("--train-steps", type=int, default=60, metavar="N", help="optimiser steps (60)")


def run_demo_command(args: Namespace) -> None:
    """Runs the demo."""
    from trainer.demo import run_demo

    run_demo(args.out, steps=args.train_steps)


def build_parser() -> ArgumentParser:
    """The parser of all commands."""
    parser = OneLineParser(
        prog="tilestream",
        description="Training tiles for pathology foundation models, streamed from the original whole-slide images.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tilestream {metadata.version('tilestream')}")
    commands: Any = parser.add_subparsers(metavar="COMMAND", required=True)
    data, model = (
        (add_catalog, add_stream, add_tiles, add_doctor),
        (add_train, add_replay, add_embed, add_picture, add_lazyslide, add_export),
    )
    for add in (add_demo, *data, *model, add_report, add_evaluate, add_sweep, add_capacity, add_bench):
        add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    with terminal():
        return _run(argv)


def _run(argv: list[str] | None) -> int:
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "takes_overrides", False):
        # What follows an option may be a secret.
        options = [argument.partition("=")[0] for argument in rest if argument.startswith("-")]
        parser.error(f"unrecognised arguments: {without_secrets(' '.join(options or rest))}")
    args.overrides = rest
    if not args.verbose:
        # What libraries warn their own callers of is nothing that a user of the command could act on.
        warnings.simplefilter("ignore")
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    storage.answer_soon()
    try:
        args.run(args)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, BrokenPipeError) and is_unread():
            raise
        if args.verbose:
            sys.stderr.write(without_secrets(traceback.format_exc()))
        if isinstance(cause, ModuleNotFoundError) and args.extra:
            sys.stderr.write(
                f"tilestream {args.command}: {cause.name} is not installed here; the package's extra `{args.extra}` "
                f"brings it: pip install -e '.[{args.extra}]' in a clone, or 'FILE.whl[{args.extra}]'\n"
            )
            return 2
        if isinstance(cause, TilestreamError):
            # One line by its making; Ray Data appends advice of its own.
            sys.stderr.write(f"tilestream: {str(cause).partition(chr(10))[0]}\n")
            # A training whose storage is away has no bad input: what starts it again after a lost machine shall do so.
            return 1 if args.command == "train" and isinstance(cause, UnreachableError) else 2
        what = without_secrets(" ".join(str(cause).split()))[:400]
        sys.stderr.write(f"tilestream: unexpected {type(cause).__name__}: {what}; --verbose shows the traceback\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
