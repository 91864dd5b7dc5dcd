"""A state's tensors as files: one of each rank that keeps a part, and an index that says what lies where.

The way of torch's distributed checkpoints, whose planner cuts what ranks save, and fits it to whatever ranks load it.
Files and index are this project's: torch's are pickles, which may run code, and are written past `streaming.storage`.
Each piece of a tensor is its bytes, in the order of its rows, with a checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Generator, Mapping
from itertools import groupby
from typing import Any, BinaryIO, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_only, tree_map_with_path

from streaming import storage
from streaming.errors import CheckpointError, TilestreamError

# Said of each process that saves or loads by itself, which is nothing to warn of.
warnings.filterwarnings("ignore", "torch.distributed is disabled", module="torch.distributed.checkpoint")
_PIECE = 16 << 20


class Piece(NamedTuple):
    """A part of a tensor, and where its bytes are."""

    offsets: tuple[int, ...]
    """of its first element in the tensor"""
    sizes: tuple[int, ...]
    file: str
    start: int
    nbytes: int
    sha256: str


class Index(NamedTuple):
    """What a state is, but for the values of its tensors."""

    state: dict[str, Any]
    """with tensors of torch's meta device"""
    pieces: dict[str, list[Piece]] | None
    """of each tensor, by its name in `named_tensors`; none: the values lie in the index's own file"""

    @property
    def is_one_file(self) -> bool:
        """Whether it is of the first version of checkpoints."""
        return self.pieces is None

    @property
    def parts(self) -> dict[str, list[Piece]]:
        """Of each tensor, where there are any."""
        assert self.pieces is not None, "a state of one file is loaded whole"
        return self.pieces

    def to_bytes(self) -> bytes:
        """As `from_bytes` reads it."""
        content = io.BytesIO()
        torch.save(
            {"state": self.state, "pieces": {name: [*map(tuple, of)] for name, of in self.parts.items()}}, content
        )
        return content.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> Index:
        """What was written; nothing in it is ever executed.

        Raises:
            pickle.UnpicklingError, RuntimeError: it holds more than tensors and plain values.
        """
        found = torch.load(io.BytesIO(content), weights_only=True)
        return Index(found["state"], {name: [Piece(*one) for one in of] for name, of in found["pieces"].items()})


def named_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of nested dictionaries and lists, by the way to each."""
    leaves, _ = tree_flatten_with_path(state)
    return {keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def without_values(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same with whole tensors of the meta device."""
    return cast(
        "dict[str, Any]",
        tree_map_only(Tensor, lambda one: torch.empty(one.shape, dtype=one.dtype, device="meta"), dict(state)),
    )


def save(
    uri: str,
    state: Mapping[str, Any],
    finish: Callable[[Index], None],
    options: storage.StorageOptions | None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes the tensors into files of a folder; the first rank then finishes, once all have done so.

    All ranks of the group call it, each with its part of every DTensor. Without a group, a process saves alone.

    Raises:
        TilestreamError: what went wrong on any of the ranks.
    """
    writer = _Writer(uri, without_values(state), finish, options)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _told_as_it_was():
        save_parts(
            cast("dict[str, Any]", named_tensors(state)),
            storage_writer=writer,
            planner=planner,
            process_group=group,
            no_dist=group is None,
        )


def load(
    uri: str,
    index: Index,
    into: dict[str, Tensor],
    options: storage.StorageOptions | None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fills tensors that are there with what a folder's files hold under their names.

    All ranks of the group call it, each with its part of every DTensor, however many ranks have saved; what a rank does
    not have, it does not read. Without a group, a process loads alone.

    Raises:
        CheckpointError: a file does not match its checksums, or has no such tensor.
        StorageError: it can't be read.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _told_as_it_was():
        load_parts(
            cast("dict[str, Any]", into),
            storage_reader=_Reader(uri, index, options),
            planner=planner,
            process_group=group,
            no_dist=group is None,
        )


def load_whole(
    uri: str,
    index: Index,
    options: storage.StorageOptions | None,
    wanted: Callable[[str], bool] = bool,
) -> dict[str, Any]:
    """A state with whole tensors on this host; those whose names are not wanted have no values.

    Raises:
        CheckpointError, StorageError: as `load`.
    """
    into = {
        name: torch.empty_like(one, device="cpu") for name, one in named_tensors(index.state).items() if wanted(name)
    }
    load(uri, index, into, options)
    return cast("dict[str, Any]", tree_map_with_path(lambda path, leaf: into.get(keystr(path), leaf), index.state))


def verify(uri: str, index: Index, options: storage.StorageOptions | None) -> None:
    """Reads all files through and compares them with their checksums, in little memory.

    Raises:
        CheckpointError: one does not match.
        StorageError: one can't be read.
    """
    pieces = sorted((piece for of in index.parts.values() for piece in of), key=lambda piece: (piece.file, piece.start))
    for name, of_file in groupby(pieces, key=lambda piece: piece.file):
        with _opened(uri, name, options) as file:
            for piece in of_file:
                known, nbytes = hashlib.sha256(), piece.nbytes
                file.seek(piece.start)
                while nbytes and (content := file.read(min(nbytes, _PIECE))):
                    known.update(content)
                    nbytes -= len(content)
                _compare(uri, piece, known.hexdigest())


def damaged(uri: str, what: str) -> CheckpointError:
    """What is told of a checkpoint that is not what was written."""
    return CheckpointError(
        f"{uri}: {what} does not match its checksum; delete this folder to go on from the one before"
    )


def _compare(uri: str, piece: Piece, sha256: str) -> None:
    if sha256 != piece.sha256:
        raise damaged(uri, f"{piece.file}, of bytes {piece.start:,} to {piece.start + piece.nbytes:,},")


class _PlansAsTheyAre:
    """What torch asks of a writer and of a reader, that folders need not."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003 — torch's seam
        return True


class _Writer(_PlansAsTheyAre, StorageWriter):
    """Writes a rank's pieces into one file."""

    def __init__(
        self,
        uri: str,
        state: dict[str, Any],
        finish: Callable[[Index], None],
        options: storage.StorageOptions | None,
    ) -> None:
        self._uri, self._state, self._finish, self._options = uri, state, finish, options

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"state-{dist.get_rank() if dist.is_initialized() else 0:05d}.bin"

        def write(file: BinaryIO) -> list[WriteResult]:
            results, start = list[WriteResult](), 0
            for item in plan.items:
                assert item.tensor_data is not None, "what is no tensor is in the index"
                tensor = cast(Tensor, planner.resolve_data(item)).detach().cpu().contiguous()
                content = tensor.view(-1).view(torch.uint8).numpy().data
                file.write(content)
                chunk = item.tensor_data.chunk
                piece = Piece(
                    tuple(chunk.offsets),
                    tuple(chunk.sizes),
                    name,
                    start,
                    content.nbytes,
                    hashlib.sha256(content).hexdigest(),
                )
                results.append(WriteResult(item.index, content.nbytes, piece))
                start += content.nbytes
            return results

        done = Future[list[WriteResult]]()
        done.set_result(storage.write_stream(storage.join(self._uri, name), write, self._options) if plan.items else [])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pieces: dict[str, list[Piece]] = {name: [] for name in metadata.state_dict_metadata}
        for result in (result for of_rank in results for result in of_rank):
            pieces[result.index.fqn].append(result.storage_data)
        self._finish(Index(self._state, pieces))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass


class _Reader(_PlansAsTheyAre, StorageReader):
    """Reads the pieces that a rank wants."""

    def __init__(self, uri: str, index: Index, options: storage.StorageOptions | None) -> None:
        self._uri, self._index, self._options = uri, index, options

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002 — torch's seam
        of = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=one.dtype),
                one.shape,
                [
                    ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
                    for piece in self._index.parts[name]
                ],
            )
            for name, one in named_tensors(self._index.state).items()
        }
        return Metadata(cast("dict[str, Any]", of))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        where = {MetadataIndex(name, piece.offsets): piece for name, of in self._index.parts.items() for piece in of}
        dtypes = {name: one.dtype for name, one in named_tensors(self._index.state).items()}
        wanted = sorted(
            ((where[item.storage_index], item) for item in plan.items), key=lambda one: (one[0].file, one[0].start)
        )
        for name, of_file in groupby(wanted, key=lambda one: one[0].file):
            with _opened(self._uri, name, self._options) as file:
                for piece, item in of_file:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(self._read(file, piece, item, dtypes[item.storage_index.fqn]))
        done = Future[None]()
        done.set_result(None)
        return done

    def _read(self, file: BinaryIO, piece: Piece, item: ReadItem, dtype: torch.dtype) -> Tensor:
        """What is wanted of a piece; of rows that are some of its rows, those alone are read, and not compared."""
        sizes, offsets, lengths = list(piece.sizes), list(item.storage_offsets), list(item.lengths)
        start, nbytes = 0, piece.nbytes
        if sizes != lengths and sizes[1:] == lengths[1:]:
            row = nbytes // sizes[0]
            start, nbytes, sizes, offsets = offsets[0] * row, lengths[0] * row, lengths, [0] * len(sizes)
        file.seek(piece.start + start)
        content = bytearray(file.read(nbytes))
        if nbytes == piece.nbytes:
            _compare(self._uri, piece, hashlib.sha256(content).hexdigest())
        elif len(content) < nbytes:
            raise damaged(self._uri, piece.file)
        if not content:
            return torch.empty(lengths, dtype=dtype)
        tensor = torch.frombuffer(content, dtype=dtype).view(sizes)
        for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
            tensor = tensor.narrow(dim, offset, length)
        return tensor

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass


@contextlib.contextmanager
def _opened(uri: str, name: str, options: storage.StorageOptions | None) -> Generator[BinaryIO]:
    path = storage.join(uri, name)
    if not storage.exists(path, options):
        raise damaged(uri, f"{name}, which is not there,")
    with storage.reading(path, options) as file:
        yield file


@contextlib.contextmanager
def _told_as_it_was() -> Generator[None]:
    """Raises what went wrong on the first rank where something did, without what torch wraps it in."""
    try:
        yield
    except CheckpointException as error:
        found = (one for one, _ in error.failures.values() if isinstance(one, TilestreamError))
        if (first := next(found, None)) is None:
            raise
        raise first from error
