"""What the project's pages name (commands, options, fields, files, links), held against the code.

A command in an `sh` block is one that `tests/test_docs.py` runs, or one that is checked here without running it: by the
parser that would read it, or by what it names. Any other is a trouble, so that no command goes unnoticed.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import yaml

from streaming.errors import ConfigError
from trainer.cli import build_parser
from trainer.run.config import config_parser, parse_config, read_config

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "streaming/README.md", "trainer/README.md", "deploy/README.md", "benchmarks/README.md")

_SECTION = r"(?:run|data|augment|mask|model|loss|optim|train|watch)"
_FIELD = re.compile(rf"{_SECTION}(?:\.[A-Za-z_]+)+")
_FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|md|ya?ml|toml|lock)")
_FOLDER = re.compile(r"[\w.-]+/[\w./-]*")
_VARIABLE = re.compile(r"(?:AWS|AZURE|GOOGLE|RAY|TILESTREAM)_[A-Z_]+")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; line is its first line's number."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command of an `sh` block, continued lines joined, comments gone."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """The program and its arguments."""
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def blocks(page: str, text: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = list[Block]()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        found.append(Block(page, text.count("\n", 0, match.start()) + 2, match[1], match[2]))
    return found


def commands(block: Block) -> list[Command]:
    """The commands of an `sh` block."""
    found, joined, first = list[Command](), "", 0
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        first = first if joined else number
        joined += line
        if joined.endswith("\\"):
            joined = joined.removesuffix("\\")
            continue
        command = Command(block.page, first, " ".join(joined.split()))
        joined = ""
        if command.words:
            found.append(command)
    return found


def script_name(block: Block) -> str | None:
    """The file that a block of Python is to be kept in, where its first line names one; else it is run as it stands."""
    match = re.match(r"# (\w+\.py)\n", block.text)
    return match[1] if match else None


@cache
def scripts() -> dict[str, str]:
    """The files that the pages tell users to write."""
    found = [block for page in PAGES for block in blocks(page, (ROOT / page).read_text()) if block.language == "python"]
    return {name: block.text for block in found if (name := script_name(block))}


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """What stands in the prose between backticks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def troubles(page: str, text: str) -> Iterator[str]:
    """What a page says that is not so, each with its place."""
    if len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) != 2 * len(blocks(page, text)):
        yield f"{page}: a block that is indented or not closed, which nothing here reads"
    for block in blocks(page, text):
        yield from (f"{page}:{block.line}: {trouble}" for trouble in _of_block(block))
    for span in spans(text):
        yield from (f"{page}: `{span}`: {trouble}" for trouble in _of_span(page, span))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if not target.startswith(("https://", "http://")) and (trouble := _of_link(page, text, target)):
            yield f"{page}: link {target}: {trouble}"


def _of_block(block: Block) -> Iterator[str]:
    match block.language:
        case "sh":
            for command in commands(block):
                if trouble := command_trouble(command.words):
                    yield f"{command.text}: {trouble}"
        case "python":
            compile(block.text, block.page, "exec")  # test_docs runs it
        case "yaml":
            values = yaml.safe_load(block.text)
            if "resources" in values:
                yield from _of_overlay(values)
            else:
                yield from _of_configuration(values)
        case "":
            for line in block.text.splitlines():
                if line.split()[:1] and line.split()[0] in _CHECKS:
                    yield f"{line.strip()}: a command in a block that is not marked as sh"
            for name in re.findall(r"(?:streaming|trainer)/[\w./-]*", block.text):
                if not (ROOT / name).exists():
                    yield f"{name}: there is no such file"
        case other:
            yield f"a block of {other!r}, which nothing here reads"


def _of_configuration(values: dict[str, Any]) -> Iterator[str]:
    """A part of a training's configuration."""
    try:
        parse_config(values, [])
    except ConfigError as error:
        yield str(error)


def _of_overlay(overlay: dict[str, Any]) -> Iterator[str]:
    """A kustomization beside a clone `tilestream`: what it takes from there must exist, its entrypoint must parse."""
    for name in (*overlay["resources"], *overlay["components"]):
        if not (ROOT / name.removeprefix("../tilestream/")).exists():
            yield f"{name}: there is no such folder"
    for patch in overlay["patches"]:
        for entry in yaml.safe_load(patch["patch"]):
            if trouble := command_trouble(shlex.split(entry["value"].replace("…", ""))):
                yield f"{entry['value']}: {trouble}"


def _of_span(page: str, span: str) -> Iterator[str]:
    words = span.removeprefix("exec ").split()
    field = words[0].removeprefix("--")
    if words[0] in _CHECKS and words[0] != "." and len(words) > 1:
        # In prose a command may be named without all of its arguments.
        if trouble := _named_trouble(words):
            yield trouble
    elif _FIELD.fullmatch(field):
        if not _is_field(field):
            yield "no such field of the configuration"
    elif words[0].startswith("--"):
        name = words[0].split("=")[0]
        if name not in _all_options() and name not in _OPTIONS_OF_OTHERS:
            yield "no command has such an option"
    elif _VARIABLE.fullmatch(span):
        if span not in _sources():
            yield "nothing here knows such a variable"
    elif (_FILE.fullmatch(span) or (_FOLDER.fullmatch(span) and _begins_here(page, span))) and not _exists(page, span):
        yield "there is no such file"


# Of ray job submit, of docker build, of sbatch, and what stands for any field.
_OPTIONS_OF_OTHERS = {"--working-dir", "--build-arg", "--requeue", "--section.key"}
_MADE_BY_USERS = {"bach.yaml"}
_MADE_BY_EXPORT = {"trident_encoder.py", "patho_bench_encoder.py", "thunder_model.py"}


def _exists(page: str, name: str) -> bool:
    """Whether a file lies in the repository, or beside the page."""
    made = name in _MADE_BY_USERS | _MADE_BY_EXPORT
    return made or any((base / name).exists() for base in (ROOT, (ROOT / page).parent))


def _begins_here(page: str, name: str) -> bool:
    """Whether a path begins with a folder of the repository, or of the page's."""
    first = name.split("/")[0]
    return any((base / first).is_dir() for base in (ROOT, (ROOT / page).parent))


def _of_link(page: str, text: str, target: str) -> str | None:
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    if not file.exists():
        return "there is no such file"
    if anchor:
        content = text if not path else file.read_text()
        headings = re.findall(r"^#+ (.*)$", prose(content), re.MULTILINE)
        if anchor not in [re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in headings]:
            return "the page has no such heading"
    return None


def _is_field(name: str) -> bool:
    fields = _fields()
    # A section has fields below it; a map of a field has keys of its own.
    return any(name == f or f.startswith(f"{name}.") for f in fields) or any(
        name.startswith(f"{f}.") for f in fields if f.rsplit("_", 1)[-1] in ("labels", "resources", "options")
    )


@cache
def _fields() -> tuple[str, ...]:
    return tuple(config_parser().get_defaults().keys())


@cache
def _subcommands() -> dict[str, Any]:
    (subparsers,) = (action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    return subparsers


def _options(command: str) -> set[str]:
    return {option for action in _subcommands()[command]._actions for option in action.option_strings}


@cache
def _all_options() -> set[str]:
    options = set[str]().union(*(_options(command) for command in _subcommands()))
    return options | {option for name in benchmarks() for option in _benchmark_options(name)}


def benchmarks() -> list[str]:
    """The names that `tilestream bench` takes."""
    files = (ROOT / "benchmarks").glob("*.py")
    return sorted(file.stem for file in files if file.stem not in _SHARED)


# What benchmarks share, as `streaming.cli.run_bench` has it.
_SHARED = ("common", "latency_server", "mission", "table")


def _benchmark_options(name: str) -> set[str]:
    """A benchmark's options, by its source: to ask it would import all that it measures."""
    text = (ROOT / "benchmarks" / f"{name}.py").read_text() + (ROOT / "benchmarks/table.py").read_text()
    return set(re.findall(r'"(--[a-z-]+)"', text))


@cache
def _sources() -> str:
    """All code, and what the usual clients of S3 take from the environment by themselves."""
    files = [path for folder in ("streaming", "trainer", "deploy", "tests") for path in (ROOT / folder).rglob("*.*")]
    code = (path.read_text() for path in files if path.suffix in (".py", ".yaml"))
    return "\n".join((*code, "AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID RAY_API_SERVER_ADDRESS"))


def command_trouble(words: Sequence[str]) -> str | None:
    """What is wrong with a whole command, None where nothing is."""
    check = _CHECKS.get(words[0])
    return check(words[1:]) if check else "nothing runs or checks this program"


def _named_trouble(words: Sequence[str]) -> str | None:
    if words[0] != "tilestream":
        return command_trouble(words)
    if words[1] == "--version":
        return None
    if words[1] not in _subcommands():
        return None if words[1].isupper() else f"there is no tilestream {words[1]}"
    known = _options(words[1]) | (set().union(*map(_benchmark_options, benchmarks())) if words[1] == "bench" else set())
    for word in words[2:]:
        if word.startswith("--") and word not in known and not _is_field(word[2:]):
            return f"tilestream {words[1]} has no {word}"
    return None


def _tilestream(arguments: Sequence[str]) -> str | None:
    parser, said = build_parser(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args, rest = parser.parse_known_args(arguments)
    except SystemExit:
        return said.getvalue().strip()
    if rest and not getattr(args, "takes_overrides", False):
        return f"unrecognised arguments {rest}"
    if arguments[0] == "bench":
        unknown = [name for name in args.names if name not in benchmarks()]
        options = {word for word in rest if word.startswith("--")}
        for name in set(args.names) - set(unknown):
            unknown += [f"{name} {option}" for option in options - _benchmark_options(name)]
        return f"tilestream bench has no {unknown}" if unknown else None
    if getattr(args, "config", None):
        try:
            read_config(args.config, rest)
        except ConfigError as error:
            return str(error)
    return None


def _ray(arguments: Sequence[str]) -> str | None:
    from ray.dashboard.modules.job.cli import job_cli_group
    from ray.scripts.scripts import cli

    group, rest = (job_cli_group, arguments[1:]) if arguments[0] == "job" else (cli, arguments)
    if rest[0] not in group.commands:
        return f"ray has no {rest[0]}"
    try:
        context = group.commands[rest[0]].make_context(rest[0], list(rest[1:]))
    except click.MissingParameter:  # in prose
        return None
    except click.UsageError as error:
        return error.format_message()
    job = context.params.get("entrypoint")
    return command_trouble(job) if job else None


def _docker(arguments: Sequence[str]) -> str | None:
    given = dict(pairwise(arguments))
    if arguments[0] != "build" or not (ROOT / given.get("-f", "?")).is_file():
        return "docker build takes a Dockerfile that exists"
    text = (ROOT / given["-f"]).read_text()
    if not re.search(rf"^FROM .* AS {given.get('--target')}$", text, re.MULTILINE):
        return f"the Dockerfile has no target {given.get('--target')}"
    if not re.search(rf"^ARG {given.get('--build-arg', '').split('=')[0]}$", text, re.MULTILINE):
        return f"the Dockerfile has no argument {given.get('--build-arg')}"
    return None if arguments[-1] == "." else "the build needs the repository as its context"


def _kubectl(arguments: Sequence[str]) -> str | None:
    verb = next((word for word in arguments if word in ("apply", "kustomize", "port-forward", "get")), None)
    if verb is None:
        return f"kubectl {arguments[0]}: nothing checks that"
    # Objects that KubeRay makes of our RayCluster: the head's service and the token.
    made = {"port-forward": "svc/tilestream-head-svc", "get": "tilestream"}
    return None if verb not in made or made[verb] in arguments else f"kubectl {verb}: of what KubeRay makes nothing"


def _make(arguments: Sequence[str]) -> str | None:
    targets = re.findall(r"^([\w-]+(?: [\w-]+)*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    known = {target for line in targets for target in line.split()}
    unknown = [target for target in arguments if target not in known]
    return f"the Makefile has no {unknown}" if unknown else None


def _pip(arguments: Sequence[str]) -> str | None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"\.\[([\w,]+)\]", " ".join(arguments))
    unknown = [e for extra in extras for e in extra.split(",") if e not in project["optional-dependencies"]]
    return f"pyproject.toml has no extra {unknown}" if unknown else None


def _python(arguments: Sequence[str]) -> str | None:
    if arguments[0] != "-m" or (spec := find_spec(arguments[1])) is None or spec.origin is None:
        return f"there is no module {arguments[1]}"
    source = Path(spec.origin).read_text()
    unknown = [word for word in arguments[2:] if word.startswith("--") and f'"{word}"' not in source]
    return f"{arguments[1]} has no {unknown}" if unknown else None


def _pytest(arguments: Sequence[str]) -> str | None:
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    known = {marker.split(":")[0] for marker in markers}
    return None if arguments[0] == "-m" and arguments[1] in known else f"pytest has no marker {arguments[1:]}"


def _assignments(arguments: Sequence[str]) -> str | None:
    names = [word.split("=")[0] for word in arguments if re.match(r"[A-Z_]+=", word)]
    unknown = [name for name in names if not name.startswith("RAY_")]
    return f"nothing knows {unknown}" if unknown or not names else None


def _torchrun(arguments: Sequence[str]) -> str | None:
    return None if arguments[-1] in scripts() else f"no page has a block of python that begins with # {arguments[-1]}"


def _sbatch(arguments: Sequence[str]) -> str | None:
    at = next((number for number, word in enumerate(arguments) if word.endswith(".sh")), None)
    if at is None or not (ROOT / arguments[at]).is_file():
        return "sbatch takes a batch script that exists"
    return _tilestream(["train", *arguments[at + 1 :]])


def _fine(arguments: Sequence[str]) -> None:
    """A command of the system's, or that makes a name for the next one."""


_CHECKS: dict[str, Callable[[Sequence[str]], str | None]] = {
    "tilestream": _tilestream,
    "ray": _ray,
    "docker": _docker,
    "kubectl": _kubectl,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "torchrun": _torchrun,
    "sbatch": _sbatch,
    "pytest": _pytest,
    "export": _assignments,
    "apt-get": _fine,
    ".": lambda words: None if list(words) == [".venv/bin/activate"] else "that is not the environment of make",
    "BASE=python:3.11-slim-bookworm@sha256:…": _fine,  # of docker build
    "TORCH_INDEX=…": _fine,
}
