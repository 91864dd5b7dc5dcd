"""What a user says of mirrors: `FROM=TO`, on a command line or in the variable `TILESTREAM_MIRRORS`.

`streaming.storage.places` obeys it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from streaming.errors import ConfigError

VARIABLE = "TILESTREAM_MIRRORS"


def read_mirrors(texts: Iterable[str]) -> dict[str, str]:
    """`FROM=TO` each, as a mapping.

    Raises:
        ConfigError: one is something else.
    """
    mirrors: dict[str, str] = {}
    for text in texts:
        source, separator, target = text.strip().partition("=")
        if not (separator and target and "://" in source):
            shown = text.partition("?")[0]  # what follows may be a secret
            raise ConfigError(f"mirror {shown!r}; it is FROM=TO, for example s3://idc-open-data=/data/idc")
        mirrors[source] = target
    return mirrors


def default_mirrors() -> dict[str, str]:
    """The mirrors of the variable `TILESTREAM_MIRRORS`, with commas between them.

    Raises:
        ConfigError: they make no sense.
    """
    return read_mirrors(filter(None, os.environ.get(VARIABLE, "").split(",")))
