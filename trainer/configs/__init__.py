"""The presets: configurations that `tilestream train` finds by name."""

from __future__ import annotations

from importlib import resources


def presets() -> list[str]:
    """Names of the presets."""
    names = [entry.name for entry in resources.files(__name__).iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """The YAML of a preset."""
    return (resources.files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
