"""Maps the footprint of mining from Sentinel-2, anywhere on Earth, year by year.

The steps of a map as verbs, each usable alone on xarray objects:
search -> load_cube -> composite -> predict, or map_area for all of them into a store, and open_map to read it;
change compares two dates of a store.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "search": "scenes",
    "load_cube": "cube",
    "composite": "compositing",
    "load_model": "checkpoint",
    "predict": "inference",
    "map_area": "mapping",
    "series": "annual",
    "change": "changes",
    "open_map": "store",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minemap' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
