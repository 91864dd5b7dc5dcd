"""What becomes of output that nobody reads, that a terminal has no letters for, or that has no room."""

import os
import subprocess
import sys

import pytest

LINES = """
import sys
from streaming.command_line import is_unread, out, terminal
with terminal():
    out("5 \\u00b5m, \\udcff")
    sys.stderr.write("\\u2192\\n")
    for _ in range(2000):
        out("line " * 20)
"""


def run(shell: str, *command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command as "$@" of a bash script."""
    script = ["bash", "-o", "pipefail", "-c", shell, "bash", *command]
    return subprocess.run(script, capture_output=True, env=os.environ | environment)


@pytest.mark.parametrize(
    ("shell", "status", "said"),
    [
        ('"$@" 2>/dev/null | head -1', 1, 1),
        ('"$@" 2>&1 >/dev/null | true', 1, 0),
        ('"$@" >&- 2>&-', 0, 0),
    ],
)
def test_a_closed_stream_is_silent(shell: str, status: int, said: int) -> None:
    ended = run(shell, sys.executable, "-c", LINES)
    assert (ended.returncode, ended.stderr, len(ended.stdout.splitlines())) == (status, b"", said)


def test_what_an_encoding_lacks_is_replaced() -> None:
    ended = run('"$@" | head -1', sys.executable, "-c", LINES, PYTHONIOENCODING="ascii")
    assert (ended.stdout, ended.stderr) == (b"5 ?m, ?\n", b"?\n")
    assert run('"$@" | head -1', sys.executable, "-c", LINES, PYTHONIOENCODING="utf-8").stdout == "5 µm, ?\n".encode()


def test_a_full_disk_is_one_line_and_status_1() -> None:
    ended = run('"$@" > /dev/full', sys.executable, "-m", "trainer.cli", "doctor", "--no-ray")
    assert ended.returncode == 1
    assert ended.stderr.decode().splitlines() == [
        "tilestream: unexpected OSError: [Errno 28] No space left on device; --verbose shows the traceback"
    ]


def test_help_may_be_cut_off_and_an_error_s_line_unread() -> None:
    cli = [sys.executable, "-m", "trainer.cli"]
    ended = run('"$@" | head -1', *cli, "catalog", "--help", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (0, b"")
    ended = run('"$@" 2>&1 | true', *cli, "doctor", "--no-such-option")
    assert (ended.stdout, ended.stderr) == (b"", b"")
