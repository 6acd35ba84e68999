"""A map to files that other programs read: COG, Zarr pyramid, polygons (GeoParquet, GeoJSON, GPKG, PMTiles), PNG."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from .contents import choose_period, sorted_periods
from .errors import InputError, StoreError, first_line
from .files import check_file, drafted, write_atomically
from .inference import NOT_OBSERVED, check_threshold, mine_from
from .polygons import COLUMNS, polygons
from .pyramid import write_pyramid
from .scenes import Period
from .stac_item import describe, item_path, of_raster, of_table
from .store import Store, open_map
from .zones import QUICKLOOK

if TYPE_CHECKING:
    import geopandas
    from matplotlib.figure import Figure

PICTURE_SIDE = 1600  # pixels of the longer side of a panel
BLOCK = 2048  # rows and columns copied at a time
MAX_ZOOM = 13  # of vector tiles: their steps are then 1 m
MINE_COLOUR = (227, 26, 28)
CLEAR = {NOT_OBSERVED: (0, 0, 0, 0)}
# Never mine, mine at both dates, gain, loss
CHANGE_COLOURS = {
    0: (235, 235, 225, 255),
    1: (130, 120, 110, 255),
    2: (*MINE_COLOUR, 255),
    3: (69, 117, 180, 255),
    **CLEAR,
}


@dataclass(frozen=True)
class Shape:
    """How polygons are made of a map. threshold: 0-1. min_area: hectares. smooth: see `polygons`."""

    threshold: float | None = None
    min_area: float = 0.0
    smooth: bool = False


def export(
    path: str | Path,
    out: str | Path,
    *,
    date: str | None = None,
    threshold: float | None = None,
    zone: str | None = None,
    min_area: float = 0.0,
    smooth: bool = False,
) -> Path:
    """Writes a map of one period to `out`, by its ending, and beside geodata a STAC item, `out`.stac.json.

    .zarr is a folder with the probability of all zones and periods (or `date`) at ever coarser levels, see `pyramid`;
    .tif (COG) and .png show one zone; .parquet (GeoParquet), .geojson (RFC 7946), .gpkg and .pmtiles hold the
    footprint's polygons of all zones.

    A map of change goes to .tif alone: its classes with a colour table, without an item.

    date: one of the map's periods, the last one when None. threshold: 0-1; a COG then holds 1 = mine, 0 = not, 255 =
    not observed instead of per cent; outlines use it, the model's own when None. zone: the group, needed for .tif
    and .png where there are several. min_area (hectares), smooth: see `polygons`. Raises InputError, StoreError.
    """
    out = Path(out)
    ending = out.suffix.lower()
    endings = (*RASTERS, *VECTORS, ".zarr")
    if ending not in endings:
        raise InputError(f"can't export to {out.name!r}: endings are {', '.join(endings)}, .html")
    if ending != ".zarr":
        check_file(out)
    if threshold is not None:
        check_threshold(threshold)
    shape = Shape(threshold, min_area, smooth)
    if ending in COGS and Store.opened(path).kind == "change":
        if date is not None or shape != Shape():
            raise InputError(f"{path} is a map of change: it holds classes of two dates, leave the options out")
        return _export_change(path, out, zone)
    if ending in RASTERS:
        if shape != Shape(threshold):
            raise InputError(f"min_area and smooth shape polygons: {ending} has none")
        return _export_raster(path, out, date, threshold, zone)
    if zone is not None:
        raise InputError(f"zone {zone}: {ending} holds all zones; leave it out")
    if ending == ".zarr":
        if shape != Shape():
            raise InputError("threshold, min_area and smooth shape footprints: .zarr holds probabilities")
        return _export_pyramid(path, out, date)
    return _export_vector(path, out, date, shape)


def _export_raster(path: str | Path, out: Path, date: str | None, threshold: float | None, zone: str | None) -> Path:
    store = Store.at(path)
    store.attributes()  # of a map
    data = open_map(store.path, zone)
    epsg = data.rio.crs.to_epsg()
    group = f"utm{epsg}"
    period = choose_period(store, date, group)
    _mapped(store, [group], period)
    data = data.isel(time=period_index(data, period))
    with store.damage_named(), drafted(out) as draft:
        RASTERS[out.suffix.lower()](data, draft, threshold=threshold, store=store)
        if out.suffix.lower() != ".png":
            transform = data.rio.transform(recalc=True)
            about = of_raster(epsg, transform, (data.sizes["y"], data.sizes["x"]), threshold)
            _write_item(store, out, [period], [group], about, threshold)
    return out


def _export_change(path: str | Path, out: Path, zone: str | None) -> Path:
    store = Store.opened(path)
    if not any(store.done(group) for group in store.groups()):
        raise InputError(f"{path} has nothing compared yet")
    data, about = open_map(path, zone), store.attributes()
    told = {name: str(about["parameters"][name]) for name in ("before", "after", "method", "threshold")}
    with store.damage_named(), drafted(out) as draft:
        _write_tif(data["change"], draft, lambda part: part.values, CHANGE_COLOURS, {**_software(about), **told})
    return out


def _export_vector(path: str | Path, out: Path, date: str | None, shape: Shape) -> Path:
    store = Store.at(path)
    period = choose_period(store, date)
    groups = _mapped(store, store.groups(), period)
    frame = polygons(path, date=str(period), **vars(shape))
    covering = ["bbox"] if out.suffix.lower() == ".parquet" else []
    about = of_table({name: COLUMNS[name] for name in [*frame.columns, *covering]}, len(frame))
    with drafted(out) as draft:
        try:
            VECTORS[out.suffix.lower()](frame, draft)
        except RuntimeError as error:  # GDAL's: mostly a full disk
            raise StoreError(f"{out} can't be written: {first_line(error)}") from error
        limit = store.attributes()["recipe"]["threshold"] if shape.threshold is None else shape.threshold
        _write_item(store, out, [period], groups, about, limit)
    return out


def _export_pyramid(path: str | Path, out: Path, date: str | None) -> Path:
    store = Store.at(path)
    periods = sorted_periods(store) if date is None else [choose_period(store, date)]
    groups = _mapped(store, store.groups(), *periods)
    write_pyramid(store, out, periods)
    about = {"properties": {"proj:code": f"EPSG:{groups[0][3:]}" if len(groups) == 1 else None}}
    _write_item(store, out, periods, groups, about, None)
    return out


def _mapped(store: Store, groups: list[str], *periods: Period) -> list[str]:
    """The zones that have something done in any of the periods. Raises InputError when none has."""
    found = [group for group in groups if any(store.done(group, period) for period in periods)]
    if not found:
        raise InputError(f"{store.path} has nothing mapped yet for {', '.join(map(str, periods))}")
    return found


def _write_item(
    store: Store, out: Path, periods: list[Period], groups: list[str], about: dict[str, Any], threshold: float | None
) -> None:
    item = describe(store, out, periods, groups, about=about, threshold=threshold)
    write_atomically(item_path(out), json.dumps(item, indent=1) + "\n")


def write_geoparquet(frame: geopandas.GeoDataFrame, out: Path) -> None:
    """GeoParquet 1.1 with a covering of bounding boxes, so that a reader takes only what it needs."""
    frame.to_parquet(out, write_covering_bbox=True, schema_version="1.1.0", compression="zstd")


def write_geojson(frame: geopandas.GeoDataFrame, out: Path) -> None:
    """RFC 7946: degrees to 1 cm, exteriors anticlockwise, cut at the antimeridian."""
    frame.to_file(out, driver="GeoJSON", layer="footprint", RFC7946="YES", COORDINATE_PRECISION=7, **_kind(frame))


def write_geopackage(frame: geopandas.GeoDataFrame, out: Path) -> None:
    frame.to_file(out, driver="GPKG", layer="footprint", **_kind(frame))


def write_pmtiles(frame: geopandas.GeoDataFrame, out: Path) -> None:
    """Vector tiles for web maps, by GDAL's driver; simplified at small scales."""
    if not len(frame):
        raise InputError(f"there is no polygon to write, and {out.suffix} files can't be empty: lower the threshold")
    options = {"MINZOOM": 0, "MAXZOOM": MAX_ZOOM, "NAME": "minemap footprint"}
    frame.to_file(out, driver="PMTiles", layer="footprint", dataset_options=options)


def _kind(frame: geopandas.GeoDataFrame) -> dict[str, str]:
    return {} if len(frame) else {"geometry_type": "Polygon"}


def period_index(data: xr.Dataset, period: Period) -> int | None:
    """Where a period is on the time axis of an opened map, None where it is not."""
    bounds = data["time_bounds"].values.astype("datetime64[D]").astype(object).tolist()
    return bounds.index([period.start, period.end]) if [period.start, period.end] in bounds else None


def _period_of(data: xr.Dataset) -> Period:
    return Period(*data["time_bounds"].values.astype("datetime64[D]").astype(object))


def _stored(layer: xr.DataArray) -> np.ndarray:
    """Per cent with NaN back to what is stored: uint8 with 255."""
    return np.nan_to_num(layer.values, nan=NOT_OBSERVED).astype(np.uint8)


def write_cog(data: xr.Dataset, out: Path, *, threshold: float | None, store: Store) -> None:
    """A cloud-optimised GeoTIFF, uint8, nodata 255: per cent, or classes with a colour table."""
    colours = None if threshold is None else {0: (235, 235, 225, 255), 1: (*MINE_COLOUR, 255), **CLEAR}

    def encode(part: xr.DataArray) -> np.ndarray:
        return classes(_stored(part), threshold)

    _write_tif(data["probability"], out, encode, colours, _tags(store, data))


def _write_tif(
    layer: xr.DataArray,
    out: Path,
    encode: Callable[[xr.DataArray], np.ndarray],
    colours: dict[int, tuple[int, int, int, int]] | None,
    tags: dict[str, str],
) -> None:
    """`layer` block by block as `encode` (to uint8, 255 = nodata) has it. colours: of classes, None for numbers."""
    import rasterio
    from rasterio.shutil import copy

    height, width = layer.sizes["y"], layer.sizes["x"]
    profile = {
        "driver": "GTiff",
        "dtype": "uint8",
        "count": 1,
        "height": height,
        "width": width,
        "crs": layer.rio.crs,
        "transform": layer.rio.transform(recalc=True),
        "nodata": NOT_OBSERVED,
        "tiled": True,
        "compress": "deflate",
        "BIGTIFF": "IF_SAFER",
    }
    plain = out.with_suffix(".plain.tif")
    try:
        with rasterio.open(plain, "w", **profile) as target:
            for window in _blocks(height, width):
                rows, columns = window
                values = encode(layer.isel(y=slice(*rows), x=slice(*columns)))
                target.write(values, 1, window=rasterio.windows.Window.from_slices(rows, columns))
            if colours is not None:
                target.write_colormap(1, colours)
            target.update_tags(**tags)
        overviews = "AVERAGE" if colours is None else "MODE"
        copy(plain, out, driver="COG", compress="deflate", overview_resampling=overviews, BIGTIFF="IF_SAFER")
    finally:
        plain.unlink(missing_ok=True)


def classes(percent: np.ndarray, threshold: float | None) -> np.ndarray:
    """Per cent (uint8, 255 = not observed) as 1 = mine, 0 = not, 255; unchanged without a threshold."""
    if threshold is None:
        return percent
    return np.where(percent == NOT_OBSERVED, NOT_OBSERVED, percent >= mine_from(threshold)).astype(np.uint8)


def _blocks(height: int, width: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    rows = [(r, min(r + BLOCK, height)) for r in range(0, height, BLOCK)]
    columns = [(c, min(c + BLOCK, width)) for c in range(0, width, BLOCK)]
    return [(r, c) for r in rows for c in columns]


def _tags(store: Store, data: xr.Dataset) -> dict[str, str]:
    return {**_software(store.attributes()), "period": str(_period_of(data))}


def _software(about: dict[str, Any]) -> dict[str, str]:
    made = {name: about[name] for name in ("model", "model_sha256")}
    return {"TIFFTAG_SOFTWARE": f"minemap {about['minemap']}", **made}


def write_picture(data: xr.Dataset, out: Path, *, threshold: float | None, store: Store) -> None:
    """The composite with the footprint's outline beside the probability: scale bar, north, legend, date."""
    draw_picture(data, threshold=threshold, store=store).savefig(out, dpi=110)


def draw_picture(data: xr.Dataset, *, threshold: float | None, store: Store) -> Figure:
    """The figure of `write_picture`. Not of pyplot, whose backend is the user's."""
    from matplotlib.figure import Figure

    about = store.attributes()
    limit = about["recipe"]["threshold"] if threshold is None else threshold
    data = _cropped(data)
    percent, ground, kilometres = _panels(data)
    ratio = min(3.0, max(0.3, percent.shape[0] / percent.shape[1]))
    figure = Figure(figsize=(14, 7 * ratio + 1.1), layout="constrained")
    axes = figure.subplots(1, 2)
    extent = (0.0, kilometres[1], 0.0, kilometres[0])
    axes[0].imshow(ground, extent=extent, interpolation="nearest")
    mine = percent >= mine_from(limit)  # never where it is NaN, not observed
    if mine.any() and not mine.all():
        axes[0].contour(mine[::-1], levels=[0.5], colors="yellow", linewidths=0.8, extent=extent, origin="lower")
    axes[0].set_title(f"{about['parameters']['sensor'].capitalize()} composite, footprint outlined")
    shown = axes[1].imshow(percent, extent=extent, vmin=0, vmax=100, cmap="inferno", interpolation="nearest")
    axes[1].set_facecolor("lightgrey")
    axes[1].set_title("Probability of mine (grey: not observed)")
    figure.colorbar(shown, ax=axes[1], label="per cent", shrink=0.8)
    for axis in axes:
        _scale_bar(axis, kilometres)
        axis.set(xticks=[], yticks=[])
    period, epsg = _period_of(data), data.rio.crs.to_epsg()
    model = fill(f"model {about['model']}", 80)
    title = f"{period.start} to {period.end}   threshold {limit:.2f}   EPSG:{epsg}\n{model}"
    figure.suptitle(title, parse_math=False)
    return figure


def _cropped(data: xr.Dataset) -> xr.Dataset:
    """Without the empty margins, at 80-m steps; all of it when nothing was observed."""
    seen = data["quicklook"].max("rgb").values > 0
    if not seen.any():
        return data
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    y, x = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    fine_y, fine_x = (slice(s.start * QUICKLOOK, s.stop * QUICKLOOK) for s in (y, x))
    return data.isel(y80=y, x80=x, y=fine_y, x=fine_x)


def _panels(data: xr.Dataset) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Per cent (y, x) and colours (y, x, 3), both thinned to a picture's size, and height and width in km."""
    step = max(1, -(-max(data.sizes["y"], data.sizes["x"]) // PICTURE_SIDE))
    percent = data["probability"].isel(y=slice(None, None, step), x=slice(None, None, step)).values
    resolution = float(data["x"][1] - data["x"][0])
    kilometres = data.sizes["y"] * resolution / 1000, data.sizes["x"] * resolution / 1000
    return percent, np.where(np.isnan(percent)[..., None], np.float32(0.8), _colours(data, step)), kilometres


def _colours(data: xr.Dataset, step: int) -> np.ndarray:
    """0-1 (y, x, 3), every `step` pixels: of the composite where it was kept, else of the quicklook's larger ones."""
    y, x = (np.arange(0, data.sizes[name], step) for name in ("y", "x"))
    if "composite" in data and {"red", "green", "blue"} <= set(data["band"].values.tolist()):
        bright = data["composite"].sel(band=["red", "green", "blue"]).isel(y=y, x=x).values / 0.3
        return np.nan_to_num(np.clip(bright, 0, 1) ** 0.7).transpose(1, 2, 0)
    return data["quicklook"].isel(y80=y // QUICKLOOK, x80=x // QUICKLOOK).values.transpose(1, 2, 0) / 255


def _scale_bar(axis: Any, kilometres: tuple[float, float]) -> None:
    """A length of ground and where north is, readable on any ground."""
    from matplotlib.patheffects import withStroke

    target = kilometres[1] / 5
    length = max(n * 10.0**e for e in range(-2, 4) for n in (1, 2, 5) if n * 10.0**e <= target)
    x, y = kilometres[1] * 0.04, kilometres[0] * 0.04
    axis.plot([x, x + length], [y, y], color="white", linewidth=5, solid_capstyle="butt")
    axis.plot([x, x + length], [y, y], color="black", linewidth=2, solid_capstyle="butt")
    label = f"{length:g} km" if length >= 1 else f"{length * 1000:g} m"
    words = {
        "color": "white",
        "fontsize": 9,
        "weight": "bold",
        "path_effects": [withStroke(linewidth=2, foreground="black")],
    }
    axis.annotate(label, (x, y), xytext=(0, 5), textcoords="offset points", **words)
    axis.annotate("▲\nN", (kilometres[1] * 0.96, y), ha="center", **words)


COGS = (".tif", ".tiff")
RASTERS: dict[str, Callable[..., None]] = {**dict.fromkeys(COGS, write_cog), ".png": write_picture}
VECTORS: dict[str, Callable[..., None]] = {
    ".parquet": write_geoparquet,
    ".geojson": write_geojson,
    ".gpkg": write_geopackage,
    ".pmtiles": write_pmtiles,
}
