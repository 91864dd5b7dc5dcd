"""Features as QuPath 0.5 writes them."""

from typing import Any


def rectangle(left: float, top: float, right: float, bottom: float) -> dict[str, Any]:
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {"type": "Polygon", "coordinates": [ring]}


def feature(geometry: dict[str, Any], name: str | None, kind: str = "annotation") -> dict[str, Any]:
    about: dict[str, Any] = {"objectType": kind}
    if name:
        about["classification"] = {"name": name, "color": [200, 0, 0]}
    return {"type": "Feature", "id": "2b0f", "geometry": geometry, "properties": about}
