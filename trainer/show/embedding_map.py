"""A map of embeddings as one HTML file that needs nothing else: points in the plane, a tile under the pointer."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from streaming import storage
from streaming.errors import ConfigError
from streaming.show.page import jpeg_url, page
from streaming.slide.geometry import MAX_UPSAMPLING
from trainer.embed.files import SlideEmbeddings
from trainer.show.colours import Floats
from trainer.show.options import Method
from trainer.show.thumbnails import tile_pixels

_THUMBNAIL_PX = 64
_SPRITE_COLUMNS = 32
_REDUCED_TO = 50  # dimensions that t-SNE starts from, as its authors do
_FEWEST = 4
_COLOURS = (
    "#1f8f6f",
    "#c2557a",
    "#4f78c4",
    "#c98a2b",
    "#7d68b8",
    "#6b8e23",
    "#b5523b",
    "#2f9db0",
    "#8c6d5a",
    "#777777",
)

_SAME = 1e-12  # what lies nearer lies in one place

_STYLE = """
body{font:14px/1.5 system-ui,sans-serif}
header{padding:14px 20px 6px}h1{font-size:19px;margin:0}p{margin:2px 0;color:var(--soft)}
#legend{display:flex;flex-wrap:wrap;gap:4px 14px;padding:4px 20px}
#legend label{cursor:pointer;white-space:nowrap}
#legend i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:5px}
canvas{display:block;margin:6px 20px;border:1px solid var(--line);border-radius:10px;background:var(--card);cursor:grab}
#tip{position:fixed;pointer-events:none;display:none;background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:8px;font-size:12px;box-shadow:0 4px 18px #0004}
#tip div{width:128px;height:128px;image-rendering:auto;border-radius:4px;margin-bottom:4px}
"""

_SCRIPT = """
const canvas = document.querySelector("canvas"), tip = document.querySelector("#tip"), c = canvas.getContext("2d");
let scale = 1, left = 0, top_ = 0, drag = null;
const hidden = new Set();
const place = i => [(data.x[i] * canvas.width - left) * scale, (data.y[i] * canvas.height - top_) * scale];
function draw() {
  c.clearRect(0, 0, canvas.width, canvas.height);
  const ratio = devicePixelRatio || 1, r = 3.2 * ratio * Math.min(2.2, Math.sqrt(scale));
  for (let i = 0; i < data.x.length; i++) {
    if (hidden.has(data.group[i])) continue;
    const [x, y] = place(i);
    if (x < -r || y < -r || x > canvas.width + r || y > canvas.height + r) continue;
    c.fillStyle = data.colours[data.group[i]] + "cc";
    c.beginPath(); c.arc(x, y, r, 0, 7); c.fill();
  }
}
function size() {
  const ratio = devicePixelRatio || 1, width = innerWidth - 42;
  const height = Math.max(320, innerHeight - canvas.getBoundingClientRect().top - 20);
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  canvas.width = width * ratio; canvas.height = height * ratio; draw();
}
function nearest(event) {
  const box = canvas.getBoundingClientRect(), ratio = canvas.width / box.width;
  const px = (event.clientX - box.left) * ratio, py = (event.clientY - box.top) * ratio;
  let best = -1, least = 14 * ratio;
  for (let i = 0; i < data.x.length; i++) {
    if (hidden.has(data.group[i])) continue;
    const [x, y] = place(i), d = Math.hypot(x - px, y - py);
    if (d < least) { best = i; least = d; }
  }
  return best;
}
canvas.addEventListener("pointermove", event => {
  if (drag) {
    const ratio = canvas.width / canvas.getBoundingClientRect().width;
    left -= (event.clientX - drag[0]) * ratio / scale; top_ -= (event.clientY - drag[1]) * ratio / scale;
    drag = [event.clientX, event.clientY]; tip.style.display = "none"; draw(); return;
  }
  const i = nearest(event);
  if (i < 0) { tip.style.display = "none"; return; }
  const columns = data.columns, side = 128, rows = Math.ceil(data.x.length / columns);
  tip.querySelector("div").style.cssText = `background:url(${data.sprite}) -${i % columns * side}px ` +
    `-${Math.floor(i / columns) * side}px / ${columns * side}px ${rows * side}px`;
  tip.querySelector("span").textContent = `${data.names[data.group[i]]}  x ${data.at[i][0]}, y ${data.at[i][1]}`;
  tip.style.display = "block";
  const width = tip.offsetWidth, height = tip.offsetHeight;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - width - 8) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - height - 8) + "px";
});
canvas.addEventListener("pointerdown", event => { drag = [event.clientX, event.clientY]; });
addEventListener("pointerup", () => { drag = null; });
canvas.addEventListener("pointerleave", () => { tip.style.display = "none"; });
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  const box = canvas.getBoundingClientRect(), ratio = canvas.width / box.width, by = Math.exp(-event.deltaY / 400);
  const px = (event.clientX - box.left) * ratio, py = (event.clientY - box.top) * ratio;
  left += px / scale - px / (scale * by); top_ += py / scale - py / (scale * by); scale *= by; draw();
}, {passive: false});
document.querySelectorAll("#legend input").forEach((box, i) => box.addEventListener("change", () => {
  box.checked ? hidden.delete(i) : hidden.add(i); draw();
}));
addEventListener("resize", size); size();
"""


def in_plane(vectors: Floats, method: Method, seed: int = 0) -> NDArray[np.float64]:
    """Places (n, 2) of vectors (n, D), each axis from 0.03 to 0.97.

    Raises:
        ConfigError: there are too few.
    """
    if len(vectors) < _FEWEST:
        raise ConfigError(f"{len(vectors)} tiles are too few for a map; it takes at least {_FEWEST}")
    with np.errstate(invalid="ignore"):  # shares of a variance of 0, which nobody asks for
        reduced = PCA(n_components=min(_REDUCED_TO, *vectors.shape), random_state=seed).fit_transform(vectors)
    if method == "tsne":
        # It divides by the spread of the first component, which equal embeddings do not have.
        init = "pca" if np.ptp(reduced[:, 0]) > _SAME else "random"
        tsne = TSNE(perplexity=min(30.0, (len(vectors) - 1) / 3), init=init, random_state=seed)
        reduced = tsne.fit_transform(reduced.astype(np.float32))
    places = np.asarray(reduced, dtype=np.float64)[:, :2]
    low, high = places.min(axis=0), places.max(axis=0)
    return 0.03 + 0.94 * (places - low) / np.maximum(high - low, _SAME)


def map_page(
    slides: Sequence[SlideEmbeddings],
    *,
    method: Method = "tsne",
    most: int = 2000,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    options: storage.StorageOptions | None = None,
    max_upsampling: float = MAX_UPSAMPLING,
) -> bytes:
    """The page: tiles of the slides (a random `most` of them) by t-SNE or principal components, coloured by group.

    groups names each slide's group; its own name if there are none. The pointer shows the tile, a wheel zooms, the
    legend hides groups.

    Raises:
        ConfigError: there are too few tiles.
        SlideError, StorageError: a tile can't be read.
    """
    names = [slide.about.name for slide in slides] if groups is None else list(groups)
    every = [(i, j) for i, slide in enumerate(slides) for j in range(len(slide.features))]
    order = np.sort(np.random.default_rng(seed).permutation(len(every))[:most])
    chosen = [every[i] for i in order]
    vectors = np.stack([slides[i].features[j] for i, j in chosen]) if chosen else np.zeros((0, 1), np.float32)
    data = _points(slides, names, chosen, in_plane(vectors, method, seed))
    data["sprite"] = _sprite(tile_pixels(slides, chosen, _THUMBNAIL_PX, options, max_upsampling))
    about = slides[0].about
    how = "t-SNE" if method == "tsne" else "principal components"
    of = f"{len(chosen):,} of {len(every):,}" if len(chosen) < len(every) else f"{len(every):,}"
    what = f"{of} tiles of {len(slides)} slides at {about.mpp:g} µm/px, {vectors.shape[1]} dimensions, by {how}"
    return page(
        "map of embeddings",
        _STYLE,
        f"<header><h1>Map of embeddings</h1><p>{html.escape(what)}. Model: {html.escape(about.model)}</p></header>"
        f'<div id="legend">{_legend(data)}</div><canvas></canvas><div id="tip"><div></div><span></span></div>'
        f"<script>const data = {_script_json(data)};{_SCRIPT}</script>",
    )


def _points(
    slides: Sequence[SlideEmbeddings],
    names: Sequence[str],
    chosen: Sequence[tuple[int, int]],
    places: NDArray[np.float64],
) -> dict[str, Any]:
    """What the script draws: places (n, 2) of tiles, each by its slide's number and its own, and the slides' groups."""
    known = list(dict.fromkeys(names))
    return {
        "x": places[:, 0].round(4).tolist(),
        "y": places[:, 1].round(4).tolist(),
        "group": [known.index(names[i]) for i, _ in chosen],
        "at": [slides[i].corners[j].tolist() for i, j in chosen],
        "names": known,
        "colours": [_COLOURS[i % len(_COLOURS)] for i in range(len(known))],
        "columns": _SPRITE_COLUMNS,
    }


def _legend(data: dict[str, Any]) -> str:
    return "".join(
        f'<label><input type="checkbox" checked><i style="background:{colour}"></i>{html.escape(name)}</label>'
        for name, colour in zip(data["names"], data["colours"], strict=True)
    )


def _script_json(data: Any) -> str:
    """JSON that can stand within a script element, whatever names of slides hold."""
    return json.dumps(data).replace("<", "\\u003c")


def _sprite(tiles: Sequence[NDArray[np.uint8]]) -> str:
    """All tiles in one JPEG, as a data URL."""
    rows = -(-len(tiles) // _SPRITE_COLUMNS)
    sheet = np.zeros((rows * _THUMBNAIL_PX, _SPRITE_COLUMNS * _THUMBNAIL_PX, 3), dtype=np.uint8)
    for i, tile in enumerate(tiles):
        row, column = (at * _THUMBNAIL_PX for at in divmod(i, _SPRITE_COLUMNS))
        sheet[row : row + _THUMBNAIL_PX, column : column + _THUMBNAIL_PX] = tile
    return jpeg_url(sheet, 80)
