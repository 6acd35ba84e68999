"""Items on a Grid as a lazy cube, through stackstac or odc-stac.

Both backends stand behind `_stack`; whatever is odd about them stays in this module.
"""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import rioxarray  # noqa: F401 (registers the .rio accessor)
import xarray as xr
from rasterio.enums import Resampling

from .errors import InputError
from .grid import CHUNK, Grid, crs_wkt
from .reader import GDAL_OPTIONS, Access, ExactReader, address_of, check_asset
from .scenes import acquisition_id, moment
from .sensors import asset_key, one_sensor, scaling
from .sentinel2 import BANDS, NODATA, SCALE, SCL, Item, Scaling

READERS = ("stackstac", "odc")
OPENED_AT_ONCE = 8
_PYSTAC = threading.Lock()  # HACK: pystac 1.15 registers its extensions on first use, and not thread-safely
UNCLASSIFIED = 7  # the SCL class of items that have no SCL: seen, and not known to be cloud


def load_cube(
    items: list[Item],
    grid: Grid,
    *,
    bands: tuple[str, ...] = BANDS,
    reader: str = "stackstac",
    chunk: int = CHUNK,
    access: Access | None = None,
    scalings: dict[str, Scaling] | None = None,
) -> xr.DataArray:
    """Lazy surface reflectance of `items` on `grid`, float32 (time, band, y, x), NaN where nothing was seen.

    One layer an item that meets the grid, in order of acquisition and id; coordinates: `time` (UTC), `id`,
    `acquisition`, `scl` (time, y, x; lazy, uint8 classes, 0 = no data), x and y pixel centres in metres (y
    descending), `spatial_ref`. What lies on another lattice is resampled bilinearly, SCL
    (or Landsat's QA_PIXEL as SCL classes) by nearest neighbour. Reflectance is
    (DN + offset) x scale per item, at least 0.0001, as `sensors.scaling` decides from what the item says (a map looks
    at the pixels too: where they contradict it, give `scalings`, by id).
    reader: "stackstac" or "odc". chunk: dask chunk side in pixels.
    """
    layers = load_layers(
        items, grid, bands=bands, reader=reader, chunks=(chunk, chunk), access=access, scalings=scalings
    )
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
    layers.attrs["offsets"] = {i["id"]: f"{d.offset} ({d.reason})" for i, d in zip(chosen, decided, strict=True)}
    return layers.rio.write_crs(crs_wkt(grid.epsg))


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
    with_any = [item for item in items if any(band in item["assets"] for band in bands)]
    if not with_any:
        return _empty(grid, bands, dtype, chunks)
    backend = _stackstac if reader == "stackstac" else _odc
    found = backend(with_any, grid, bands, resampling, dtype, chunks, access)
    if not found.sizes["time"]:
        return _empty(grid, bands, dtype, chunks)
    return found.reindex(band=list(bands), fill_value=dtype.type(NODATA)).assign_coords(y=grid.y, x=grid.x)


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
        items,
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
    from stackstac.prepare import prepare_items

    # Without the items that miss the grid, as stackstac does it, so that both give the same layers
    bounds, step = grid.bounds, grid.resolution
    *_, items = prepare_items(items, list(bands), grid.epsg, step, bounds, snap_bounds=False, rescale=False)
    if not items:
        return _empty(grid, bands, dtype, chunks)
    # odc-stac opens whatever GDAL can, a VRT that names other files among it
    hrefs = {item["assets"][band]["href"] for item in items for band in bands if band in item["assets"]}
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        list(pool.map(partial(check_asset, access=access), sorted(hrefs)))
    odc.stac.configure_rio(cloud_defaults=True, **{k: v for k, v in GDAL_OPTIONS.items() if k != "GDAL_CACHEMAX"})
    with _PYSTAC:
        parsed = [pystac.Item.from_dict(item) for item in items]
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
