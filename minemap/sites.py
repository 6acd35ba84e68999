"""Sites: the places that a table of areas has a row for, from a vector file, a box, or what a map holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import InputError
from .grid import MAX_LATITUDE, BBox, Grid, check_bbox, grids
from .vectors import called, in_zone, inside, read_shapes

if TYPE_CHECKING:
    import geopandas
    import pandas as pd
    import shapely

NAMES = ("site", "name", "id")  # columns of a vector file, in any case, that may name its sites: the first there is
WORLD = (-180.0, -MAX_LATITUDE, 180.0, MAX_LATITUDE)


@dataclass(frozen=True, eq=False)
class Site:
    """A named place: polygons in degrees (within ±180, cut at the antimeridian), or a box W S E N."""

    name: str
    area: shapely.Geometry | None = None
    bbox: BBox | None = None

    def tiles(self, chunk: int, resolution: float) -> set[Grid]:
        """The super-tiles that may hold pixels of it."""
        boxes = [self.bbox] if self.bbox else [part.bounds for part in _parts(self.area)]
        return {t for b in boxes for grid in grids(b, chunk, resolution=resolution) for t in grid.tiles(chunk)}

    def mask(self, grid: Grid) -> np.ndarray:
        """Which pixels of `grid` are the site's: centre inside, and owned by the grid's zone; bool (y, x)."""
        if self.bbox:
            return grid.inside(self.bbox)
        area = _in_zone(self, grid.epsg)
        if area.is_empty or not area.intersects(_box(grid)):
            return np.zeros(grid.shape, bool)
        return inside(grid, area) & grid.owned()


@lru_cache(maxsize=1024)
def _in_zone(site: Site, epsg: int) -> shapely.Geometry:
    return in_zone(site.area, epsg)


def _box(grid: Grid) -> shapely.Geometry:
    import shapely

    return shapely.box(*grid.bounds)


def _parts(area: shapely.Geometry | None) -> list[shapely.Geometry]:
    return [part for part in getattr(area, "geoms", [area]) if part.area > 0]


def read_sites(path: str | Path | geopandas.GeoDataFrame, *, buffer: float | None = None) -> list[Site]:
    """The sites of a vector file (any that GDAL reads, or GeoParquet) or a frame, in order of their first feature.

    Named by the column `site`, `name` or `id`, in any case ("unnamed 7" where the seventh has none), or by their row
    from 1; features of one name are one site. buffer: metres around each feature (on the ellipsoid); points and lines
    need one. Raises InputError.
    """
    import shapely

    if buffer is not None and not 0 < buffer < 1e6:
        raise InputError(f"buffer is {buffer:g}: give metres, above 0 and below 1,000,000")
    named, frame = called(path, "sites"), read_shapes(path, "sites")
    frame = frame.assign(_site=_names(frame))  # before rows without a place go: names count the file's rows
    frame = frame[~(frame.geometry.isna() | frame.geometry.is_empty)]
    if frame.empty:
        raise InputError(f"{named} holds no places")
    frame = frame.set_geometry(frame.geometry.make_valid())  # the parts of a bow tie may sum to no area
    if buffer is None and (shapely.area(frame.geometry.array) == 0).any():
        raise InputError(f"{named} holds points or lines: give --buffer METRES to make areas of them")
    return [
        Site(str(name), area=shapely.union_all([_whole(shape, buffer) for shape in rows.geometry]))
        for name, rows in frame.groupby("_site", sort=False)
    ]


def _names(frame: geopandas.GeoDataFrame) -> np.ndarray:
    """The site of each feature."""
    columns = [column for column in reversed(frame.columns) if column != frame.active_geometry_name]
    spelled = {str(column).lower(): column for column in columns}
    column = next((spelled[name] for name in NAMES if name in spelled), None)
    rows = np.arange(1, len(frame) + 1).astype(str)
    names = _text(frame[column]) if column else rows
    return np.where(names == "", np.char.add("unnamed ", rows), names)


def _text(column: pd.Series) -> np.ndarray:
    """As text, "" where there is none; whole numbers stay whole beside missing ones."""
    return column.convert_dtypes().astype("string").fillna("").str.strip().to_numpy(dtype=str)


def _whole(shape: shapely.Geometry, buffer: float | None) -> shapely.Geometry:
    """A valid area within ±180 degrees and UTM's latitudes; what runs past the antimeridian comes back round."""
    import shapely
    from shapely.affinity import translate

    if buffer is not None:  # part by part: the middle of what is cut at the antimeridian lies across the Earth
        parts = shapely.get_parts(shapely.get_parts(shape))  # of the parts of a collection
        shape = shapely.union_all([_buffered(part, buffer) for part in parts])
    area = shapely.make_valid(shape)
    return shapely.union_all([translate(area, dx).intersection(shapely.box(*WORLD)) for dx in (-360, 0, 360)])


def _buffered(shape: shapely.Geometry, metres: float) -> shapely.Geometry:
    """All within `metres` of one part of a shape, degrees; in a projection that keeps distances from its middle."""
    import shapely
    from pyproj import Transformer

    middle = shape.centroid
    local = f"+proj=aeqd +lat_0={middle.y} +lon_0={middle.x} +datum=WGS84 +units=m"
    there = Transformer.from_crs(4326, local, always_xy=True)
    near = shapely.transform(shape, there.transform, interleaved=False).buffer(metres)

    def back(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lon, lat = there.transform(x, y, direction="INVERSE")
        return (lon - middle.x + 180) % 360 - 180 + middle.x, lat

    return shapely.transform(near, back, interleaved=False)


def bounds(sites: Iterable[Site]) -> BBox:
    """The smallest box W S E N around the polygons of all sites; W > E where that is across the antimeridian."""
    boxes = np.array([part.bounds for site in sites for part in _parts(site.area)])
    if not len(boxes):
        raise InputError(f"all sites lie beyond {MAX_LATITUDE:g} degrees of latitude, where maps end")
    shifted = boxes.copy()
    shifted[:, [0, 2]] += np.where(boxes[:, [0]] < 0, 360, 0)
    plain, across = ((b[:, 0].min(), b[:, 2].max()) for b in (boxes, shifted))
    if across[1] > 180 > across[0] and across[1] - across[0] < min(plain[1] - plain[0], 180):
        plain = across[0], across[1] - 360
    return check_bbox((plain[0], boxes[:, 1].min(), plain[1], boxes[:, 3].max()))
