"""The skeleton of our HTML pages, which need nothing but themselves: colours for light and dark, pictures within."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image

from streaming.slide.resample import Pixels

_STYLE = """
:root{color-scheme:light dark;--text:#1d2523;--soft:#63706c;--line:#dfe5e2;--back:#fbfcfb;--card:#fff;--mark:#1f8f6f}
@media(prefers-color-scheme:dark){
:root{--text:#e6ece9;--soft:#98a5a0;--line:#2c3532;--back:#121716;--card:#1a211f;--mark:#4fc3a0}}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--text);font:15px/1.55 system-ui,sans-serif}
"""


def page(title: str, style: str, body: str) -> bytes:
    """A whole page; style is CSS that follows ours, body the HTML within the body element."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}{style.lstrip()}</style></head><body>{body}</body></html>"
    ).encode()


def jpeg_url(pixels: Pixels, quality: int) -> str:
    """A picture uint8 (h, w, 3) as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
