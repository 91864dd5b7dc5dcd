"""What a run is fed with: the section `data` of its configuration, and the catalog, plan and stream it means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from streaming.catalog import Catalog
from streaming.delivery.failures import MAX_FAILED_SHARE
from streaming.delivery.segments import Readers
from streaming.delivery.stream import BatchShape, TileStream
from streaming.errors import ConfigError
from streaming.plan import TilePlan
from streaming.plan.footprints import Corners
from streaming.plan.magnifications import DEFAULT_MPP, Mpp, mpp_weights
from streaming.plan.plan import MIN_TISSUE
from streaming.plan.strata import Strata
from streaming.plan.universe import HeldOut, Universe
from streaming.plan.views import View, check_views
from streaming.reading.filters import Filters
from streaming.reading.hsv_rule import HsvRule
from streaming.reading.reader import ReaderOptions
from streaming.secrets import hidden
from streaming.slide.geometry import MAX_UPSAMPLING, MPP_TOLERANCE
from streaming.storage.staging import Staging
from trainer.recipe.free_field import FREE


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tiles."""

    catalog: str | None = field(default=None, metadata=FREE)
    """folder or URI that `tilestream catalog` wrote"""
    storage_options: dict[str, Any] = field(default_factory=dict, metadata=FREE)
    """options for all remote URIs of the run, secrets among them kept from files; empty: the usual variables"""
    mirrors: dict[str, str] = field(default_factory=dict[str, str], metadata=FREE)
    """where slides are read instead of at the addresses of the catalog, by the beginning of the address; empty: what
    `TILESTREAM_MIRRORS` says"""
    tiles: str | None = field(default=None, metadata=FREE)
    """list of tiles to draw instead of any on tissue: Parquet with slide, x, y, mpp, and if wanted weight or cluster"""
    mpp: dict[float, float] | dict[str, Any] = field(default_factory=lambda: dict(DEFAULT_MPP))
    """weight of each magnification in µm/px; or a range: uniform: [0.25, 2.0], log_uniform, density"""
    views: tuple[View, ...] = ()
    """scales at which each place is looked at, in place of mpp, around the centre of the first: [{mpp: 0.5}, {mpp: 1.0,
    same_centre: true}]; augment.global_view and augment.local_view say which crops are cut from which"""
    cohorts: dict[str, float] | None = None
    """weight of each value of the catalog's `cohort` column; none: every slide alike"""
    strata: Strata = field(default_factory=Strata)
    """weights of groups of slides by columns of the catalog; as it is, every slide alike"""
    tile_size: int = 256
    """side of a tile in px"""
    min_tissue: float = MIN_TISSUE
    """share of a tile's area that must be tissue"""
    max_upsampling: float = MAX_UPSAMPLING
    """times that a slide's pixels may be enlarged; past it, it serves no tiles of a magnification"""
    mpp_tolerance: float = MPP_TOLERANCE
    """share that a slide's own pixels may be off the wanted µm/px and be taken as they are; 0: all are resampled"""
    corners: Corners = "anywhere"
    """where tiles begin: anywhere, or so that each touches the fewest compressed blocks"""
    universe: Universe = field(default_factory=Universe)
    """which part of the catalog's tiles may be drawn, and in what order"""
    hsv_rule: HsvRule = field(default_factory=HsvRule)
    """filter on a tile's pixels"""
    filters: Filters = field(default_factory=Filters)
    """further filters, each off as it is, and other ones for other stains"""
    max_failed_share: float = field(default=MAX_FAILED_SHARE, metadata=FREE)
    """share of unreadable tiles past which the run stops"""
    readers: tuple[int, int] = field(default=Readers.count, metadata=FREE)
    """least and most reader actors"""
    reader_cpus: float = field(default=Readers.cpus, metadata=FREE)
    """CPU slots of a reader actor"""
    requests_in_flight: int = field(default=ReaderOptions.requests_in_flight, metadata=FREE)
    """requests to the storage that a reader keeps under way"""
    reader_labels: dict[str, str] = field(default_factory=dict, metadata=FREE)
    """labels of the nodes that readers run on; empty: any node"""
    segment_minutes: float = field(default=Readers.segment_minutes, metadata=FREE)
    """how long Ray Data plans ahead: a run is a chain of segments that last so long each"""
    segment_blocks: int = field(default=Readers.segment_blocks, metadata=FREE)
    """micro-batches that a segment has at most"""
    stall_s: float | None = field(default=Readers.stall_s, metadata=FREE)
    """seconds that a rank waits for a batch before the run stops and says why; none: for ever"""
    staging: str | None = field(default=None, metadata=FREE)
    """local folder for copies of remote slides; none: what `TILESTREAM_STAGING` of the reader's own node says"""
    staging_gb: float = field(default=100.0, metadata=FREE)
    """disk that those copies may take, in GiB"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage_options", hidden(self.storage_options))
        object.__setattr__(self, "mirrors", hidden({"mirrors": self.mirrors})["mirrors"])
        mpp_weights(self.mpp)  # tells of what is no magnification
        check_views(self.views)
        if self.views and self.tiles is not None:
            raise ValueError(f"tiles {self.tiles}: a list has single tiles; leave out data.views")
        if self.tiles is None:
            self.universe.check_ends()
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"max_failed_share is a share from 0 to 1, not {self.max_failed_share}")
        if not self.staging_gb > 0:
            raise ValueError(f"staging_gb is {self.staging_gb}; it must be above 0")
        if self.requests_in_flight < 1:
            raise ValueError(f"requests_in_flight is {self.requests_in_flight}; it must be at least 1")

    @property
    def drawn_mpp(self) -> Mpp:
        """The µm/px of tiles, unless they are of a list: those of the views, where there are some."""
        return {view.mpp: 1.0 for view in self.views} or self.mpp

    @property
    def num_views(self) -> int:
        """Tiles of a sample."""
        return max(1, len(self.views))

    @property
    def slide_options(self) -> dict[str, Any]:
        """The options for the storage of slides: these alone may be read in mirrors."""
        return {**self.storage_options, **({"mirrors": self.mirrors} if self.mirrors else {})}


def staging(data: DataConfig) -> Staging:
    """Where a configuration puts copies of remote objects."""
    return Staging(folder=data.staging, max_bytes=int(data.staging_gb * 2**30))


def load_catalog(data: DataConfig) -> Catalog:
    """The catalog of a configuration.

    Raises:
        ConfigError: none is named.
        CatalogError: there is none, or one of another version.
    """
    if not data.catalog:
        raise ConfigError(
            "data.catalog is not set; give --data.catalog URI, made by `tilestream catalog SLIDES... --out URI`"
        )
    return Catalog.load(data.catalog, data.storage_options, staging(data))


def make_plan(data: DataConfig, seed: int, catalog: Catalog, held_out: HeldOut | None = None) -> TilePlan:
    """The plan of a run of that seed, without the patients that it holds out, or of those alone."""
    return TilePlan(
        catalog,
        seed,
        data.mpp,
        data.tile_size,
        cohorts=data.cohorts,
        strata=data.strata,
        min_tissue=data.min_tissue,
        max_upsampling=data.max_upsampling,
        mpp_tolerance=data.mpp_tolerance,
        corners=data.corners,
        universe=data.universe,
        held_out=held_out,
        tiles=data.tiles,
        views=data.views,
    )


def make_stream(
    data: DataConfig, seed: int, shape: BatchShape, catalog: Catalog, held_out: HeldOut | None = None
) -> TileStream:
    """The stream of a run of that seed, in batches of that shape, of the tiles of `make_plan`."""
    reader = ReaderOptions(
        hsv_rule=data.hsv_rule,
        filters=data.filters,
        storage_options=data.slide_options,
        staging=staging(data),
        requests_in_flight=data.requests_in_flight,
    )
    return TileStream(
        catalog,
        make_plan(data, seed, catalog, held_out),
        shape,
        reader=reader,
        readers=data.readers,
        reader_cpus=data.reader_cpus,
        reader_labels=data.reader_labels,
        segment_minutes=data.segment_minutes,
        segment_blocks=data.segment_blocks,
        stall_s=data.stall_s,
    )
