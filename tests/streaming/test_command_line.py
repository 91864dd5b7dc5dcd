import os
from argparse import ArgumentTypeError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from streaming.command_line import OneLineParser, add_options, file, file_or_folder, folder, read_options


@dataclass(frozen=True, kw_only=True)
class Settings:
    what: Literal["line", "circle"]
    """what is drawn"""
    line_width: float = 0.5
    """px of a line, 100 %"""
    colour: Literal["red", "green"] = "red"
    """of what is drawn"""
    most: int | None = None
    """lines; none: no bound"""
    between: tuple[int, int] = (1, 2)
    """first and last"""
    names: tuple[str, ...] = ()
    """of lines"""
    ends: tuple[Literal["arrow", "dot"], ...] = ()
    """of lines, too"""
    dashed: bool = False
    """whether lines are dashed"""
    rounded: bool = True
    """whether corners are rounded"""
    more: dict[str, str] = field(default_factory=dict)
    """what no option can hold"""


def parser() -> OneLineParser:
    made = OneLineParser(prog="draw", allow_abbrev=False)
    add_options(made, Settings, line_width={"flag": "--width"}, rounded={"help": "corners are sharp"})
    return made


def test_nothing_given_is_the_dataclass_with_its_defaults() -> None:
    args = parser().parse_args(["line"])
    assert read_options(args, Settings) == Settings(what="line")
    assert read_options(args, Settings, more={"a": "b"}) == Settings(what="line", more={"a": "b"})


def test_each_kind_of_field_is_read_from_its_option() -> None:
    words = "circle --width 2 --colour green --most 7 --between 3:4 --names a --names b --dashed --no-rounded"
    words += " --ends dot --ends arrow"
    assert read_options(parser().parse_args(words.split()), Settings) == Settings(
        what="circle",
        line_width=2.0,
        colour="green",
        most=7,
        between=(3, 4),
        names=("a", "b"),
        ends=("dot", "arrow"),
        dashed=True,
        rounded=False,
    )


def test_the_help_is_what_stands_under_the_fields_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--width LINE_WIDTH px of a line, 100 % (0.5)" in told
    assert "--colour {red,green} of what is drawn (red)" in told
    assert "--most MOST lines; left out: no bound --between A:B first and last (1:2)" in told
    assert "--names NAMES of lines; may be repeated --ends {arrow,dot} of lines, too; may be repeated" in told
    assert "--dashed lines are dashed --no-rounded corners are sharp" in told
    assert "--more" not in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("square", "argument WHAT: invalid choice: 'square'"),
        ("line --width thin", "argument --width: invalid float value: 'thin'"),
        ("line --between 3", "argument --between: '3' is not two numbers A:B"),
        ("line --ends square", "argument --ends: invalid choice: 'square'"),
        ("line --line-width 3", "unrecognized arguments: --line-width 3"),
        ("line --col red", "unrecognized arguments: --col red"),
        ("--what=line", "the following arguments are required: WHAT; unrecognized: --what; see"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(capsys: pytest.CaptureFixture[str], words: str, told: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"draw: {told}")


def test_a_place_that_no_file_can_be_written_to_is_refused_before_any_work(tmp_path: Path) -> None:
    text, locked, pipe = tmp_path / "text", tmp_path / "locked", tmp_path / "pipe"
    text.touch()
    locked.mkdir(mode=0o500)
    os.mkfifo(pipe)
    for kind in (folder, file, file_or_folder):
        assert kind(f"{tmp_path}/a/b/c") == f"{tmp_path}/a/b/c"
        assert kind("s3://bucket/a") == "s3://bucket/a"
        assert kind("a") == "a"
        with pytest.raises(ArgumentTypeError, match=f"{text} is no folder; name another place"):
            kind(f"{text}/a/b")
        with pytest.raises(ArgumentTypeError, match="an address is empty"):
            kind("")
        # To root, the system says of /proc what is not so.
        for place in ("/proc", str(locked))[: 2 if os.geteuid() else 1]:
            with pytest.raises(ArgumentTypeError, match=f"{place} can't be written to"):
                kind(f"{place}/a/b")
        with pytest.raises(ArgumentTypeError, match=r"pipe.* is (no folder|neither a file nor a folder); name another"):
            kind(str(pipe))
    assert file(str(text)) == file_or_folder(str(text)) == str(text)
    assert folder(str(tmp_path)) == file_or_folder(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ArgumentTypeError, match="is no folder"):
        folder(str(text))
    with pytest.raises(ArgumentTypeError, match="is a folder; name a file"):
        file(str(tmp_path))


def test_fields_of_one_name_of_two_dataclasses_do_not_meet() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Others:
        most: int = 3

    both = OneLineParser(prog="draw")
    add_options(both, Settings, only=("most",))
    add_options(both, Others, most={"flag": "--most-others"})
    args = both.parse_args(["--most", "1", "--most-others", "2"])
    assert read_options(args, Settings, what="line").most == 1
    assert read_options(args, Others).most == 2
