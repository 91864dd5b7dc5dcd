"""The options of all commands: one name means one thing."""

from argparse import Action, ArgumentParser
from typing import Any

import pytest

from streaming.command_line import file, file_or_folder, folder
from trainer.cli import build_parser, main

# What takes one value in one command, and several in another, of the same thing: a mix, the points of a curve.
SEVERAL = {"--mpp", "--slides", "--tiles-per-slide"}
# Each of these begins with what is said of it in all commands: the rest says what it is there.
MEANINGS = {
    "--batch": "tiles of a step",
    "--k": "neighbours of",
    "--max-upsampling": "times that a slide's pixels may be enlarged",
    "--model-batch": "tiles that the model sees at once",
    "--mpp": "µm/px",
    "--requests-in-flight": "requests",
    "--slide-mpp": "µm/px at level 0 of slides whose metadata has none",
    "--slides-in": "catalogs, folders or files of the slides that are named",
    "--steps": "steps A to B-1",
}


def options() -> dict[str, list[tuple[str, Action]]]:
    (commands,) = (action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    found: dict[str, list[tuple[str, Action]]] = {}
    for name, parser in commands.items():
        assert isinstance(parser, ArgumentParser)
        for action in parser._actions:
            for option in action.option_strings:
                found.setdefault(option, []).append((name, action))
    return found


def test_an_option_of_several_commands_takes_the_same_in_all() -> None:
    for option, uses in options().items():
        if option in SEVERAL:
            continue
        kinds: set[Any] = {(type(use), use.type in (None, str) or use.type, use.nargs) for _, use in uses}
        # An address that files are written to is still an address.
        texts = {kind for kind in kinds if kind[1] is True or kind[1] in (file, folder, file_or_folder)}
        assert len(kinds - texts) + bool(texts) == 1, f"{option}: {uses}"


def test_an_option_means_the_same_in_all_commands() -> None:
    found = options()
    for option, meaning in MEANINGS.items():
        for command, use in found[option]:
            assert str(use.help).startswith(meaning), f"{command} {option}: {use.help}"
    assert all(option.startswith("--") for option in found if option != "-h")


def test_a_run_that_can_t_be_written_is_refused_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "debug", "--data.catalog", "none", "--run.out", "/proc/x"]) == 2
    told = capsys.readouterr().err
    assert told == "tilestream: run.out: '/proc/x': /proc can't be written to; name another place\n"
