"""What all commands are made of: parsers that complain in one line, and options made from dataclasses.

A command's settings are a frozen dataclass, which has each default and, in the string under a field, what it is:
`add_options` makes options of the fields, `read_options` the dataclass of what was parsed. jsonargparse, which reads a
training's configuration, does this only by other rules: `--min_tissue` for `--min-tissue`, `--gpu true` for `--gpu`,
`[1, 2]` for `1:2`; and its parsers can't leave `--section.key value` to another one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import select
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser

from streaming import machine
from streaming.errors import EMPTY_ADDRESS, ConfigError
from streaming.mirrors import default_mirrors, read_mirrors
from streaming.secrets import hidden

SLIDES_HELP = "files, folders, globs, s3:// (or other) prefixes, idc:COLLECTION, tables (.csv .tsv .txt .parquet)"

Command = Callable[[Namespace], None]
Section = TypeVar("Section")


class OneLineParser(ArgumentParser):
    """A parser that says what is wrong in one line and exits 2."""

    _words: Sequence[str] = ()

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride] — several by their types
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse's; `error` may look at the arguments."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._words, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints the line; `--help` shows the rest."""
        # Of a misspelt option argparse says only that the right one is missing.
        if "are required: " in message and not self.get_default("takes_overrides"):
            given = [word.partition("=")[0] for word in self._words if word.startswith("--")]
            if unknown := [option for option in given if option not in ("--", *self._option_string_actions)]:
                message += f"; unrecognized: {' '.join(unknown)}"
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def out(line: str = "") -> None:
    """A line of a command's result."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def terminal() -> Generator[None]:
    """Within it no output can end a command: letters that an encoding lacks are replaced, a stream may be closed.

    Raises:
        SystemExit: with status 1 and without a word, where nobody reads what is written, as `head` does not.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="replace"))  # noqa: SIM115 — as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    failed = False
    try:
        yield
    except BrokenPipeError:
        if not is_unread():
            raise
        failed = True
    finally:
        # Python would try it again at its end, and complain.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                failed = True
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), stream.fileno())
    if failed:
        raise SystemExit(1)


def is_unread() -> bool:
    """Whether whoever read our output has gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(io.UnsupportedOperation):  # a test's
            asked = select.poll()
            asked.register(stream.fileno(), 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0)):
                return True
    return False


def add_command(
    commands: Any, name: str, what: str, example: str, run: Command, extra: str | None = None
) -> ArgumentParser:
    """A subcommand with the options that all have; `extra` is the one of the package's that brings what it imports."""
    parser: ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--verbose", action="store_true", help="tracebacks, and what the workers print")
    parser.set_defaults(run=run, command=name, extra=extra)
    return parser


def add_options(
    parser: Any, section: type[Any], *, only: Sequence[str] | None = None, **changes: Mapping[str, Any]
) -> None:
    """An option for each field of a dataclass, or for those named in `only`.

    A field without default becomes a positional argument. A flag of a field that is true by default is `--no-…`. Fields
    that hold dataclasses or dictionaries get none. `changes` has, by field, what is to differ: `flag`, the option's
    name, and whatever `add_argument` takes.

    Args:
        parser: a parser, or a group of its arguments.
        section: a dataclass with a docstring under each field.
        only: names of fields.
        changes: by name of a field.
    """
    kinds = get_type_hints(section)
    meanings = _meanings(section)
    for field in fields(section):
        if only is not None and field.name not in only:
            continue
        made = _argument(kinds[field.name], field, meanings.get(field.name, ""))
        if made is None:
            continue
        made |= changes.get(field.name, {})
        if made.get("action") == "append":
            made["help"] += "; may be repeated"
        dest, flag = _dest(section, field), made.pop("flag")
        if field.default is MISSING and field.default_factory is MISSING:
            del made["default"]
            parser.add_argument(dest, **{**made, "metavar": made["metavar"] or field.name.upper()})
        else:
            parser.add_argument(flag, dest=dest, **made)


def read_options(args: Namespace, section: type[Section], **given: Any) -> Section:
    """The dataclass of the options that `add_options` made; `given` are fields that are no options.

    Raises:
        ConfigError: values that the dataclass refuses.
    """
    parsed = {
        field.name: getattr(args, _dest(section, field))
        for field in fields(section)  # pyright: ignore[reportArgumentType] — a dataclass
        if hasattr(args, _dest(section, field))
    }
    lists_as_tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in parsed.items()}
    return section(**lists_as_tuples, **given)


def _dest(section: type[Any], field: Field[Any]) -> str:
    """Where the parsed value is held: two dataclasses of one command may have fields of one name."""
    return f"{section.__name__}.{field.name}"


@cache
def _meanings(section: type[Any]) -> dict[str, str]:
    """The strings under a dataclass's fields, each in one line, as argparse wants its help."""
    found = docstring_parser.parse_from_object(section).params
    return {param.arg_name: " ".join((param.description or "").replace("%", "%%").split()) for param in found}


def _argument(kind: Any, field: Field[Any], meaning: str) -> dict[str, Any] | None:
    """What `add_argument` is given for a field, with its `flag`; None for what no option can hold."""
    default: Any = None if field.default is MISSING else field.default
    flag = f"--{field.name.replace('_', '-')}"
    if kind is bool:
        what = meaning.removeprefix("whether ")
        if default:
            return {"flag": flag.replace("--", "--no-", 1), "action": "store_false", "default": True, "help": what}
        return {"flag": flag, "action": "store_true", "default": False, "help": what}
    made = {"flag": flag, "default": default, "metavar": field.name.upper()}
    told = "" if default in (None, ()) else f" ({_text(default)})"
    # What a configuration writes as `none`, a command line leaves out.
    made["help"] = meaning.replace("; none: ", "; left out: ") + told
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    if kind == tuple[int, int]:
        return made | {"type": pair, "metavar": "A:B"}
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        made |= {"action": "append", "default": list(default or ())}
    if get_origin(kind) is Literal:
        return made | {"choices": get_args(kind), "metavar": None}
    return made | {"type": kind} if kind in (int, float, str) else None


def _text(default: Any) -> str:
    """A default as one would type it."""
    if isinstance(default, tuple):
        return ":".join(map(str, default))  # pyright: ignore[reportUnknownArgumentType]
    return f"{default:g}" if isinstance(default, float) else str(default)


def add_storage_options(parser: ArgumentParser) -> None:
    """Options for remote storage and the copies of remote slides."""
    parser.add_argument(
        "--storage",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an fsspec option (endpoint_url, key, secret, region, anon, …); else the usual environment variables",
    )
    parser.add_argument(
        "--mirrors",
        metavar="FROM=TO",
        action="append",
        default=[],
        help="read slides of s3://FROM at another address (gs://…, a folder); may be repeated; else TILESTREAM_MIRRORS",
    )


def storage_options(args: Namespace) -> dict[str, Any]:
    """The storage options of a command line, with the mirrors of slides among them.

    Raises:
        ConfigError: one is not KEY=VALUE, or a mirror not FROM=TO.
    """
    options: dict[str, Any] = {}
    for text in args.storage:
        key, separator, value = str(text).partition("=")
        if not separator or not key:
            raise ConfigError("a --storage is not KEY=VALUE, as for example endpoint_url=http://127.0.0.1:9000 is")
        options[key] = {"true": True, "false": False}.get(value.lower(), value)
    # Told here, since workers on other machines have another environment.
    mirrors = read_mirrors(args.mirrors) or default_mirrors()
    return hidden({**options, "mirrors": mirrors} if mirrors else options)


def address(text: str) -> str:
    """An address, as an option gives it.

    Raises:
        ArgumentTypeError: it is empty.
    """
    if not text:
        raise ArgumentTypeError(EMPTY_ADDRESS)
    return text


def folder(text: str) -> str:
    """The address of a folder that a command is to write to.

    Raises:
        ArgumentTypeError: it is empty, or of this machine, where no such folder can be made.
    """
    return _writable(text, text)


def file(text: str) -> str:
    """The address of a file that a command is to write; errors as `folder`."""
    if "://" not in text and os.path.isdir(text):
        raise ArgumentTypeError(f"{text!r} is a folder; name a file")
    return file_or_folder(text)


def file_or_folder(text: str) -> str:
    """The address of one or the other; errors as `folder`."""
    # What is written replaces what is there, were it a device.
    if "://" not in text and os.path.lexists(text) and not (os.path.isfile(text) or os.path.isdir(text)):
        raise ArgumentTypeError(f"{text!r} is neither a file nor a folder; name another place")
    return _writable(text, text if os.path.isdir(text) else os.path.dirname(text) or ".")


def _writable(text: str, place: str) -> str:
    """An address, where files can be made in a folder that it is or lies in: hours of work end with writing them."""
    address(text)
    if "://" in text:
        return text
    while not os.path.lexists(place):
        place = os.path.dirname(place) or "."
    if not os.path.isdir(place):
        raise ArgumentTypeError(f"{text!r}: {place} is no folder; name another place")
    if not machine.is_writable(place):
        raise ArgumentTypeError(f"{text!r}: {place} can't be written to; name another place")
    return text


def pair(text: str) -> tuple[int, int]:
    """`A:B` as two integers."""
    first, separator, second = text.partition(":")
    try:
        if not separator:
            raise ValueError
        return int(first), int(second)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers A:B") from None


def magnifications(text: str) -> dict[Any, Any]:
    """`0.25,0.5` (equal weights), `0.25=2,0.5=1`, or a range, `uniform:0.25:2`, as `TilePlan` takes them."""
    kind, *ends = text.split(":")
    try:
        if ends:
            return {kind: [float(end) for end in ends]}
        return {float(key): value for key, value in named_weights(text).items()}
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not µm/px values such as 0.25,0.5 or 0.25=2,0.5=1, nor a range such as uniform:0.25:2"
        ) from None


def named_weights(text: str) -> dict[str, float]:
    """`a,b` (equal weights) or `a=2,b=1` as a mapping."""
    parts = [part.partition("=") for part in text.split(",")]
    try:
        return {key: float(value) if separator else 1.0 for key, separator, value in parts}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not names such as a,b or weights such as a=2,b=1") from None
