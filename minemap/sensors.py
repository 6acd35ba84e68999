"""Sensors as values: all that the rest must know of one, chosen by the collection of an item.

Whatever the sensor, pixels become reflectance x 10,000 in bands of one name each, and its quality layer becomes SCL
classes, so what follows (cube, composite, map, chips) does not ask where they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import landsat, sentinel2
from .errors import InputError
from .sentinel2 import Item, Scaling


@dataclass(frozen=True)
class Sensor:
    """One kind of product.

    collections: its names in catalogues. platforms: those that are used, () for all. resolution: metres, of its maps.
    aliases: band -> asset names; `scl` is the quality layer, called `quality` by its makers, stored as `dtype`.
    classes: the quality layer's values to SCL classes, uint8. scaling: how an item's DN become reflectance.
    """

    name: str
    collections: tuple[str, ...]
    platforms: tuple[str, ...]
    resolution: float
    aliases: Mapping[str, tuple[str, ...]]
    quality: str
    dtype: str
    classes: Callable[[Any], np.ndarray]
    scaling: Callable[[Item], Scaling]

    def uses(self, item: Item) -> bool:
        """Whether the item's platform is one of ours, or unknown."""
        platform = item["properties"].get("platform")
        return not self.platforms or platform is None or str(platform).lower().replace("_", "-") in self.platforms


SENTINEL2 = Sensor(
    name="sentinel-2",
    collections=("sentinel-2-l2a", "sentinel-2-c1-l2a", "sentinel-2-pre-c1-l2a"),
    platforms=(),
    resolution=sentinel2.RESOLUTION,
    aliases=sentinel2.ALIASES,
    quality="SCL",
    dtype="uint8",
    classes=np.asarray,
    scaling=sentinel2.scaling,
)
LANDSAT = Sensor(
    name="landsat-8-9",
    collections=landsat.COLLECTIONS,
    platforms=landsat.PLATFORMS,
    resolution=landsat.RESOLUTION,
    aliases=landsat.ALIASES,
    quality="QA_PIXEL",
    dtype="uint16",
    classes=landsat.classes,
    scaling=landsat.scaling,
)
SENSORS = (SENTINEL2, LANDSAT)


def sensor_named(collection: str | None) -> Sensor:
    """The sensor of a collection; Sentinel-2 when its name says nothing."""
    return next((s for s in SENSORS if collection in s.collections), SENTINEL2)


def sensor_of(item: Item) -> Sensor:
    """The sensor of one item, by its collection or else its platform."""
    if str(item["properties"].get("platform", "")).lower().startswith("landsat"):
        return LANDSAT
    return sensor_named(item.get("collection"))


def one_sensor(items: Iterable[Item], where: str = "these items") -> Sensor:
    """The sensor of all items, Sentinel-2 of none. Raises InputError where they have several."""
    found = {s.name: s for s in map(sensor_of, items)}
    if len(found) > 1:
        raise InputError(f"{where} come from {' and '.join(sorted(found))}: name one collection")
    return next(iter(found.values()), SENTINEL2)


def asset_key(item: Item, band: str) -> str | None:
    """The key of `item`'s asset that holds `band`, under any catalogue's names; None when it has none."""
    return sentinel2.asset_key(item, band, sensor_of(item).aliases)


def scaling(item: Item) -> Scaling:
    """How one item's DN become reflectance, and why."""
    return sensor_of(item).scaling(item)
