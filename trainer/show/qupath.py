"""Embedded tiles as GeoJSON for QuPath."""

from __future__ import annotations

import json
import uuid
from typing import Any

from trainer.embed.files import SlideEmbeddings
from trainer.show.colours import Floats


def geojson(slide: SlideEmbeddings, measurements: dict[str, Floats], colours: Floats | None = None) -> bytes:
    """Tiles as QuPath reads them: a FeatureCollection of `tile` objects in level-0 px, each with measurements.

    QuPath shows what was scanned alone, and counts its pixels from there.
    measurements (n,) by name; colours (n, 3) from 0 to 1. Layout: QuPath's PathIO.exportObjectsAsGeoJSON since 0.4.
    """
    side, features = slide.about.extent, list[dict[str, Any]]()
    # The same tile gets the same id whenever it is written.
    space = uuid.uuid5(uuid.NAMESPACE_URL, slide.about.to_json())
    left, top = slide.about.origin
    for i, (x, y) in enumerate((slide.corners - (left, top)).tolist()):
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        properties: dict[str, Any] = {
            "objectType": "tile",
            "measurements": {name: float(values[i]) for name, values in measurements.items()},
        }
        if colours is not None:
            properties["color"] = [round(255 * float(part)) for part in colours[i]]
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(space, f"{x + left},{y + top}")),
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": properties,
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()
