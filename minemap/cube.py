"""Items on a Grid as a lazy cube, through stackstac or odc-stac.

Both backends stand behind `_stack`; whatever is odd about them stays in this module.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import rioxarray  # noqa: F401 (registers the .rio accessor)
import shapely
import xarray as xr
from affine import Affine
from pyproj import CRS
from rasterio.enums import Resampling
from rasterio.errors import CRSError
from rasterio.warp import transform_bounds
from shapely.affinity import translate

from .errors import InputError
from .grid import CHUNK, BBox, Grid, continuous_lonlat, crs_wkt
from .reader import GDAL_OPTIONS, Access, ExactReader, address_of, check_asset
from .scenes import acquisition_id, area_of, moment
from .sensors import asset_key, one_sensor, scaling
from .sentinel2 import BANDS, NODATA, SCALE, SCL, Item, Scaling

if TYPE_CHECKING:
    import pystac

READERS = ("stackstac", "odc")
OPENED_AT_ONCE = 8
_PYSTAC = threading.Lock()  # HACK: pystac 1.15 registers its extensions on first use, and not thread-safely
NEAR = 0.1  # degrees that an item may show beyond where it says it lies
UNCLASSIFIED = 7  # the SCL class of items that have no SCL: seen, and not known to be cloud


def load_cube(
    items: Iterable[Item | pystac.Item],
    grid: Grid,
    *,
    bands: Sequence[str] = BANDS,
    reader: str = "stackstac",
    chunk: int = CHUNK,
    access: Access | None = None,
    scalings: dict[str, Scaling] | None = None,
) -> xr.DataArray:
    """Lazy surface reflectance of `items` on `grid`, float32 (time, band, y, x), NaN where nothing was seen.

    items: as `search` returns them, or pystac's. One layer an item that meets the grid, in order of acquisition and
    id. Coordinates: `time` (UTC), `id`, `acquisition`, `offset` (with its reason), `scl` (time, y, x; lazy, uint8
    classes, 0 = no data), x and y pixel centres in metres (y descending), `spatial_ref`. What lies on another lattice
    is resampled bilinearly, SCL (or Landsat's QA_PIXEL as SCL classes) by nearest neighbour. Reflectance is
    (DN + offset) x scale per item, at least 0.0001, as `sensors.scaling` decides from what the item says (a map looks
    at the pixels too: where they contradict it, give `scalings`, by id).
    reader: "stackstac" or "odc". chunk: dask chunk side in pixels. Raises InputError.
    """
    if isinstance(bands, str) or not bands or (unknown := sorted(set(bands) - set(BANDS))):
        given = bands if isinstance(bands, str) or not bands else unknown[0]
        raise InputError(f"bands: {given!r} is not a list of {', '.join(BANDS)}")
    how: dict[str, Any] = {"reader": reader, "chunks": (chunk, chunk), "access": access, "scalings": scalings}
    layers = load_layers(_as_json(items), grid, bands=tuple(bands), **how)
    dn = layers["dn"]
    cube = xr.where(dn == NODATA, np.float32(np.nan), dn.astype(np.float32) * np.float32(SCALE))
    cube = cube.transpose("time", "band", "y", "x").assign_coords(scl=layers["scl"])
    cube.attrs = {"long_name": "surface reflectance", "units": "1", **layers.attrs}
    return cube.rename("reflectance")


def load_layers(
    items: list[Item],
    grid: Grid,
    *,
    bands: tuple[str, ...] = BANDS,
    reader: str = "stackstac",
    chunks: tuple[int, int] = (CHUNK, CHUNK),
    access: Access | None = None,
    scalings: dict[str, Scaling] | None = None,
    warn: bool = True,
) -> xr.Dataset:
    """What `load_cube` shows as reflectance, before it becomes float: `dn` and `scl`, both lazy.

    dn: uint16 (time, band, y, x), reflectance x 10,000 with the offset applied, at least 1; 0 = nothing seen.
    scl: uint8 (time, y, x). A band that no item has is 0 throughout. chunks: rows and columns of a dask chunk.
    warn: of items whose clouds are not masked.
    """
    if reader not in READERS:
        raise InputError(f"unknown reader {reader!r}: give one of {', '.join(READERS)}")
    items, sensor = _in_order(items), one_sensor(items)
    plain = [_plain(item) for item in items]
    load = partial(_stack, grid=grid, reader=reader, chunks=chunks, access=access or Access())
    raw = load(plain, bands=bands, resampling="bilinear", dtype=np.dtype("uint16"))
    kept = {str(name): i for i, name in enumerate(raw["id"].values)}
    chosen = [item for item in items if item["id"] in kept]
    quality = load(plain, bands=(SCL,), resampling="nearest", dtype=np.dtype(sensor.dtype)).isel(band=0, drop=True)
    quality = _aligned(quality, list(kept))
    classes = quality.copy(data=quality.data.map_blocks(sensor.classes, dtype=np.uint8))
    blind = [i for i, item in enumerate(chosen) if asset_key(item, SCL) is None]
    if blind:
        if warn:
            told = f"{len(blind)} of {len(chosen)} items have no {sensor.quality}: their clouds are not masked"
            warnings.warn(told, stacklevel=2)
        classes = _replaced(classes, blind, UNCLASSIFIED)
    decided = [(scalings or {}).get(item["id"]) or scaling(item) for item in chosen]
    dn = raw.copy(data=_scaled(raw.data, decided)).rename("dn")
    present = [band for band in bands if any(asset_key(item, band) for item in items)]
    dn.attrs["bands_present"] = present
    layers = xr.Dataset({"dn": dn, "scl": classes.drop_vars("band", errors="ignore")})
    layers = layers.assign_coords(acquisition=("time", np.array([acquisition_id(i) for i in chosen], dtype=str)))
    layers.attrs["bands_present"] = present
    layers = layers.assign_coords(offset=("time", np.array([f"{d.offset} ({d.reason})" for d in decided], dtype=str)))
    return layers.rio.write_crs(crs_wkt(grid.epsg))


def _as_json(items: Iterable[Item | pystac.Item]) -> list[Item]:
    if isinstance(items, str | dict) or not isinstance(items, Iterable):
        raise InputError(f"items is a {type(items).__name__}: give a list of STAC items, as search returns")
    return [item if isinstance(item, dict) else _plain_json(item) for item in items]


def _plain_json(item: pystac.Item) -> Item:
    if not hasattr(item, "to_dict"):
        raise InputError(f"items hold a {type(item).__name__}: give STAC items, as search returns or pystac's")
    made = item.clone()
    if made.get_self_href():
        made.make_asset_hrefs_absolute()
    return made.to_dict(transform_hrefs=False)


def _in_order(items: list[Item]) -> list[Item]:
    """By acquisition, acquisitions by time, and by id within one."""
    first: dict[str, Any] = {}
    for item in items:
        name = acquisition_id(item)
        first[name] = min(first.get(name, moment(item)), moment(item))
    return sorted(items, key=lambda item: (first[acquisition_id(item)], acquisition_id(item), item["id"]))


def _plain(item: Item) -> Item:
    """The item with its assets under our band names, as both backends address bands by one name for all."""
    keys = {band: asset_key(item, band) for band in (*BANDS, SCL)}
    return {**item, "assets": {band: item["assets"][key] for band, key in keys.items() if key}}


def _stack(
    items: list[Item],
    *,
    grid: Grid,
    bands: tuple[str, ...],
    resampling: str,
    dtype: np.dtype,
    reader: str,
    chunks: tuple[int, int],
    access: Access,
) -> xr.DataArray:
    """Stored values, lazy (time, band, y, x), without the items that miss the grid; 0 where there is nothing."""
    there = [item for item in items if any(_reaches(item, band, grid) for band in bands)]
    if not there:
        return _empty(grid, bands, dtype, chunks)
    backend = _stackstac if reader == "stackstac" else _odc
    found = backend(there, grid, bands, resampling, dtype, chunks, access)
    return found.reindex(band=list(bands), fill_value=dtype.type(NODATA)).assign_coords(y=grid.y, x=grid.x)


def _reaches(item: Item, band: str, grid: Grid) -> bool:
    """Whether an item's asset may show some of the grid, as far as the item says where it lies; False without one.

    The grid is projected, densely, into the asset's CRS: an asset may be as wide as the Earth. Never False where it
    shows something, so that no pixel depends on how much is read at a time.
    """
    if band not in item["assets"]:
        return False
    extent = _extent(item, band)
    if extent is None:
        place = shapely.Polygon(np.column_stack(_border(grid))).buffer(NEAR)
        return any(area_of(item).intersects(translate(place, dx)) for dx in (-360, 0, 360))
    epsg, bounds = extent
    if epsg == grid.epsg:
        return _overlap(bounds, grid.bounds)
    if _is_geographic(epsg):
        lon, lat = _border(grid)
        west, south, east, north = lon.min() - NEAR, lat.min() - NEAR, lon.max() + NEAR, lat.max() + NEAR
        return any(_overlap(bounds, (west + dx, south, east + dx, north)) for dx in (-360, 0, 360))
    margin = 0.01 * (grid.bounds[2] - grid.bounds[0])
    try:
        left, bottom, right, top = transform_bounds(grid.epsg, epsg, *grid.bounds, densify_pts=21)
    except CRSError:  # too far from that projection
        return False
    return _overlap(bounds, (left - margin, bottom - margin, right + margin, top + margin))


def _extent(item: Item, band: str) -> tuple[int, BBox] | None:
    """EPSG code and bounds of an asset by the projection extension, None where it is silent."""
    told = {**item["properties"], **item["assets"][band]}
    epsg, transform, shape = (told.get(f"proj:{name}") for name in ("epsg", "transform", "shape"))
    if epsg and transform and shape:
        height, width = shape
        corners = [Affine(*transform[:6]) @ corner for corner in ((0, 0), (width, 0), (0, height), (width, height))]
        x, y = zip(*corners, strict=True)
        return epsg, (min(x), min(y), max(x), max(y))
    box = told.get("proj:bbox")
    return (epsg, tuple(box)) if epsg and box else None


@lru_cache
def _is_geographic(epsg: int) -> bool:
    return CRS.from_epsg(epsg).is_geographic


def _border(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes of the grid's outline, continuous across the antimeridian."""
    step = max(grid.shape) * grid.resolution / 8
    x, y = shapely.get_coordinates(shapely.segmentize(shapely.box(*grid.bounds), step)).T
    return continuous_lonlat(grid.epsg, x, y)


def _overlap(one: BBox, other: BBox) -> bool:
    return one[0] < other[2] and one[2] > other[0] and one[1] < other[3] and one[3] > other[1]


def _placed(item: Item, bands: tuple[str, ...], grid: Grid) -> Item:
    """The item as stackstac takes it: it skips what lies outside an asset's bounds, and projects those by their
    corners alone. So the bounds of an asset of another CRS are the grid's; our reader gives 0 where it has nothing.
    """
    assets = {}
    for band in [band for band in bands if band in item["assets"]]:
        extent = _extent(item, band)
        bounds = extent[1] if extent is not None and extent[0] == grid.epsg else grid.bounds
        assets[band] = {"href": item["assets"][band]["href"], "proj:epsg": grid.epsg, "proj:bbox": list(bounds)}
    return {**item, "properties": {"datetime": item["properties"]["datetime"]}, "assets": assets}


def _stackstac(
    items: list[Item],
    grid: Grid,
    bands: tuple[str, ...],
    resampling: str,
    dtype: np.dtype,
    chunks: tuple[int, int],
    access: Access,
) -> xr.DataArray:
    import stackstac

    stacked = stackstac.stack(
        [_placed(item, bands, grid) for item in items],
        assets=list(bands),
        epsg=grid.epsg,
        resolution=grid.resolution,
        bounds=grid.bounds,
        snap_bounds=False,
        resampling=Resampling[resampling],
        chunksize=(1, 1, *chunks),
        dtype=dtype,
        fill_value=dtype.type(NODATA),
        rescale=False,
        sortby_date=False,
        xy_coords=False,
        properties=False,
        band_coords=False,
        errors_as_nodata=(),
        reader=partial(ExactReader, access=access),
    )
    return _named(stacked, [str(i) for i in stacked["id"].values], stacked["time"].values)


def _odc(
    items: list[Item],
    grid: Grid,
    bands: tuple[str, ...],
    resampling: str,
    dtype: np.dtype,
    chunks: tuple[int, int],
    access: Access,
) -> xr.DataArray:
    import odc.stac
    import pystac
    from odc.geo.geobox import GeoBox

    # odc-stac opens whatever GDAL can, a VRT that names other files among it
    hrefs = {item["assets"][band]["href"] for item in items for band in bands if band in item["assets"]}
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        list(pool.map(partial(check_asset, access=access), sorted(hrefs)))
    odc.stac.configure_rio(cloud_defaults=True, **{k: v for k, v in GDAL_OPTIONS.items() if k != "GDAL_CACHEMAX"})
    with _PYSTAC:
        footprints = [shapely.geometry.mapping(area_of(item)) for item in items]  # which it wants of every item
        parsed = [pystac.Item.from_dict({**i, "geometry": f}) for i, f in zip(items, footprints, strict=True)]
    loaded = odc.stac.load(
        parsed,
        patch_url=partial(address_of, access=access),
        bands=[band for band in bands if any(band in item["assets"] for item in items)],
        geobox=GeoBox(grid.shape, grid.transform, f"EPSG:{grid.epsg}"),
        groupby="id",
        resampling=resampling,
        dtype=str(dtype),
        nodata=NODATA,
        chunks={"y": chunks[0], "x": chunks[1]},
        preserve_original_order=True,
    )
    stacked = loaded.to_dataarray("band").transpose("time", "band", "y", "x")
    return _named(stacked.drop_vars("spatial_ref"), [item["id"] for item in items], stacked["time"].values)


def _named(stacked: xr.DataArray, ids: list[str], times: np.ndarray) -> xr.DataArray:
    bare = xr.DataArray(stacked.data, dims=stacked.dims, coords={"band": stacked["band"].values.astype(str)})
    return bare.assign_coords(time=times.astype("datetime64[ns]"), id=("time", np.array(ids, dtype=str)))


def _empty(grid: Grid, bands: tuple[str, ...], dtype: np.dtype, chunks: tuple[int, int]) -> xr.DataArray:
    data = da.zeros((0, len(bands), *grid.shape), dtype=dtype, chunks=(1, 1, *chunks))
    none = np.array([], dtype=str)
    coords = {
        "time": np.array([], "datetime64[ns]"),
        "id": ("time", none),
        "band": list(bands),
        "y": grid.y,
        "x": grid.x,
    }
    return xr.DataArray(data, dims=("time", "band", "y", "x"), coords=coords)


def _aligned(classes: xr.DataArray, ids: list[str]) -> xr.DataArray:
    """`classes` with one layer for each of `ids`, 0 for those it lacks."""
    have = {str(name): i for i, name in enumerate(classes["id"].values)}
    blank = da.zeros(classes.shape[1:], dtype=classes.dtype, chunks=classes.data.chunksize[1:])
    layers = [classes.data[have[name]] if name in have else blank for name in ids]
    data = da.stack(layers) if layers else classes.data[:0]
    return xr.DataArray(data, dims=("time", "y", "x"), coords={"y": classes["y"], "x": classes["x"]}, name="scl")


def _replaced(classes: xr.DataArray, layers: list[int], value: int) -> xr.DataArray:
    blind = np.isin(np.arange(classes.sizes["time"]), layers)[:, None, None]
    return classes.copy(data=da.where(blind, np.uint8(value), classes.data))


def _scaled(dn: da.Array, decided: list[Scaling]) -> da.Array:
    """Stored DN (time, band, y, x) to reflectance x 10,000, layer by layer."""
    if all(d.offset == 0 and d.scale == SCALE for d in decided):
        return dn
    by_layer = da.from_array(np.array(decided, dtype=object).reshape(-1, 1, 1, 1), chunks=1)
    return da.map_blocks(_rescaled, dn, by_layer, dtype="uint16", meta=dn._meta)


def _rescaled(dn: np.ndarray, decided: np.ndarray) -> np.ndarray:
    return rescale(dn, decided.item())


def rescale(dn: np.ndarray, decided: Scaling) -> np.ndarray:
    """Stored DN to reflectance x 10,000, uint16: 0 stays nodata, dark pixels stop at 1 and don't wrap round."""
    if decided.offset == 0 and decided.scale == SCALE:
        return dn
    value = (dn.astype(np.float32) + np.float32(decided.offset)) * np.float32(decided.scale / SCALE)
    scaled = np.clip(np.rint(value), 1, np.iinfo(np.uint16).max).astype(np.uint16)
    return np.where(dn == NODATA, np.uint16(NODATA), scaled)
