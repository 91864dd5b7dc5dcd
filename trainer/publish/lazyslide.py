"""Embeddings as stores of LazySlide: `tilestream lazyslide`.

A store is what LazySlide keeps beside a slide: SpatialData's zarr layout with the tiles as shapes, and the embeddings
as a table (AnnData) that belongs to them (wsidata 0.12, io/_elems.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from streaming import storage
from streaming.errors import ConfigError
from trainer.embed.files import SlideEmbeddings, find_embeddings, read_embeddings

TILES = "tiles"


def write_stores(
    sources: Sequence[str], out: str, feature: str, options: storage.StorageOptions | None = None
) -> list[Path]:
    """Writes one store a slide, `out/NAME.zarr`, whole or not at all; returns them.

    sources are files or folders of `tilestream embed`. `open_wsi(slide, store=out)` of wsidata then has the tiles under
    `tiles` and the embeddings, float32 (n, D), under `{feature}_tiles`. A store that is there already is replaced.

    Raises:
        ConfigError: wsidata is missing; no embeddings; several files of one slide; `out` is not on this machine.
        StorageError: a source can't be reached.
    """
    if not storage.is_local(out):
        raise ConfigError(f"{out}: LazySlide opens stores on this machine alone; name a local folder")
    if importlib.util.find_spec("wsidata") is None:
        raise ConfigError(
            "LazySlide's stores need wsidata, in an environment that has tilestream, too: pip install wsidata"
        )
    written = list[Path]()
    for uri in find_embeddings(sources, options):
        found = read_embeddings(uri, options)
        store = Path(storage.local_path(out), f"{storage.shortened(found.about.name)}.zarr")
        if store in written:
            raise ConfigError(f"{uri}: the store {store} is of another file of these; name one file a slide")
        store.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=store.parent, prefix=".tilestream-") as part:
            made = Path(part, store.name)
            spatial_data(found, feature).write(made)
            shutil.rmtree(store, ignore_errors=True)
            made.rename(store)
        written.append(store)
    return written


def spatial_data(found: SlideEmbeddings, feature: str) -> Any:
    """A slide's tiles and embeddings as SpatialData, with the attributes that wsidata looks for."""
    # Not for the type checker, which may not have them.
    gpd, pd, shapely, anndata, spatialdata, models, wsidata = (
        cast(Any, importlib.import_module(name))
        for name in ("geopandas", "pandas", "shapely", "anndata", "spatialdata", "spatialdata.models", "wsidata")
    )
    about, (x, y) = found.about, found.corners.T
    numbers = np.arange(len(x))
    squares = shapely.box(x, y, x + about.extent, y + about.extent)
    tiles = {"tile_id": numbers, "x": x, "y": y, "tissue_id": 0, "geometry": squares}
    of_tile = {"tile_id": numbers, "library_id": pd.Categorical([TILES] * len(x))}
    table = anndata.AnnData(found.features, obs=pd.DataFrame(of_tile, index=numbers.astype(str)))
    downsample = about.extent / about.size
    side = {"height": about.size, "width": about.size, "stride_height": about.size, "stride_width": about.size}
    spec = wsidata.TileSpec(**side, mpp=about.mpp, ops_downsample=downsample, base_downsample=downsample)
    return spatialdata.SpatialData(
        shapes={TILES: models.ShapesModel.parse(gpd.GeoDataFrame(tiles))},
        tables={
            f"{feature}_{TILES}": models.TableModel.parse(
                table, region=TILES, region_key="library_id", instance_key="tile_id"
            )
        },
        attrs={
            "tile_spec": {TILES: spec.to_dict()},
            "slide_properties": {"shape": [about.height, about.width], "mpp": about.slide_mpp},
            "tilestream": vars(about),
        },
    )
