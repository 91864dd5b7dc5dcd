"""Slides as tables and files of embeddings name them: by an address, or by a name that is looked for."""

from __future__ import annotations

from functools import cached_property

from streaming import storage
from streaming.catalog.known import KnownSlides, known_slides
from streaming.counters import UNCOUNTED, Counters
from streaming.errors import ConfigError, SlideError
from streaming.slide import Slide, geometry, open_slide
from trainer.embed.options import SlideOptions


class TableSlides:
    """Opens the slides that are named; those of `slides_in` as these know them, and no others where these are given."""

    def __init__(
        self,
        wanted: SlideOptions | None = None,
        options: storage.StorageOptions | None = None,
        *,
        or_elsewhere: bool = False,
        remedy: str = "give it by --slide-mpp, or name a catalog that has it by --slides-in",
    ) -> None:
        """or_elsewhere: others are opened by their addresses; remedy: what to do about one that tells no mpp."""
        self._wanted, self._options = wanted or SlideOptions(), options
        self._or_elsewhere, self._remedy = or_elsewhere, remedy

    @cached_property
    def _known(self) -> KnownSlides | None:
        wanted = self._wanted
        if not wanted.slides_in:
            return None
        return known_slides(wanted.slides_in, self._options, slide_mpp=wanted.slide_mpp)

    @property
    def are_looked_for(self) -> bool:
        """Whether a name without an address is enough."""
        return bool(self._wanted.slides_in)

    def open(self, name: str, wanted_mpp: float | None, count: Counters = UNCOUNTED) -> Slide:
        """A slide of known mpp, by its address, or by its file's name with or without suffix.

        wanted_mpp, the µm/px that its tiles are to have, must not be too fine for it (None: it is not known yet).

        Raises:
            ConfigError: it is not among the slides that are to be looked through.
            SlideError: it can't be opened, tells no mpp, or would be enlarged too much.
            StorageError: it can't be reached.
        """
        number = None if self._known is None else self._known.number_of(name)
        if self._known is not None and number is not None:
            slide = self._known.open(number, count)
        elif self._known is None or self._or_elsewhere:
            slide = open_slide(name, self._options, mpp=self._wanted.slide_mpp, count=count)
        else:
            where = ", ".join(self._wanted.slides_in)
            raise ConfigError(f"{name}: not among the {len(self._known)} slides of --slides-in {where}; add it there")
        try:
            if slide.mpp is None:
                raise SlideError(f"{name}: {slide.no_mpp}; {self._remedy}")
            bound = self._wanted.max_upsampling
            if wanted_mpp is not None and (why := geometry.too_coarse(slide.mpp, wanted_mpp, bound)):
                raise SlideError(f"{slide.uri}: {why}")
        except SlideError:
            slide.close()
            raise
        return slide
