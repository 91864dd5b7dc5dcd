"""Figures as files."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


def svg(figure: Figure) -> str:
    """An element of a page, as wide as what it stands in, without a background."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg", '<svg style="width:100%;height:auto"', 1)


def png(figure: Figure) -> bytes:
    """A PNG of a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
