"""Vector files: an area of interest, sites, outlines of mines; and which pixels lie in a shape."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError
from .grid import Grid
from .places import Place

if TYPE_CHECKING:
    import geopandas
    import shapely

AOI = "aoi.wkt"  # in the meta folder


def load_aoi(path: str | Path) -> shapely.Geometry:
    """The union of a vector file's polygons in degrees. Raises InputError."""
    return read_polygons(path, "aoi").union_all()


def read_polygons(path: str | Path, role: str, layer: str | None = None) -> geopandas.GeoSeries:
    """The valid polygons of a vector file in degrees, one a feature. Raises InputError, which names `role`."""
    polygons = read_shapes(path, role, layer).geometry
    polygons = polygons[polygons.geom_type.isin(["Polygon", "MultiPolygon"])].make_valid()
    mixed = polygons.geom_type == "GeometryCollection"
    polygons[mixed] = polygons[mixed].map(polygonal)
    polygons = polygons[polygons.geom_type.isin(["Polygon", "MultiPolygon"])]
    if polygons.is_empty.all():
        raise InputError(f"{role} {path} holds no polygons")
    return polygons


def polygonal(shape: shapely.Geometry) -> shapely.Geometry:
    """The polygons of a shape. Lines, which a spike becomes when it is made valid, have no area, but every pixel that
    they touch would count."""
    import shapely

    parts = shapely.get_parts(shapely.get_parts(shape))  # of the parts of a collection
    return shapely.union_all([part for part in parts if part.geom_type == "Polygon"])


def read_shapes(
    path: str | Path | geopandas.GeoDataFrame, role: str, layer: str | None = None
) -> geopandas.GeoDataFrame:
    """The features of a vector file (GeoParquet by its ending) or of a GeoDataFrame, in degrees. Raises InputError,
    which names `role`. layer: of a file that has several.
    """
    import geopandas
    import shapely

    named = called(path, role)
    if not isinstance(path, str | Path | geopandas.GeoDataFrame):
        raise InputError(f"{role} is a {type(path).__name__}: give a vector file's path, or a GeoDataFrame")
    frame = path if isinstance(path, geopandas.GeoDataFrame) else _read_file(path, named, layer)
    if not isinstance(frame, geopandas.GeoDataFrame) or frame.active_geometry_name is None:
        raise InputError(f"{named} holds no geometries: give a vector file, such as GeoJSON or GeoPackage")
    if not np.isfinite(shapely.get_coordinates(frame.geometry)).all():
        raise InputError(f"{named} has coordinates that are no numbers: mend or leave out those features")
    if frame.crs is None:
        raise InputError(f"{named} has no coordinate reference system: set one there")
    return frame.set_geometry(_in_degrees(frame.geometry))


def called(source: Any, role: str) -> str:
    """What messages call a vector file, or a frame in its place."""
    return f"{role} {source}" if isinstance(source, str | Path) else f"the frame of {role}"


def _read_file(path: str | Path, named: str, layer: str | None) -> Any:
    import geopandas
    from pyogrio.errors import DataLayerError, DataSourceError

    read = geopandas.read_parquet if Path(path).suffix.lower() == ".parquet" else geopandas.read_file
    try:
        return read(path, **({"layer": layer} if layer else {}))
    except (DataSourceError, DataLayerError, OSError, ValueError) as error:
        raise InputError(f"{named} can't be read as a vector file: {str(error).splitlines()[0]}") from error


def _in_degrees(shapes: geopandas.GeoSeries) -> geopandas.GeoSeries:
    """In degrees, each in one piece: what a projection holds across the antimeridian goes on past ±180."""
    import shapely
    from pyproj import Transformer

    degrees = shapes.to_crs(4326)
    west, _, east, _ = shapely.bounds(degrees.values).T
    wide = np.flatnonzero((east - west > 180) & shapes.crs.is_projected)
    to_degrees = Transformer.from_crs(shapes.crs, 4326, always_xy=True)
    for i in wide:
        left, bottom, right, top = shapes.iloc[i].bounds
        middle = to_degrees.transform((left + right) / 2, (bottom + top) / 2)[0]

        def unrolled(points: np.ndarray, middle: float = middle) -> np.ndarray:
            turns = np.rint((points[:, 0] - middle) / 360 * (1 - 1e-9))  # a map of the world keeps both its ends
            return np.column_stack([points[:, 0] - 360 * turns, points[:, 1]])

        degrees.iloc[i] = shapely.transform(degrees.iloc[i], unrolled)
    return degrees


def in_zone(area: shapely.Geometry, epsg: int) -> shapely.Geometry:
    """The part of an area (degrees) in and around a zone, in the zone's metres; may be empty.

    Clipped in degrees first: far from its zone a projection folds, and at the antimeridian the area goes on.
    """
    import geopandas
    import shapely
    from shapely.affinity import translate

    west = (epsg % 100) * 6 - 186
    around = shapely.box(west - 1, -90, west + 7, 90)
    parts = shapely.union_all([translate(area, dx).intersection(around) for dx in (-360, 0, 360)])
    return geopandas.GeoSeries([shapely.segmentize(polygonal(parts), 0.01)], crs=4326).to_crs(epsg).iloc[0]


def inside_aoi(grid: Grid, path: Place) -> np.ndarray:
    """Which pixel centres lie in the area kept in the file `path` (of the meta folder), bool (y, x)."""
    return inside(grid, _projected(path.read_text(), grid.epsg))


def inside(grid: Grid, area: shapely.Geometry) -> np.ndarray:
    """Which pixel centres lie in an area given in the zone's metres, bool (y, x)."""
    from rasterio.features import geometry_mask

    if area.is_empty:
        return np.zeros(grid.shape, bool)
    return geometry_mask([area], grid.shape, grid.transform, invert=True)


@lru_cache(maxsize=8)
def _projected(wkt: str, epsg: int) -> shapely.Geometry:
    import shapely

    return in_zone(shapely.from_wkt(wkt), epsg)
