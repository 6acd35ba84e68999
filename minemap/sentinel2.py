"""What Sentinel-2 L2A is: bands and their names per catalogue, SCL classes, nodata, the offset decision.

Sources: Sentinel-2 Products Specification Document (ESA, S2-PDGS-TAS-DI-PSD) for the scene classification and
for the offset of processing baseline 04.00; STAC extensions eo, raster, processing, s2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Item = dict[str, Any]  # a STAC item as plain JSON

BANDS = ("blue", "green", "red", "nir", "swir16", "swir22")
SCL = "scl"
RESOLUTION = 10.0  # metres, of the finest bands and of the map
NODATA = 0  # stored DN of a pixel that was not seen, in every band and in SCL
SCALE = 1e-4  # reflectance per DN

# Earth Search · Planetary Computer, Earth Search v0 · Copernicus Data Space
ALIASES: dict[str, tuple[str, ...]] = {
    "blue": ("blue", "B02", "B02_10m"),
    "green": ("green", "B03", "B03_10m"),
    "red": ("red", "B04", "B04_10m"),
    "nir": ("nir", "B08", "B08_10m"),
    "swir16": ("swir16", "B11", "B11_20m"),
    "swir22": ("swir22", "B12", "B12_20m"),
    SCL: ("scl", "SCL", "SCL_20m"),
}

SCL_MASKED = (0, 1, 3, 8, 9, 10)  # no data, defective, shadow, cloud, cloud, cirrus: no clear look at the ground
SCL_CLOUD = (8, 9, 10)  # the classes that bright tailings are mistaken for

OFFSET = -1000  # DN, in products of processing baseline 04.00 and later
_FIRST_WITH_OFFSET = 4.0


def asset_key(item: Item, band: str, aliases: Mapping[str, tuple[str, ...]] = ALIASES) -> str | None:
    """The key of `item`'s asset that holds `band`, under any catalogue's names; None when it has none."""
    assets = item["assets"]
    for name in aliases[band]:
        if name in assets:
            return name
    for key, asset in assets.items():
        common = [
            b.get("common_name") or b.get("eo:common_name") for b in asset.get("eo:bands") or asset.get("bands") or []
        ]
        if common == [band]:
            return key
    return None


def baseline(item: Item) -> float | None:
    """Processing baseline, for instance 5.09, from the properties or the product's name; None if unknown."""
    properties = item["properties"]
    for key in ("s2:processing_baseline", "processing:version"):
        found = re.fullmatch(r"0?(\d{1,2}\.\d{1,2})", str(properties.get(key, "")))
        if found:
            return float(found[1])
    name = f"{properties.get('s2:product_uri', '')} {item['id']}"
    found = re.search(r"_N(\d{2})(\d{2})_", name)
    return float(f"{found[1]}.{found[2]}") if found else None


@dataclass(frozen=True)
class Scaling:
    """How stored DN become reflectance: `(DN + offset) * scale`, and why it was decided so."""

    offset: float  # DN
    scale: float  # reflectance per DN
    reason: str


def scaling(item: Item) -> Scaling:
    """Decides the offset of one item, from what it says of itself (never from its date).

    Order: the catalogue's own word that the offset was applied, then the processing baseline, then the
    `raster:bands` of the blue asset. Earth Search states `raster:bands` offset -0.1 also where it has applied
    the offset, which is why that comes last. The pixels are asked as well: `contradicts`.
    """
    stated = _stated(item)
    number = baseline(item)
    applied = item["properties"].get("earthsearch:boa_offset_applied")
    if applied:
        return Scaling(0, stated.scale, "earthsearch:boa_offset_applied is true")
    if number is not None:
        offset = OFFSET if number >= _FIRST_WITH_OFFSET else 0
        return Scaling(offset, stated.scale, f"processing baseline {number:05.2f}")
    return stated


def _stated(item: Item) -> Scaling:
    key = asset_key(item, "blue")
    asset = item["assets"].get(key, {})
    band = (asset.get("raster:bands") or asset.get("bands") or [{}])[0]
    scale = band.get("scale", band.get("raster:scale", asset.get("raster:scale")))
    offset = band.get("offset", band.get("raster:offset", asset.get("raster:offset")))
    if scale is None:
        return Scaling(0, SCALE, "nothing stated: reflectance x 10,000")
    return Scaling(round((offset or 0) / scale), scale, f"raster:bands scale {scale}, offset {offset or 0}")


def contradicts(decided: Scaling, blue: Any) -> bool:
    """Whether the pixels prove that the offset is not in the DN although it was decided to subtract it.

    blue: stored DN of the blue band, any shape, uint16, nodata 0. With the offset in them, clear and clouded
    pixels alike lie above 1000 but for a little noise, so a tenth of them below 900 settles it. The opposite
    mistake can't be told from a bright desert and is left alone.
    """
    seen = blue[blue != NODATA]
    return decided.offset == OFFSET and seen.size > 0 and float((seen < 900).mean()) > 0.1
