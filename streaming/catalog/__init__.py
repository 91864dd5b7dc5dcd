"""From slides to a catalog: all that a training run has to know before it reads a pixel."""

from streaming.catalog.catalog import Catalog

__all__ = ["Catalog"]
