"""A STAC item beside an exported file: where, when, what columns or bands, which model, from which scenes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pystac
import shapely

from . import __version__
from .grid import WINDOW, continuous_lonlat, zone_box
from .inference import NOT_OBSERVED
from .scenes import Period
from .store import Store

LINKS = 500  # derived_from links at most; `minemap:items` has the number of all
TYPES = {
    ".tif": pystac.MediaType.COG,
    ".tiff": pystac.MediaType.COG,
    ".parquet": "application/vnd.apache.parquet",
    ".geojson": pystac.MediaType.GEOJSON,
    ".gpkg": pystac.MediaType.GEOPACKAGE,
    ".pmtiles": "application/vnd.pmtiles",
    ".zarr": "application/vnd.zarr; version=3",
}
EXTENSIONS = [
    f"https://stac-extensions.github.io/{name}/schema.json"
    for name in ("projection/v2.0.0", "processing/v1.2.0", "mlm/v1.4.0")
]
TABLE = "https://stac-extensions.github.io/table/v1.2.0/schema.json"
CLASSIFICATION = "https://stac-extensions.github.io/classification/v2.0.0/schema.json"


def item_path(out: Path) -> Path:
    return out.with_name(out.name + ".stac.json")


def describe(
    store: Store,
    out: Path,
    periods: list[Period],
    groups: list[str],
    *,
    about: dict[str, Any],
    threshold: float | None = None,
) -> dict[str, Any]:
    """The item of a file `out` that shows `periods` of the zones `groups`, as JSON.

    about: `properties` and `asset`, what is particular to the kind of file (projection, columns, bands) and
    `extensions`. threshold: that of the file, None where it holds probabilities.
    """
    attributes = store.attributes()
    period = Period(min(p.start for p in periods), max(p.end for p in periods))
    records = [store.record(tile, p) or {} for p in periods for g in groups for tile in store.done(g, p)]
    used = sorted({name for record in records for name in record.get("items", [])})
    shape, bbox = _footprint(store, periods, groups)
    properties = {
        "title": f"Mining footprint {period}, {attributes['model']}",
        "start_datetime": f"{period.start}T00:00:00Z",
        "end_datetime": f"{period.end}T23:59:59Z",
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "processing:software": {"minemap": __version__},
        "processing:lineage": _lineage(attributes["recipe"]),
        "minemap:model_sha256": attributes["model_sha256"],
        "minemap:parameters_hash": attributes["parameters_hash"],
        "minemap:items": len(used),
        **({} if threshold is None else {"minemap:threshold": threshold}),
        **_model(attributes),
        **about.get("properties", {}),
    }
    item = pystac.Item(
        id=f"{out.stem}-{period.slug}",
        geometry=shapely.geometry.mapping(shape),
        bbox=bbox,
        datetime=None,
        start_datetime=datetime(period.start.year, period.start.month, period.start.day, tzinfo=UTC),
        end_datetime=datetime(period.end.year, period.end.month, period.end.day, 23, 59, 59, tzinfo=UTC),
        properties=properties,
        stac_extensions=[*EXTENSIONS, *about.get("extensions", [])],
    )
    data = pystac.Asset("./" + quote(out.name), media_type=TYPES[out.suffix.lower()], roles=["data"])
    data.extra_fields.update(about.get("asset", {}))
    item.add_asset("data", data)
    item.add_asset("model", _model_asset(attributes))
    for link in _sources(store, used):
        item.add_link(link)
    return json.loads(json.dumps(item.to_dict(include_self_link=False, transform_hrefs=False)))


def of_raster(crs: int, transform: Any, shape: tuple[int, int], threshold: float | None) -> dict[str, Any]:
    """What is particular to a GeoTIFF: its projection, its band, and its classes where it has a threshold."""
    classes = [
        {"value": 0, "name": "not_mine", "description": "no mine"},
        {"value": 1, "name": "mine", "description": "mine"},
        {"value": NOT_OBSERVED, "name": "not_observed", "description": "not observed", "nodata": True},
    ]
    band: dict[str, Any] = {"name": "probability", "data_type": "uint8", "nodata": NOT_OBSERVED, "unit": "%"}
    if threshold is not None:
        band = {"name": "mine", "data_type": "uint8", "nodata": NOT_OBSERVED, "classification:classes": classes}
    return {
        "properties": {"proj:code": f"EPSG:{crs}", "proj:shape": list(shape), "proj:transform": list(transform)[:6]},
        "asset": {"bands": [band]},
        "extensions": [] if threshold is None else [CLASSIFICATION],
    }


def of_table(columns: dict[str, tuple[str, str]], rows: int) -> dict[str, Any]:
    """What is particular to polygons. columns: name -> (type, description)."""
    table = [{"name": name, "type": kind, "description": text} for name, (kind, text) in columns.items()]
    told = {"table:columns": table, "table:row_count": rows, "table:primary_geometry": "geometry"}
    return {"properties": {"proj:code": "EPSG:4326", **told}, "extensions": [TABLE]}


def _footprint(store: Store, periods: list[Period], groups: list[str]) -> tuple[shapely.Geometry, list[float]]:
    """What was mapped, as polygons in degrees, and its bounds: west > east across the antimeridian."""
    parts = []
    for period, tile in ((p, tile) for p in periods for group in groups for tile in store.done(group, p)):
        record = store.record(tile, period)
        top, bottom, left, right = record["windows"] if record else (0, tile.height // WINDOW) * 2
        inner = tile.window(top * WINDOW, left * WINDOW, (bottom - top) * WINDOW, (right - left) * WINDOW)
        edge = shapely.segmentize(shapely.box(*inner.bounds), 5000.0)
        shape = shapely.transform(edge, lambda p, e=tile.epsg: np.stack(continuous_lonlat(e, *p.T), axis=1))
        parts.append(shape & shapely.box(*zone_box(tile.epsg)))
    whole = shapely.union_all(parts)
    outline = shapely.orient_polygons(shapely.set_precision(whole, 1e-7))
    west, south, east, north = (round(float(n), 7) for n in outline.bounds)
    if west == -180 and east == 180 and not outline.intersects(shapely.LineString([(0, -90), (0, 90)])):
        bounds = shapely.bounds(shapely.get_parts(outline))
        west, east = float(bounds[bounds[:, 0] > 0, 0].min()), float(bounds[bounds[:, 0] < 0, 2].max())
    return outline, [west, south, east, north]


def _lineage(recipe: dict[str, Any]) -> str:
    side, shared = recipe["window"] + 2 * recipe["halo"], 2 * recipe["halo"]
    network = f"semantic segmentation of {side}-px windows that overlap by {shared} px"
    return f"median of clear looks at surface reflectance, {network}"


def _model(attributes: dict[str, Any]) -> dict[str, Any]:
    """The model's properties in the terms of the MLM extension."""
    recipe = attributes["recipe"]
    history = recipe["training"]
    side = recipe["window"] + 2 * recipe["halo"]
    taken = {"shape": [-1, len(recipe["mean"]), side, side], "dim_order": ["batch", "bands", "height", "width"]}
    given = {"shape": [-1, 1, side, side], "dim_order": ["batch", "classes", "height", "width"]}
    scaling = [
        {"type": "z-score", "mean": mean, "stddev": std}
        for mean, std in zip(recipe["mean"], recipe["std"], strict=True)
    ]
    indices = [{"name": name, "format": "minemap", "expression": name} for name in recipe["derived"]]
    return {
        "mlm:name": recipe["name"],
        "mlm:architecture": recipe["architecture"],
        "mlm:tasks": ["semantic-segmentation"],
        "mlm:framework": "pytorch",
        "mlm:framework_version": version("torch"),
        "mlm:pretrained": any(part.get("imagenet", False) for part in (history, history.get("visible", {}))),
        "mlm:hyperparameters": {**recipe["options"], "precision": attributes["parameters"]["precision"]},
        "mlm:input": [
            {
                "name": "median of clear looks, surface reflectance",
                "bands": [*({"name": band} for band in recipe["bands"]), *indices],
                "input": {**taken, "data_type": "float32"},
                "value_scaling": scaling,
                "pre_processing_function": None,
            }
        ],
        "mlm:output": [
            {
                "name": "probability of mine",
                "tasks": ["semantic-segmentation"],
                "result": {**given, "data_type": "float32"},
                "classification:classes": [{"value": 1, "name": "mine", "description": "mine"}],
                "post_processing_function": None,
            }
        ],
    }


def _model_asset(attributes: dict[str, Any]) -> pystac.Asset:
    """The checkpoint by its hash: its folder is a matter of the machine it was used on."""
    return pystac.Asset(
        f"urn:sha256:{attributes['model_sha256']}",
        title=f"checkpoint {attributes['model']}",
        description="its identity: the sha256 of its checksum file",
        media_type="application/octet-stream; application=safetensors",
        roles=["mlm:model", "mlm:weights"],
        extra_fields={"mlm:artifact_type": "safetensors"},
    )


def _sources(store: Store, names: list[str]) -> list[pystac.Link]:
    """Links to the catalogue's own pages of the first LINKS items that have one."""
    links = []
    for name, item in zip(names, store.read_items(names[:LINKS]), strict=False):
        own = [link for link in item.get("links", []) if link.get("rel") == "self"]
        links += [pystac.Link("derived_from", own[0]["href"], pystac.MediaType.GEOJSON, title=name)] if own else []
    return links
