"""A store as LazySlide leaves it: `PYTHON tests/trainer/embed/lazyslide_store.py SLIDE tests/data/lazyslide-0.12.zip`.

PYTHON is one that has wsidata 0.12, LazySlide's own library, whose functions write all of it; nothing else here is of
this project. The store is called patient0.zarr, as of a slide of that name.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

CORNERS = np.array([(x, y) for y in range(256, 1024, 256) for x in range(128, 1024, 256)])
EXTENT, SIZE, MPP = 128, 64, 0.5


def features() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Embeddings (n, 8), a row a tile."""
    return np.random.default_rng(0).standard_normal((len(CORNERS), 8)).astype(np.float32)


def main(slide: str, out: str) -> None:
    """Writes the store, without what wsidata copies of the slide's own metadata."""
    import wsidata  # pyright: ignore[reportMissingImports]
    import wsidata.io  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        opened: Any = wsidata.open_wsi(slide, store=str(Path(folder, "patient0.zarr")))
        side = {"height": SIZE, "width": SIZE, "stride_height": SIZE, "stride_width": SIZE}
        spec: Any = wsidata.TileSpec(**side, mpp=MPP, ops_downsample=2.0, base_downsample=2.0)
        wsidata.io.add_tiles(opened, "tiles", CORNERS, spec, np.zeros(len(CORNERS), int))
        wsidata.io.add_features(opened, "mine_tiles", "tiles", features())
        opened.attrs["slide_properties"].pop("raw", None)
        opened.write()
        shutil.make_archive(str(Path(out).with_suffix("")), "zip", folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
