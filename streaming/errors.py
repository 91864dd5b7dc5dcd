"""What can go wrong, as one family.

TilestreamError            everything a user can act on; the command line prints it as one line and exits 2
├── ConfigError            a configuration or argument that makes no sense (also a ValueError)
├── StorageError           a file, bucket or object that can't be reached, read or written
│   ├── DeniedError        one that may not be read or written with these credentials
│   ├── MissingError       one that is not there
│   ├── NoRangesError      one whose server sends whole files only
│   └── UnreachableError   one that may be reached later: the storage throttles, is in trouble, or does not answer
├── SlideError             a slide that can't be opened or decoded, or has no usable mpp
├── CatalogError           no catalog, an empty one, or one of another version
├── PlanError              a catalog that can't give the tiles that the plan asks for
├── CheckpointError        no checkpoint, a damaged one, or one of another architecture
├── TrainingError          a run whose loss, gradients or embeddings broke down
├── NodeError              a machine that has no room for what it must hold, or no cache that it can use
└── StreamError            more tiles fail than the run allows, or the stream gave other tiles than planned

Members hold one string, so they pickle across Ray; where an error passes through a stage it gets a note (`add_note`).
A message says what, where, the numbers, and the next action, in one line.
"""

from __future__ import annotations

from streaming.secrets import without_secrets

EMPTY_ADDRESS = "an address is empty; is a variable of the shell that it comes from not set?"


class TilestreamError(Exception):
    """Base of all errors a user can act on; a message names addresses without their queries and passwords."""

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))


class ConfigError(TilestreamError, ValueError):
    """A configuration or argument that makes no sense."""


class StorageError(TilestreamError):
    """A file, bucket or object that can't be reached, read or written."""


class DeniedError(StorageError):
    """A file, object or bucket that may not be read or written with these credentials."""


class MissingError(StorageError):
    """A file, folder, object or bucket that is not there."""


class NoRangesError(StorageError):
    """An object whose server sends whole files only, so that it must be copied."""


class UnreachableError(StorageError):
    """Storage that throttles, is in trouble, or does not answer: it may do so later."""


class SlideError(TilestreamError):
    """A slide that can't be opened or decoded, or has no usable mpp."""


class CatalogError(TilestreamError):
    """No catalog, an empty one, or one of another version."""


class PlanError(TilestreamError):
    """A catalog that can't give the tiles that the plan asks for."""


class CheckpointError(TilestreamError):
    """No checkpoint, a damaged one, or one of another architecture."""


class TrainingError(TilestreamError):
    """A run whose loss, gradients or embeddings broke down."""


class NodeError(TilestreamError):
    """A machine that has no room for what it must hold, or no cache that it can use; no tile is replaced for it."""


class StreamError(TilestreamError):
    """More tiles fail than the run allows, or the stream gave other tiles than planned."""


def root_cause(error: BaseException) -> BaseException:
    """The first TilestreamError in the chain behind an error, else the error itself, without Ray's wrapping.

    Ray wraps what a worker raises (`RayTaskError`, `UserCodeException`, `WorkerGroupError`): the user wants the inside.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        candidate = pending.pop(0)
        if candidate is None or id(candidate) in seen:
            continue
        seen.add(id(candidate))
        # Ray's own error is of the inner one's class as well, and tells a traceback.
        if isinstance(candidate, TilestreamError) and not hasattr(candidate, "as_instanceof_cause"):
            return candidate
        inside: list[object] = [getattr(candidate, name, None) for name in ("cause", "controller_failure")]
        inside += dict(getattr(candidate, "worker_failures", None) or {}).values()
        pending += [part for part in inside if isinstance(part, BaseException)]
        pending += [candidate.__cause__, candidate.__context__]
    while hasattr(error, "as_instanceof_cause") and isinstance(inner := getattr(error, "cause", None), BaseException):
        error = inner
    return error
