"""A map as one HTML file that opens from disk without a network: picture, footprint by year, areas, polygons, origin.

Everything is embedded: pictures as WebP, outlines as SVG paths in whole units, numbers as JSON. What comes from data
(ids, names) reaches the page through JSON alone and is set as text, and the page's own policy forbids any request.
The frame is the zone's own projection, or with several zones an equal-area one around the map's middle.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
import xarray as xr
from affine import Affine
from pyproj import CRS, Transformer

from .areas import POOR, area_table
from .contents import choose_period, sorted_periods
from .errors import InputError
from .export import Shape, period_index
from .files import check_file, drafted
from .inference import check_threshold
from .polygons import polygons
from .scenes import Period, parse_period
from .store import Store, open_map
from .zones import QUICKLOOK

if TYPE_CHECKING:
    import geopandas

PICTURE_SIDE = 1600  # pixels of a picture's longer side, at most
PICTURE_BYTES = 5_000_000  # all pictures together
SHAPE_BYTES = 2_500_000  # all outlines together
STEPS = 40_000  # units of the drawing's longer side, at most; a unit is a metre or more
POLYGONS = 2000  # a period, the largest ones
NAMES = 300  # item ids listed a period
WHITE = 0.3  # reflectance that is white


@dataclass(frozen=True)
class Frame:
    """What the page shows. crs: of metres. bounds: left, bottom, right, top. unit: metres a unit of the drawing."""

    crs: CRS
    bounds: tuple[float, float, float, float]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in metres."""
        left, bottom, right, top = self.bounds
        return right - left, top - bottom

    @property
    def unit(self) -> float:
        return max(1.0, max(self.size) / STEPS)

    @property
    def centre(self) -> tuple[float, float]:
        """Longitude and latitude of the middle."""
        left, bottom, right, top = self.bounds
        to_degrees = Transformer.from_crs(self.crs, 4326, always_xy=True)
        return to_degrees.transform((left + right) / 2, (bottom + top) / 2)

    def grid(self, resolution: float) -> tuple[Affine, tuple[int, int]]:
        """Transform and (height, width) of a picture with pixels of `resolution` metres at most, whole ones."""
        width, height = (math.ceil(side / resolution) for side in self.size)
        step = self.size[0] / width, self.size[1] / height
        return Affine(step[0], 0, self.bounds[0], 0, -step[1], self.bounds[3]), (height, width)


def export_page(
    path: str | Path,
    out: str | Path,
    *,
    date: str | None = None,
    threshold: float | None = None,
    min_area: float = 0.0,
    smooth: bool = False,
) -> Path:
    """Writes a map of all zones as one self-contained page: every period of the map, or the one of `date`.

    threshold, min_area, smooth: of the outlines, as in `polygons`; the chart's areas know the threshold alone. Large
    maps get coarser pictures and outlines, and the page says so. Raises InputError, StoreError.
    """
    out = Path(out)
    check_file(out)
    store = Store.at(path)
    about = store.attributes()
    limit = check_threshold(about["recipe"]["threshold"] if threshold is None else threshold)
    every = sorted_periods(store)
    periods = every if date is None else [choose_period(store, date)]
    periods = [p for p in periods if any(store.done(group, p) for group in store.groups())]
    if not periods:
        raise InputError(f"{store.path} has nothing mapped yet")
    opened = {group: open_map(store.path, group) for group in store.groups()}
    zones = {group: data for group, data in opened.items() if data.sizes["x"]}  # those with something done
    with store.damage_named():
        frame = _frame(zones)
        pictures = _pictures(zones, periods, frame)
    data = {
        **_drawing(path, periods, frame, Shape(threshold, min_area, smooth)),
        **pictures,
        "areas": _areas(path, periods, frame, limit),
        "origin": _origin(store, about, periods, limit),
        "first_year": every[0].start.year,  # what was mined by then may be older, whichever periods are shown
    }
    with drafted(out) as draft:
        draft.write_text(_filled(data), encoding="utf-8")
    return out


def _filled(data: dict[str, Any]) -> str:
    """The template with its data. In the JSON no character can end the script or open a tag."""
    template = (files(__package__) / "page.html").read_text(encoding="utf-8")
    safe = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        safe = safe.replace(character, f"\\u{ord(character):04x}")
    names = [period["name"] for period in data["origin"]["periods"]]
    title = "Mining footprint " + (names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}")
    return template.replace("{{title}}", html.escape(title)).replace("{{data}}", safe)


# --- where ------------------------------------------------------------------------------------------------------


def _frame(zones: dict[str, xr.Dataset]) -> Frame:
    """The smallest rectangle around everything that was observed in any period, on the quicklooks' pixels."""
    boxes = {CRS.from_epsg(int(group[3:])): _seen(data) for group, data in zones.items()}
    crs = next(iter(boxes)) if len(boxes) == 1 else _common(boxes)
    found = [Transformer.from_crs(own, crs).transform_bounds(*box) for own, box in boxes.items()]
    left, bottom, right, top = zip(*found, strict=True)
    return Frame(crs, (min(left), min(bottom), max(right), max(top)))


def _seen(data: xr.Dataset) -> tuple[float, float, float, float]:
    """Bounds in metres of what has a colour in any period; of all there is when nothing has."""
    half = abs(float(data["x80"][1] - data["x80"][0])) / 2
    seen = (data["quicklook"] > 0).any(("rgb", "time")).values
    seen = seen if seen.any() else np.ones_like(seen)
    x, y = data["x80"].values[seen.any(axis=0)], data["y80"].values[seen.any(axis=1)]
    return x.min() - half, y.min() - half, x.max() + half, y.max() + half


def _common(boxes: dict[CRS, tuple[float, float, float, float]]) -> CRS:
    """Equal-area around the middle of boxes of several zones; directions as vectors, so that any meridian will do."""
    points = []
    for crs, (left, bottom, right, top) in boxes.items():
        lon, lat = Transformer.from_crs(crs, 4326, always_xy=True).transform((left + right) / 2, (bottom + top) / 2)
        lon, lat = math.radians(lon), math.radians(lat)
        points.append((math.cos(lat) * math.cos(lon), math.cos(lat) * math.sin(lon), math.sin(lat)))
    x, y, z = np.mean(points, axis=0)
    lon, lat = math.degrees(math.atan2(y, x)), math.degrees(math.atan2(z, math.hypot(x, y)))
    return CRS.from_proj4(f"+proj=laea +lat_0={lat:.6f} +lon_0={lon:.6f} +ellps=WGS84 +units=m")


# --- pictures ---------------------------------------------------------------------------------------------------


def _pictures(zones: dict[str, xr.Dataset], periods: list[Period], frame: Frame) -> dict[str, Any]:
    """The composite of each period as a data URI, transparent where nothing was observed, and metres a pixel."""
    finest = min(_resolution(data, _source(data)) for data in zones.values())
    side = PICTURE_SIDE
    seen = {(group, period): _observed(data, period) for group, data in zones.items() for period in periods}
    while True:
        resolution = max(finest, max(frame.size) / side)
        made = [_webp(_picture(zones, period, frame, resolution, seen)) for period in periods]
        if sum(map(len, made)) <= PICTURE_BYTES or side < 200:
            links = ["data:image/webp;base64," + base64.b64encode(one).decode() for one in made]
            return {"pictures": links, "picture_metres": round(resolution, 1)}
        side = int(side * 0.7)


def _source(data: xr.Dataset) -> str:
    """The composite at full resolution where it was kept with its colours, else the quicklook."""
    kept = "composite" in data and {"red", "green", "blue"} <= set(data["band"].values.tolist())
    return "composite" if kept else "quicklook"


def _resolution(data: xr.Dataset, name: str) -> float:
    return float(data["x"][1] - data["x"][0]) * (1 if name == "composite" else QUICKLOOK)


def _observed(data: xr.Dataset, period: Period) -> np.ndarray:
    """Which pixels of a zone's quicklook were observed, at least half of each: bool (y80, x80)."""
    at = period_index(data, period)
    if at is None or _source(data) == "composite":
        return np.zeros((0, 0), bool)
    known = data["probability"].isel(time=at).notnull()
    return known.coarsen(y=QUICKLOOK, x=QUICKLOOK).mean().values >= 0.5


def _picture(
    zones: dict[str, xr.Dataset],
    period: Period,
    frame: Frame,
    resolution: float,
    seen: dict[tuple[str, Period], np.ndarray],
) -> np.ndarray:
    """Red, green, blue, alpha of one period over all zones, uint8 (y, x, 4). seen: of quicklooks, by zone."""
    from rasterio.warp import Resampling, reproject

    transform, shape = frame.grid(resolution)
    out = np.zeros((4, *shape), np.uint8)
    for group, data in zones.items():
        at = period_index(data, period)
        if at is None:
            continue
        colours, own = _colours(data.isel(time=at), resolution, seen[group, period])
        layer = np.zeros_like(out)
        where = {"src_crs": CRS.from_epsg(int(group[3:])).to_wkt(), "dst_crs": frame.crs.to_wkt()}
        reproject(colours, layer, src_transform=own, dst_transform=transform, resampling=Resampling.nearest, **where)
        out = np.where(layer[3] > 0, layer, out)
    return out.transpose(1, 2, 0)


def _colours(data: xr.Dataset, resolution: float, observed: np.ndarray) -> tuple[np.ndarray, Affine]:
    """Colours with alpha, uint8 (4, y, x), thinned to about `resolution`, and their transform."""
    name = _source(data)
    step = max(1, int(resolution / _resolution(data, name)))
    y, x = ("y", "x") if name == "composite" else ("y80", "x80")
    thin = data[name].isel({y: slice(None, None, step), x: slice(None, None, step)})
    if name == "composite":
        bright = np.clip(thin.sel(band=["red", "green", "blue"]).values / WHITE, 0, 1) ** 0.7 * 255
        seen, rgb = np.all(np.isfinite(bright), axis=0), np.rint(np.nan_to_num(bright)).astype(np.uint8)
    else:
        rgb, seen = thin.values, observed[::step, ::step]
    pixel = _resolution(data, name) * step
    own = Affine(pixel, 0, float(thin[x][0]) - pixel / 2, 0, -pixel, float(thin[y][0]) + pixel / 2)
    return np.concatenate([rgb, np.where(seen, 255, 0)[None].astype(np.uint8)]), own


def _webp(picture: np.ndarray) -> bytes:
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(picture, "RGBA").save(file, "WEBP", quality=82, method=4)
        return file.getvalue()


# --- outlines ---------------------------------------------------------------------------------------------------


def _drawing(path: str | Path, periods: list[Period], frame: Frame, shape: Shape) -> dict[str, Any]:
    """Outlines of each period with their numbers, simplified until they fit, and how exact they are."""
    found = [polygons(path, date=str(period), **vars(shape)) for period in periods]
    drawn = [one.iloc[:POLYGONS] for one in found]
    outlines = [_in_units(one, frame) for one in drawn]
    tolerance = 0.0
    while True:
        paths = [[_path(s, tolerance**2) for s in shapely.simplify(shapes, tolerance)] for shapes in outlines]
        if sum(len(text) for texts in paths for text in texts) <= SHAPE_BYTES or tolerance > STEPS:
            break
        tolerance = max(1.0, tolerance * 2)
    width, height = (round(side / frame.unit) for side in frame.size)
    return {
        "width": width,
        "height": height,
        "metres": frame.unit,
        "centre": frame.centre,
        "tolerance": round(max(1.0, tolerance) * frame.unit, 1),
        "polygons": [_rows(one, texts) for one, texts in zip(drawn, paths, strict=True)],
        "counts": [len(one) for one in found],
        "min_area": shape.min_area,
        "smooth": shape.smooth,
    }


def _in_units(found: geopandas.GeoDataFrame, frame: Frame) -> np.ndarray:
    """Polygons in units of the drawing, x to the right and y down, from its upper left corner."""
    left, _, _, top = frame.bounds
    metres = np.asarray(found.geometry.to_crs(frame.crs).values)
    units = shapely.transform(metres, lambda p: (p - (left, top)) * (1, -1) / frame.unit)
    parted = shapely.get_num_geometries(units) > 1  # at 180 degrees, where this drawing has no cut
    units[parted] = [shapely.union_all(shapely.get_parts(shape), grid_size=1) for shape in units[parted]]
    return units


def _path(shape: shapely.Geometry, smallest: float) -> str:
    """An SVG path of whole units, relative after each ring's first point. Outer rings that vanish stay a point;
    holes smaller than `smallest`, square units, are left out."""
    text = []
    for polygon in shapely.get_parts(shape):
        holes = [ring for ring in polygon.interiors if shapely.area(shapely.polygons(ring)) >= smallest]
        for ring in (polygon.exterior, *holes):
            points = np.rint(shapely.get_coordinates(ring)).astype(int)
            steps = np.diff(points[:-1], axis=0)
            steps = steps[steps.any(axis=1)]
            text.append(f"M{points[0][0]} {points[0][1]}l" + " ".join(f"{x} {y}" for x, y in steps.tolist()) + "z")
    return "".join(text).replace(" -", "-").replace("lz", "h0z")


def _rows(found: geopandas.GeoDataFrame, paths: list[str]) -> list[dict[str, Any]]:
    """Numbers and path of each polygon, as the page's script reads them."""
    points = shapely.get_coordinates(shapely.point_on_surface(np.asarray(found.geometry.values)))
    years = found["first_year"].tolist() if "first_year" in found else [None] * len(found)
    return [
        {
            "id": int(row.id),
            "km2": round(float(row.area_km2), 6),
            "p": round(float(row.mean_probability), 3),
            "year": year,
            "open": bool(row.touches_unobserved),
            "at": [round(float(lon), 5), round(float(lat), 5)],
            "d": text,
        }
        for row, year, (lon, lat), text in zip(found.itertuples(), years, points, paths, strict=True)
    ]


# --- numbers and origin -----------------------------------------------------------------------------------------


def _areas(path: str | Path, periods: list[Period], frame: Frame, limit: float) -> list[dict[str, Any]]:
    """Areas of each period; numbers that are not there as None.

    The observed share is that of what was computed or of the frame (in its plane, which is within 0.2 % of the
    ellipsoid's), whichever is smaller: a store that grows holds whole super-tiles, also where no scene reaches, and a
    frame may span places that were never asked for.
    """
    names = ["mapped_area_km2", "area_km2", "area_km2_lower", "area_km2_upper"]
    framed = math.prod(frame.size) / 1e6
    rows = area_table(path, threshold=limit).set_index("period").to_dict("index")
    out = []
    for row in (rows[str(period)] for period in periods):
        whole = row["site_area_km2"]
        seen = min(1.0, row["observed_fraction"] * whole / min(whole, framed)) if whole else 0.0
        numbers = {name: _number(row[name]) for name in names}
        told = {"observed_fraction": round(seen, 4), "poor": seen < POOR, "extrapolated": row["extrapolated"]}
        out.append({**numbers, **told})
    return out


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else round(float(value), 5)


def _origin(store: Store, about: dict[str, Any], periods: list[Period], limit: float) -> dict[str, Any]:
    """Where it all comes from: model, parameters, and the items of each period."""
    told = []
    for period in periods:
        records = [store.record(t, period) for group in store.groups() for t in store.done(group, period)]
        items = sorted({name for record in records if record for name in record["items"]})
        told.append(
            {
                "name": _name(period),
                "start": str(period.start),
                "end": str(period.end),
                "items": items[:NAMES],
                "number": len(items),
            }
        )
    parameters = {k: v for k, v in about["parameters"].items() if k not in ("model", "model_sha256")}
    return {
        "minemap": about["minemap"],
        "model": about["model"],
        "about": about["recipe"]["training"].get("about", ""),
        "sha256": about["model_sha256"],
        "source": about["stac"],
        "threshold": limit,
        "parameters": {k: v if isinstance(v, str) else json.dumps(v) for k, v in parameters.items()},
        "zones": [f"EPSG:{group[3:]}" for group in store.groups()],
        "periods": told,
    }


def _name(period: Period) -> str:
    """A year, a month or a day as it is given; whole years as the first and the last; anything else as start/end."""
    for one in ("%Y", "%Y-%m", "%Y-%m-%d"):
        if parse_period(text := period.start.strftime(one)) == period:
            return text
    first, last = period.start.year, period.end.year
    whole = (str(period.start), str(period.end)) == (f"{first}-01-01", f"{last}-12-31")
    return f"{first}-{last}" if whole else str(period)
