"""Folders of this machine that are their user's alone: what processes of a node share there, nobody else may change."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from streaming.errors import NodeError


def make_private(folder: Path, remedy: str) -> None:
    """Makes a folder for this user alone, or sees that nobody else may write into the one that is there.

    Raises:
        NodeError: others may, or it can't be made; its message ends with the remedy.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.stat(folder)
    except OSError as error:
        raise NodeError(f"{folder}: can't be used ({error.strerror}); {remedy}") from error
    if found.st_uid != os.geteuid():
        raise NodeError(f"{folder}: is of another user (uid {found.st_uid}), who could change files in it; {remedy}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NodeError(f"{folder}: others may write into it and change files; chmod 700 it, or {remedy}")
