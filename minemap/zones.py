"""A zone's group in a Zarr v3 store: arrays in shards, coordinates and time, by CF and the GeoZarr conventions.

utm32720/{probability, observations, quicklook, composite, time, time_bounds, y, x, spatial_ref}
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from pyproj import CRS
from zarr.codecs import ZstdCodec

from .grid import WINDOW, Grid
from .inference import NOT_OBSERVED
from .scenes import Period

QUICKLOOK = 8  # pixels of the map to one of the quicklook, on each side
EPOCH = date(1970, 1, 1)
NO_TIME = -(2**31)  # days; a period whose adding was cut short
CONSISTENT = "probability_consistent"  # derived from all periods of `probability`, kept beside it
CONVENTIONS = [
    {
        "uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
        "name": "spatial:",
        "schema_url": "https://raw.githubusercontent.com/zarr-conventions/spatial/refs/tags/v1/schema.json",
        "spec_url": "https://github.com/zarr-conventions/spatial/blob/v1/README.md",
        "description": "Spatial coordinate information",
    },
    {
        "uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f",
        "name": "proj:",
        "schema_url": "https://raw.githubusercontent.com/zarr-conventions/geo-proj/refs/tags/v1/schema.json",
        "spec_url": "https://github.com/zarr-conventions/geo-proj/blob/v1/README.md",
        "description": "Coordinate reference system information for geospatial data",
    },
]


@dataclass(frozen=True)
class Layer:
    """How one array of a zone is stored.

    missing: the stored value of a pixel without an answer (`_FillValue`), None when every value is an answer.
    empty: where missing is None, the value of a pixel that was never written.
    """

    dtype: str
    missing: int | None
    about: dict[str, Any]
    bands: int = 0
    empty: int = 0


PROBABILITY = Layer("uint8", NOT_OBSERVED, {"long_name": "probability of mine", "units": "percent"})
CONSISTENT_LAYER = Layer(
    "uint8", NOT_OBSERVED, {"long_name": "probability of mine given all periods", "units": "percent"}
)
CHANGE_LAYERS = {
    "change": Layer(
        "uint8",
        None,  # xarray would turn classes into floats
        {
            "long_name": "change of the mining footprint between two dates",
            "flag_values": [0, 1, 2, 3, NOT_OBSERVED],
            "flag_meanings": "never_mine mine_at_both_dates gain loss not_observed_at_both",
        },
        empty=NOT_OBSERVED,
    ),
    "first_year": Layer("uint16", None, {"long_name": "first year in which a pixel was seen as mine, 0 = never"}),
}


def fill_zone(group: zarr.Group, grid: Grid, chunk: int, bands: tuple[str, ...] | None) -> None:
    """The arrays and coordinates of a map's zone, without any period yet."""
    layers: dict[str, Layer] = {
        "probability": PROBABILITY,
        "observations": Layer("uint8", None, {"long_name": "number of clear acquisitions", "units": "1"}),
    }
    if bands:
        # Band names are an attribute: Zarr v3 has no settled string type for a coordinate
        about = {
            "long_name": "surface reflectance, median",
            "scale_factor": 1e-4,
            "units": "1",
            "bands": list(bands),
        }
        layers["composite"] = Layer("uint16", 0, about, bands=len(bands))
    for name, layer in layers.items():
        _sharded(group, name, layer, grid, chunk)
    side = chunk // QUICKLOOK
    group.create_array(
        "quicklook",
        shape=(0, 3, grid.height // QUICKLOOK, grid.width // QUICKLOOK),
        chunks=(1, 3, side, side),
        dtype="uint8",
        fill_value=0,
        compressors=ZstdCodec(level=5, checksum=True),
        dimension_names=("time", "rgb", "y80", "x80"),
        attributes={"long_name": f"red, green, blue of the composite, {QUICKLOOK} px means, 0 = not observed"},
    )
    _coordinates(group, grid)
    for name, values in (("y", grid.y), ("x", grid.x)):
        means = values.reshape(-1, QUICKLOOK).mean(axis=1)
        _small(group, f"{name}80", means, (f"{name}80",), {"units": "m", "long_name": f"{name} of the quicklook"})
    _times(group)


def fill_change_zone(group: zarr.Group, grid: Grid, chunk: int, *, first_year: bool) -> None:
    """The same of a store of change: `change` and, if wanted, `first_year`, both (y, x)."""
    for name, layer in CHANGE_LAYERS.items():
        if first_year or name != "first_year":
            _sharded(group, name, layer, grid, chunk, timed=False)
    _coordinates(group, grid)


def consistent_array(zone: zarr.Group, grid: Grid) -> zarr.Array:
    """The array beside `probability` for what is derived from all of its periods, made where it is not there."""
    raw = array_of(zone, "probability")
    if CONSISTENT not in zone:
        _sharded(zone, CONSISTENT, CONSISTENT_LAYER, grid, (raw.shards or raw.chunks)[-1])
    found = array_of(zone, CONSISTENT)
    found.resize(raw.shape)
    return found


def create_level(parent: zarr.Group, name: str, grid: Grid, chunk: int, periods: list[Period]) -> zarr.Group:
    """A group with a map's `probability` over `grid`, nothing observed yet, and its coordinates."""
    group = parent.create_group(name, attributes=zone_attributes(grid))
    _sharded(group, "probability", PROBABILITY, grid, chunk)
    _coordinates(group, grid)
    _times(group)
    for period in periods:
        add_period(group, period)
    return group


def consolidate(path: Path, groups: list[str]) -> None:
    """Metadata of each of the groups, and of all that is below `path`, in one place each."""
    with warnings.catch_warnings():
        # zarr warns that consolidation is not in the v3 specification yet; readers that don't know it ignore it
        warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata.*")
        for group in groups:
            zarr.consolidate_metadata(path, path=group)
        zarr.consolidate_metadata(path)


def add_period(zone: zarr.Group, period: Period) -> int:
    bounds = _bounds(zone)
    wanted = [(period.start - EPOCH).days, (period.end - EPOCH).days]
    found = np.flatnonzero((bounds == wanted).all(axis=1))
    if len(found):
        return int(found[0])
    n = len(bounds)
    # time last: a row without a time does not exist, and the next run uses it
    names = [name for name, array in zone.arrays() if _dims(array)[:1] == ("time",)]
    for name in sorted(names, key=lambda name: name == "time"):
        array = array_of(zone, name)
        array.resize((n + 1, *array.shape[1:]))
    array_of(zone, "time_bounds")[n] = wanted
    array_of(zone, "time")[n] = wanted[0]
    return n


def periods(zone: zarr.Group) -> list[Period]:
    """In the order of the time axis."""
    return [Period(_day(int(start)), _day(int(end))) for start, end in _bounds(zone)]


def _day(days: int) -> date:
    return date.fromordinal(EPOCH.toordinal() + days)


def array_of(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    assert isinstance(array, zarr.Array), name
    return array


def _bounds(zone: zarr.Group) -> np.ndarray:
    """First and last day of every period that was added whole, int64 (period, 2)."""
    times = np.asarray(array_of(zone, "time")[:])
    whole = times != NO_TIME
    return np.asarray(array_of(zone, "time_bounds")[:])[: int(whole.argmin()) if not whole.all() else len(times)]


def _sharded(group: zarr.Group, name: str, layer: Layer, grid: Grid, chunk: int, *, timed: bool = True) -> None:
    """An array, without any period yet: a shard a super-tile, chunks of one window, zstd with a checksum."""
    sizes = (layer.bands,) if layer.bands else ()
    time: tuple[str, ...] = ("time",) if timed else ()
    fill = {} if layer.missing is None else {"_FillValue": layer.missing}
    group.create_array(
        name,
        shape=(*(0 for _ in time), *sizes, *grid.shape),
        shards=(*(1 for _ in time), *sizes, chunk, chunk),
        chunks=(*(1 for _ in time), *(1 for _ in sizes), WINDOW, WINDOW),
        dtype=layer.dtype,
        fill_value=layer.empty if layer.missing is None else layer.missing,
        compressors=ZstdCodec(level=5, checksum=True),
        dimension_names=(*time, *("band" for _ in sizes), "y", "x"),
        # xarray makes a coordinate, which rioxarray wants, only of what "coordinates" names
        attributes={**layer.about, "grid_mapping": "spatial_ref", "coordinates": "spatial_ref", **fill},
    )


def _dims(array: zarr.Array) -> tuple[str | None, ...]:
    return tuple(getattr(array.metadata, "dimension_names", None) or ())


def zone_attributes(grid: Grid) -> dict[str, Any]:
    """Where a group's arrays lie, in the terms of the GeoZarr conventions."""
    return {
        "Conventions": "CF-1.11",
        "zarr_conventions": CONVENTIONS,
        "proj:code": f"EPSG:{grid.epsg}",
        "spatial:dimensions": ["y", "x"],
        "spatial:transform": list(grid.transform)[:6],
        "spatial:bbox": list(grid.bounds),
        "spatial:shape": list(grid.shape),
        "spatial:registration": "pixel",
    }


def grid_of(zone: zarr.Group) -> Grid:
    """What a zone's arrays cover."""
    about: dict[str, Any] = dict(zone.attrs)
    resolution, _, left, _, _, top = (float(v) for v in about["spatial:transform"])
    height, width = (int(v) for v in about["spatial:shape"])
    return Grid(int(about["proj:code"].removeprefix("EPSG:")), left, top, height, width, resolution)


def _small(group: zarr.Group, name: str, data: np.ndarray, dims: tuple[str, ...], about: dict[str, Any]) -> None:
    chunks = tuple(max(1, side) for side in data.shape)
    array = group.create_array(
        name, shape=data.shape, chunks=chunks, dtype=data.dtype, dimension_names=dims, attributes=about
    )
    array[...] = data


def _coordinates(group: zarr.Group, grid: Grid) -> None:
    crs = CRS.from_epsg(grid.epsg)
    mapping = {
        **crs.to_cf(),
        "spatial_ref": crs.to_wkt(),
        "GeoTransform": " ".join(map(repr, grid.transform.to_gdal())),
    }
    _small(group, "spatial_ref", np.array(0), (), mapping)
    for name, values in (("y", grid.y), ("x", grid.x)):
        about = {"units": "m", "standard_name": f"projection_{name}_coordinate", "axis": name.upper()}
        _small(group, name, values, (name,), about)


def _times(group: zarr.Group) -> None:
    """Time and its bounds, without any period yet."""
    days = {"units": "days since 1970-01-01", "calendar": "proleptic_gregorian"}
    none = np.zeros((0,), np.int64)
    about = {
        **days,
        "standard_name": "time",
        "axis": "T",
        "bounds": "time_bounds",
        "long_name": "first day of period",
    }
    _series(group, "time", none, ("time",), about)
    _series(group, "time_bounds", none.reshape(0, 2), ("time", "bounds"), {"long_name": "first and last day", **days})


def _series(group: zarr.Group, name: str, data: np.ndarray, dims: tuple[str, ...], about: dict[str, Any]) -> None:
    group.create_array(
        name,
        shape=data.shape,
        chunks=(1024, *data.shape[1:]),
        dtype=data.dtype,
        fill_value=NO_TIME,
        dimension_names=dims,
        attributes=about,
    )
