"""Files of embeddings, one a slide, written piece by piece: Parquet, or HDF5 as CLAM and TRIDENT lay it out."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, cast, get_args

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from streaming import storage
from streaming.catalog.sources import is_of_system
from streaming.catalog.tiling import rows_and_columns, tile_extent
from streaming.errors import ConfigError
from trainer.embed.options import Format, Precision, Token
from trainer.embed.passes import check_finite

Array = NDArray[Any]

REJECTED = ".rejected/rejected.parquet"
"""below the folder of embeddings: what reads all files of a folder passes over what begins with a point"""
ABOUT = "tilestream.embedded"
"""metadata that tells what is embedded"""
SUFFIXES: dict[Format, str] = {"parquet": ".parquet", "h5": ".h5"}
STORE_S = ".zarr/"
assert set(SUFFIXES) == set(get_args(Format))


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """What the embeddings of a slide are of; each file tells it."""

    slide: str
    name: str
    """its file name without suffix"""
    width: int
    """level-0 px"""
    height: int
    """level-0 px"""
    slide_mpp: float
    """µm/px at level 0"""
    mpp: float
    """µm/px of the tiles"""
    size: int
    """side of a tile in px"""
    origin: Sequence[int] = (0, 0)
    """x, y of the level-0 px from which QuPath counts: the corner of what was scanned (`slide.bounds`)"""
    token: Token
    precision: Precision
    model: str
    """where the model came from"""
    model_sha256: str

    @property
    def extent(self) -> int:
        """Side of a tile in whole level-0 px."""
        return round(self.exact_extent)

    @property
    def exact_extent(self) -> float:
        """The same without rounding, by which the tiles are laid out."""
        return tile_extent(self.size, self.mpp, self.slide_mpp)

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Embedded:
        """What `to_json` gave."""
        return cls(**json.loads(text))


class Writer(Protocol):
    """A file under way; a context manager that closes it."""

    def append(self, corners: NDArray[np.int64], embedding: NDArray[np.float32], tokens: Array | None) -> None:
        """Adds tiles: level-0 corners (n, 2), embeddings (n, D), token maps float16 (n, rows, columns, D) or none."""
        ...

    def __enter__(self) -> Writer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def open_writer(format: Format, path: str, about: Embedded) -> Writer:
    """The file of a slide at a local path, in that format."""
    return {"parquet": ParquetFile, "h5": Hdf5File}[format](path, about)


class ParquetFile:
    """Columns `slide`, `x`, `y` (level-0 px), `mpp`, `size`, `embedding` and, if there are any, `tokens`.

    The schema's metadata holds what is embedded as JSON under `tilestream.embedded`.
    """

    def __init__(self, path: str, about: Embedded) -> None:
        self._path, self._about = path, about
        self._writer: pq.ParquetWriter | None = None

    def append(self, corners: NDArray[np.int64], embedding: NDArray[np.float32], tokens: Array | None) -> None:
        """Adds a row group."""
        n, width = embedding.shape
        about = self._about
        columns: dict[str, Any] = {
            "slide": pa.array([about.slide] * n, pa.string()),
            "x": pa.array(corners[:, 0], pa.int64()),
            "y": pa.array(corners[:, 1], pa.int64()),
            "mpp": pa.array([about.mpp] * n, pa.float64()),
            "size": pa.array([about.size] * n, pa.int32()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embedding.ravel()), width),
        }
        if tokens is not None:
            columns["tokens"] = cast(Any, pa.FixedShapeTensorArray).from_numpy_ndarray(np.ascontiguousarray(tokens))
        table = pa.table(columns).replace_schema_metadata({ABOUT: about.to_json()})
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._writer.write_table(table)

    def __enter__(self) -> ParquetFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, error, traceback
        if self._writer is not None:
            self._writer.close()


class Hdf5File:
    """Datasets `features` float32 (n, D), `coords` int64 (n, 2) and, if there are any, `tokens` (n, rows, columns, D).

    That is what CLAM's and TRIDENT's readers look for (CLAM, dataset_modules/dataset_generic.py and
    extract_features_fp.py; TRIDENT, trident/wsi_objects/WSI.py and IO.py), with TRIDENT's attributes: `patch_size` is a
    tile's side at the target magnification, `patch_size_level0` the same in level-0 px. CLAM's `patch_level` is left
    out: it names a level of the slide, which a tile of any mpp has not.
    """

    def __init__(self, path: str, about: Embedded) -> None:
        self._file = cast(Any, h5py.File(path, "w"))
        self._about = about

    def append(self, corners: NDArray[np.int64], embedding: NDArray[np.float32], tokens: Array | None) -> None:
        """Adds rows."""
        self._extend("features", embedding)
        self._extend("coords", corners)
        if tokens is not None:
            self._extend("tokens", tokens)

    def _extend(self, name: str, rows: Array) -> None:
        if name not in self._file:
            # Chunks of some 256 KiB, at least one row.
            chunk = max(1, min(1024, (1 << 18) // max(rows[0].nbytes, 1)))
            shape = rows.shape[1:]
            self._file.create_dataset(
                name, (0, *shape), rows.dtype, maxshape=(None, *shape), chunks=(chunk, *shape), compression=None
            )
        dataset = self._file[name]
        before = len(dataset)
        dataset.resize(before + len(rows), axis=0)
        dataset[before:] = rows

    def _describe(self) -> None:
        about = self._about
        of_file = {"name": about.name, "savetodir": ""}
        self._file["features"].attrs.update({**of_file, "encoder": about.model})
        self._file["coords"].attrs.update(
            {
                **of_file,
                "patch_size": about.size,
                "patch_size_level0": about.extent,
                "level0_magnification": magnification(about.slide_mpp),
                "target_magnification": magnification(about.mpp),
                "overlap": 0,
                "level0_width": about.width,
                "level0_height": about.height,
            }
        )
        self._file.attrs[ABOUT] = about.to_json()

    def __enter__(self) -> Hdf5File:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del error, traceback
        if kind is None:
            self._describe()
        self._file.close()


def magnification(mpp: float) -> int:
    """The objective's power that goes with µm/px: 40 for 0.25, 20 for 0.5."""
    return round(10 / mpp)


@dataclass(frozen=True)
class SlideEmbeddings:
    """A slide's file read back."""

    uri: str
    about: Embedded
    corners: NDArray[np.int64]
    """(n, 2), level-0 px"""
    features: NDArray[np.float32]
    """(n, D)"""
    tokens: NDArray[np.float16] | None
    """(n, rows, columns, D) where they were kept"""

    def rows_and_columns(self) -> NDArray[np.int64]:
        """Row and column (n, 2) of each tile among its slide's."""
        return rows_and_columns(self.corners, self.about.exact_extent)


def find_embeddings(sources: Sequence[str], options: storage.StorageOptions | None = None) -> list[str]:
    """The files of embeddings that files and folders name, sorted.

    Raises:
        ConfigError: there is none.
        StorageError: a source can't be reached.
    """
    found = files_of_embeddings(listed(sources, options))
    if not found:
        raise ConfigError(f"{', '.join(sources)}: no embeddings here; name what `tilestream embed` wrote")
    return found


def listed(sources: Sequence[str], options: storage.StorageOptions | None = None) -> list[str]:
    """All files that files and folders name, sorted, but for what other programs leave in folders.

    Raises:
        StorageError: a source can't be reached.
    """
    found = set[str]()
    for source in map(storage.canonical, sources):
        infos, named_outright = storage.expand(source, options)
        found |= {info.uri for info in infos if named_outright or not _is_left_behind(source, info.uri)}
    return sorted(found)


def _is_left_behind(folder: str, uri: str) -> bool:
    """Whether a file below a folder is a system's, hidden, or in such a folder, as the list of rejected slides is."""
    uri = storage.canonical(uri)
    if not uri.startswith(folder):
        return False  # of a pattern, which names what it wants
    return any(map(is_of_system, uri.removeprefix(folder).split("/")))


def files_of_embeddings(uris: Iterable[str]) -> list[str]:
    """Those that may hold embeddings, by their names; what lies in a zarr store is a part of it."""
    return [uri for uri in uris if uri.endswith(tuple(SUFFIXES.values())) and STORE_S not in uri]


def read_embeddings(uri: str, options: storage.StorageOptions | None = None) -> SlideEmbeddings:
    """Reads a file that `tilestream embed` wrote.

    Raises:
        ConfigError: it is something else, of an earlier version, or some of its embeddings are not finite.
        StorageError: it can't be read.
    """
    try:
        found = _read_hdf5(uri, options) if uri.endswith(SUFFIXES["h5"]) else _read_parquet(uri, options)
    except (KeyError, TypeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{uri}: not what `tilestream embed` writes now ({reason}); embed the slide again") from error
    check_finite(uri, found.features)
    return found


def _read_parquet(uri: str, options: storage.StorageOptions | None) -> SlideEmbeddings:
    table = storage.read_table(uri, options).combine_chunks()
    about = Embedded.from_json((table.schema.metadata or {})[ABOUT.encode()])
    values: Any = table["embedding"].combine_chunks()
    features = np.asarray(values.flatten(), dtype=np.float32).reshape(table.num_rows, -1)
    tokens: Any = None
    if "tokens" in table.column_names:
        tokens = cast(Any, table["tokens"].combine_chunks()).to_numpy_ndarray()
    corners = np.stack([table[name].to_numpy() for name in ("x", "y")], axis=1)
    return SlideEmbeddings(uri, about, corners, features, tokens)


def _read_hdf5(uri: str, options: storage.StorageOptions | None) -> SlideEmbeddings:
    with cast(Any, h5py.File(io.BytesIO(storage.read_bytes(uri, options)))) as file:
        about = Embedded.from_json(file.attrs[ABOUT])
        tokens = file["tokens"][:] if "tokens" in file else None
        return SlideEmbeddings(uri, about, file["coords"][:], file["features"][:], tokens)
