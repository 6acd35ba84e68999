"""Training chips from polygons of mines and a STAC source.

A chip is a window of the zone's own lattice, read, masked and composited by the code that makes maps, so training
and mapping see the same pixels. Windows that hold a part of a large enough polygon become chips; large polygons are
covered by several. Chips within 5 km of each other (chained) share a block, and a block lies in one split.

The chips are made one by one in the folder beside the set (`chips.zarr.meta`), and put together and renamed at the
end: the same command goes on where an interrupted one stopped, with the same scenes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import shutil
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import zarr
from numpy.typing import NDArray
from pyproj import Geod
from shapely.geometry import box
from zarr.codecs import ZstdCodec

from minemap import __version__
from minemap.errors import InputError, NoItemsError, StoreError
from minemap.files import check_outside, read_json, write_atomically
from minemap.grid import CHUNK, BBox, Grid, cell_grid, continuous_lonlat, grids, zone_epsg
from minemap.places import local, remove
from minemap.planning import Options
from minemap.reader import Access
from minemap.scenes import Period, Scenes, Source, parse_months, parse_period, search, search_area, sensor_at, source
from minemap.sensors import Sensor, asset_key
from minemap.sentinel2 import BANDS, SCL
from minemap.store import Store
from minemap.supertile import Reading, read_image, with_decision
from minemap.training.chips import APART, CHIPS_MARK, IGNORE, earth_centred, is_chips
from minemap.vectors import in_zone, inside, read_polygons

SIZES = (64, 128, 256, 512, 1024, CHUNK)  # pixels; they divide a cell, whose scenes a chip uses
NEAR = 4  # windows; how far from a chip with a mine land without one is drawn
MAPS = ("aoi", "refresh", "keep_composite", "model", "extent", "chunk", "precision", "near")  # options of a map alone
TOGETHER = 16  # chips in a chunk of the Zarr arrays


@dataclass(frozen=True)
class ChipRule:
    """Which windows become chips, and how they are split.

    size: side in pixels. min_area: km², of a polygon that asks for chips; smaller ones are drawn where they lie in
    such a chip, and ask for none. The default is the paper's for coarse sets. negatives: windows without any polygon,
    at most so many. val: share of the chips that validate. seed: of the draw of negatives and of the split.
    """

    size: int = 256
    min_area: float = 9.8
    negatives: int = 0
    val: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise InputError(f"size is {self.size}: give one of {', '.join(map(str, SIZES))}")
        if not 0 <= self.val < 1:
            raise InputError(f"val is {self.val:g}: it is a share, 0 or more and below 1")
        if not self.min_area >= 0 or self.negatives < 0:
            raise InputError(f"min_area {self.min_area:g} and negatives {self.negatives} can't be below 0")


class Labels:
    """The polygons in and around one zone, in its metres, indexed by place."""

    def __init__(self, polygons: NDArray[np.object_], large: NDArray[np.bool_], epsg: int) -> None:
        self.parts = np.array([in_zone(polygon, epsg) for polygon in polygons], dtype=object)
        self.large = self.parts[large]
        self.tree = shapely.STRtree(self.parts)

    def within(self, place: Grid) -> NDArray[np.object_]:
        """The polygons that meet a place."""
        return self.parts[self.tree.query(box(*place.bounds), predicate="intersects")]

    def mask(self, place: Grid) -> NDArray[np.bool_]:
        """Which pixels have their centre in a polygon, bool (y, x)."""
        return inside(place, shapely.GeometryCollection(list(self.within(place))))


@dataclass(frozen=True)
class Ground:
    """The polygons of a file in degrees, multipolygons taken apart, and which are large enough to ask for chips."""

    polygons: NDArray[np.object_]
    large: NDArray[np.bool_]

    @cached_property
    def zones(self) -> dict[int, Labels]:
        """What lies in and around every zone that a large polygon meets."""
        bounds = shapely.bounds(self.polygons)
        found = {}
        for epsg in sorted({g.epsg for b in bounds[self.large] for g in grids(tuple(b))}):
            west = (epsg % 100) * 6 - 186
            sides = [(bounds[:, 0] + dx < west + 7) & (bounds[:, 2] + dx > west - 1) for dx in (-360, 0, 360)]
            near = np.any(sides, axis=0)
            found[epsg] = Labels(self.polygons[near], self.large[near], epsg)
        return found


def read_ground(path: str | Path, layer: str | None, min_area: float) -> Ground:
    """The polygons of a vector file; those of a feature of at least `min_area` km² on the ellipsoid are large."""
    _one_layer(path, layer)
    features = read_polygons(path, "polygons", layer)
    if features.total_bounds[0] < -180 or features.total_bounds[2] > 180:
        raise InputError(f"polygons {path} go beyond ±180 degrees: cut them at the antimeridian")
    geod = Geod(ellps="WGS84")
    areas = [abs(geod.geometry_area_perimeter(g)[0]) / 1e6 for g in features]
    if max(areas) < min_area:
        raise InputError(
            f"polygons {path} hold none of {min_area:g} km² or more (the largest has {max(areas):.3g}): give a "
            "smaller --min-area, 0 for outlines that are drawn finely"
        )
    parts, large = [], []
    for feature, area in zip(features, areas, strict=True):
        for part in shapely.get_parts(feature):
            if part.geom_type == "Polygon":
                parts.append(part)
                large.append(area >= min_area)
    return Ground(np.array(parts, dtype=object), np.array(large))


def _one_layer(path: str | Path, layer: str | None) -> None:
    from pyogrio import list_layers
    from pyogrio.errors import DataSourceError

    try:
        names = [str(name) for name, _ in list_layers(path)]
    except (DataSourceError, OSError, ValueError):
        return  # read_polygons says it
    if layer is None and len(names) > 1:
        raise InputError(f"polygons {path} have {len(names)} layers: name one of {', '.join(names)} with --layer")
    if layer is not None and layer not in names:
        raise InputError(f"polygons {path} have no layer {layer!r}: choose one of {', '.join(names)}")


# --- where ------------------------------------------------------------------------------------------------------


def name_of(place: Grid) -> str:
    """A window's name: zone, column and row on the lattice of windows of its size."""
    side = place.width * place.resolution
    return f"{place.group}_{round(place.left / side)}_{round(place.top / side)}"


def mine_places(ground: Ground, size: int, resolution: float) -> list[Grid]:
    """The windows with the centre of a pixel in a large polygon, by zone, from north to south and west to east.

    A zone's windows hold the pixels that it owns; at the edge of two zones some ground is in a window of either.
    """
    found: set[Grid] = set()
    for epsg, labels in ground.zones.items():
        for part in labels.large:
            around = _windows(part.bounds, epsg, size, resolution) if not part.is_empty else ()
            found.update(w for w in around if w not in found and (inside(w, part) & w.owned()).any())
    return sorted(found, key=lambda w: (w.epsg, -w.top, w.left))


def _windows(bounds: tuple[float, ...], epsg: int, size: int, resolution: float) -> Iterator[Grid]:
    """The windows of the lattice that meet bounds in metres."""
    side = size * resolution
    left, bottom, right, top = (n / side for n in bounds)
    for row in range(math.ceil(top), math.floor(bottom), -1):
        for column in range(math.floor(left), math.ceil(right)):
            yield Grid(epsg, column * side, row * side, size, size, resolution)


def _owned(place: Grid) -> bool:
    return zone_epsg(*_centre(place)) == place.epsg


def _centre(place: Grid) -> tuple[float, float]:
    """Longitude (-180 to 180) and latitude."""
    left, bottom, right, top = place.bounds
    lon, lat = continuous_lonlat(place.epsg, np.array((left + right) / 2), np.array((bottom + top) / 2))
    return (float(lon) + 180) % 360 - 180, float(lat)


def empty_places(mines: list[Grid], ground: Ground, how: ChipRule) -> list[Grid]:
    """At most `negatives` windows without any polygon, drawn from those up to NEAR windows from one with a mine."""
    steps = range(-NEAR, NEAR + 1)
    around = {
        replace(m, left=m.left + c * m.width * m.resolution, top=m.top + r * m.height * m.resolution)
        for m in (mines if how.negatives else ())
        for r in steps
        for c in steps
    }
    found: list[Grid] = []
    for place in sorted(around, key=lambda w: _draw(how.seed, name_of(w))):
        if len(found) == how.negatives:
            break
        if _owned(place) and not len(ground.zones[place.epsg].within(place)):
            found.append(place)
    return found


def _draw(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


def blocks(places: list[Grid]) -> NDArray[np.str_]:
    """The block of each place (n,): its first place's name. Windows less than 5 km apart share one, chained."""
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    tree = cKDTree(earth_centred(*np.array([_centre(p) for p in places]).T))
    reach = APART + math.sqrt(2) * max(p.width * p.resolution for p in places)  # from centre to centre
    near = tree.sparse_distance_matrix(tree, reach)
    near.setdiag(1.0)  # a distance of 0 is no entry
    _, label = connected_components(near, directed=False)
    names = np.array([name_of(p) for p in places])
    first = {n: min(names[label == n]) for n in np.unique(label)}
    return np.array([first[n] for n in label])


def splits(block: NDArray[np.str_], val: float, seed: int) -> NDArray[np.str_]:
    """ "train" or "val" for each place (n,): whole blocks, drawn until they hold the share `val` of the places."""
    names, sizes = np.unique(block, return_counts=True)
    order = np.argsort([_draw(seed, name) for name in names])
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = names[order][before + sizes[order] / 2 <= val * len(block)][: len(names) - 1]  # one is learned from
    if val and not len(chosen) and len(names) > 1:
        chosen = names[[np.argmin(sizes)]]
    return np.where(np.isin(block, chosen), "val", "train")


# --- making -----------------------------------------------------------------------------------------------------


def make_chips(
    polygons: str | Path,
    date: str | Period,
    out: str | Path,
    *,
    layer: str | None = None,
    rule: ChipRule | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Chips of the mines in a polygon file, seen in one period, as `out` (.zarr or .npz); returns a summary.

    Arrays: image uint16 (sample, band, y, x), reflectance x 10,000, 0 = not observed; mask uint8 (sample, y, x), 1
    where a pixel's centre lies in a polygon, 0 elsewhere, 255 not observed; and for each sample its place, date,
    block, split, zone, left and top (metres), lon and lat (of the centre), items. `bands` names the bands. polygons:
    any vector file; layer: of one with several. options: those of a map that say which scenes and how they become an
    image (`planning.Options`). Raises subclasses of MinemapError; a call that was cut short goes on when repeated.
    """
    start, how, o = time.monotonic(), rule or ChipRule(), Options.named(options)
    if idle := [name for name in MAPS if getattr(o, name) != getattr(Options, name)]:
        raise InputError(f"option {idle[0]} is a map's: chips have no use for it")
    target = _target(out, overwrite=o.overwrite)
    when, where = parse_period(date), source(o.stac, o.collection)
    sensor = sensor_at(where)
    ground = read_ground(polygons, layer, how.min_area)
    mines = mine_places(ground, how.size, sensor.resolution)
    if not mines:
        raise InputError(f"polygons {polygons} hold no centre of a pixel of {sensor.resolution:g} m")
    places = mines + empty_places(mines, ground, how)
    target.path.parent.mkdir(parents=True, exist_ok=True)
    with target.locked():
        parameters = _parameters(polygons, layer, when, where, sensor, how, o)
        _begin(target, parameters, overwrite=o.overwrite)
        try:
            _freeze(target, places, where, when, o)
        except NoItemsError:
            if not target.exists() and not any(target.meta.glob("chips/*.npz")):
                remove(target.meta)
            raise
        reading = Reading(target, when, BANDS, o.rule, Access.of(where), o.reader)
        for done, place in enumerate(places):
            if progress:
                progress(done, len(places))
            _make(place, ground.zones[place.epsg], reading)
        if progress:
            progress(len(places), len(places))
        table, mask = _put_together(target, places, how, parameters)
        target.write_items([])
        _discard(target)
    return _summary(table, mask, len(places), target, time.monotonic() - start)


def _target(out: str | Path, *, overwrite: bool) -> Store:
    """A store of which the folder beside it serves: lock, frozen scenes, and the chips until they are together."""
    target = Store.at(out)
    path = local(target.path)
    if path.suffix not in (".zarr", ".npz"):
        raise InputError(f"output {path.name!r}: chips go to a name that ends in .zarr or .npz")
    check_outside(path)
    if target.exists() and not overwrite:
        raise StoreError(f"{path} exists: choose another output, or give --overwrite")
    if path.exists() and not is_chips(path):
        raise StoreError(f"{path} is not a set of chips: choose another output")
    return target


def _digest(path: Path) -> str:
    """SHA-256 of a file (a shapefile with its companions), or of all files of a folder (a geodatabase), in order."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if path.suffix.lower() == ".shp":
        files = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _parameters(
    polygons: str | Path, layer: str | None, when: Period, where: Source, sensor: Sensor, how: ChipRule, o: Options
) -> dict[str, Any]:
    """What identifies a set of chips."""
    return {
        "polygons": _digest(Path(polygons)),
        "layer": layer,
        "date": str(when),
        "source": where.url,
        "collection": where.collection,
        "max_cloud": o.max_cloud,
        "max_scenes": o.max_scenes,
        "exclude": sorted(o.exclude),
        "months": list(parse_months(o.months)),
        "composite": o.rule.as_dict(),
        "reader": o.reader,
        "sensor": sensor.name,
        "resolution": sensor.resolution,
        **asdict(how),
    }


def _begin(target: Store, parameters: dict[str, Any], *, overwrite: bool) -> None:
    """Raises StoreError when chips of an unfinished set lie here that was begun with other parameters."""
    path = target.meta / "parameters.json"
    begun = read_json(path) or {}
    changed = [name for name, value in parameters.items() if begun.get(name) != value]
    if begun and changed and not overwrite and any(target.meta.glob("chips/*.npz")):
        raise StoreError(
            f"{target.meta} holds an unfinished set that was begun with another {changed[0]}: use the same, choose "
            "another output, or give --overwrite"
        )
    if changed:
        _discard(target)
        write_atomically(path, json.dumps(parameters))


def _discard(target: Store) -> None:
    """Removes what only an unfinished set needs; parameters first, without which the rest counts for nothing."""
    (target.meta / "parameters.json").unlink(missing_ok=True)
    for name in ("chips", "cells", "items", "offsets"):
        remove(target.meta / name)


def _freeze(target: Store, places: list[Grid], where: Source, when: Period, o: Options) -> None:
    """Chooses the scenes of every cell, as a map would, unless an earlier run has."""
    resolution, cells = places[0].resolution, {(p.epsg, p.cell) for p in places}
    open_cells = sorted(c for c in cells if target.read_cell(f"utm{c[0]}", c[1], when) is None)
    known = _found((-180.0, -90.0, 180.0, 90.0), where, when, o) if where.is_file and open_cells else None
    blind, empty = set(), None
    for epsg, cell in open_cells:
        area = cell_grid(epsg, cell, resolution)
        try:
            scenes = known or _found(search_area(area), where, when, o)
        except NoItemsError as error:
            scenes, empty = Scenes([], o.max_scenes), error
        chosen = scenes.choose(epsg, cell, resolution)
        items = [item for acquisition in chosen for item in acquisition.items]
        blind |= {item["id"] for item in items if asset_key(item, SCL) is None}
        target.keep_items([with_decision(item) for item in items])
        target.write_cell(area.group, cell, when, [[i["id"] for i in a.items] for a in chosen])
    if empty is not None:
        warnings.warn(f"some chips stay unobserved: {empty}", stacklevel=2)
    if blind:
        warnings.warn(f"{len(blind)} items have no quality layer: their clouds are not masked", stacklevel=2)


def _found(bbox: BBox, where: Source, when: Period, o: Options) -> Scenes:
    months = parse_months(o.months)
    items = search(bbox, when, stac=where, max_cloud=o.max_cloud, months=months, exclude=o.exclude, versions=True)
    return Scenes(items, o.max_scenes)


def _chip_path(target: Store, place: Grid) -> Path:
    return local(target.meta) / "chips" / f"{name_of(place)}.npz"


def _make(place: Grid, labels: Labels, how: Reading) -> None:
    """One chip, unless it is there whole."""
    path = _chip_path(how.store, place)
    with suppress(OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile):
        if all(_layer(how.store, place, name).size for name in ("image", "mask", "items")):
            return
    image, _, used, _ = read_image(place, 0, how)
    seen = np.isfinite(image).any(axis=0)
    stored = np.nan_to_num(np.rint(image * np.float32(1e4))).astype(np.uint16)
    mask = np.where(seen, labels.mask(place), IGNORE).astype(np.uint8)
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        np.savez_compressed(file, image=stored, mask=mask, items=np.array(";".join(used)))
    draft.replace(path)


def _layer(target: Store, place: Grid, name: str) -> NDArray:
    with np.load(_chip_path(target, place), allow_pickle=False) as file:
        return file[name]


def _put_together(
    target: Store, places: list[Grid], how: ChipRule, parameters: dict[str, Any]
) -> tuple[dict[str, NDArray], NDArray[np.uint8]]:
    """Writes the observed chips as the target, whole or not at all; returns their columns and masks."""
    masks = np.stack([_layer(target, p, "mask") for p in places])
    seen = (masks != IGNORE).any(axis=(1, 2))
    if not seen.any():
        _discard(target)
        raise NoItemsError(
            f"none of {len(places)} chips was observed in {parameters['date']}: try a longer period, more cloud, or "
            f"a lower --min-clear (it is {parameters['composite']['min_clear']})"
        )
    kept = [place for place, yes in zip(places, seen, strict=True) if yes]
    table = _columns(kept, parameters["date"])
    table["block"] = blocks(places)[seen]
    table["split"] = splits(table["block"], how.val, how.seed)
    table["items"] = np.array([str(_layer(target, p, "items")) for p in kept])
    if how.val and "val" not in table["split"]:
        warnings.warn("all chips lie in one block: none is left to validate with", stacklevel=2)
    out = local(target.path)
    draft = out.with_name(f".{out.name}.draft")
    _remove(draft)
    write = _write_zarr if out.suffix == ".zarr" else _write_npz
    write(draft, (_layer(target, p, "image") for p in kept), masks[seen], table, parameters)
    _remove(out)
    draft.rename(out)
    return table, masks[seen]


def _columns(places: list[Grid], date: str) -> dict[str, NDArray]:
    lon, lat = np.array([_centre(p) for p in places]).T
    return {
        "place": np.array([name_of(p) for p in places]),
        "date": np.array([date] * len(places)),
        "zone": np.array([p.group for p in places]),
        "left": np.array([p.left for p in places]),
        "top": np.array([p.top for p in places]),
        "lon": lon,
        "lat": lat,
    }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _write_npz(
    path: Path, images: Iterator[NDArray], mask: NDArray, table: dict[str, NDArray], about: dict[str, Any]
) -> None:
    image = np.empty((len(mask), len(BANDS), *mask.shape[1:]), np.uint16)
    for row, one in enumerate(images):
        image[row] = one
    about_text = np.array(json.dumps(about))
    arrays: dict[str, Any] = {
        "image": image,
        "mask": mask,
        "bands": np.array(BANDS),
        "parameters": about_text,
        **table,
    }
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _write_zarr(
    path: Path, images: Iterator[NDArray], mask: NDArray, table: dict[str, NDArray], about: dict[str, Any]
) -> None:
    attributes = {CHIPS_MARK: 1, "minemap": __version__, "bands": list(BANDS), "parameters": about}
    group = zarr.create_group(path, zarr_format=3, attributes=attributes)
    _array(group, "mask", mask, ("sample", "y", "x"))
    for name, values in table.items():
        _array(group, name, values, ("sample",))
    shape = (len(mask), len(BANDS), *mask.shape[1:])
    image = _array(group, "image", np.broadcast_to(np.uint16(0), shape), ("sample", "band", "y", "x"))
    for start in range(0, len(mask), TOGETHER):
        block = np.stack(list(islice(images, TOGETHER)))
        image[start : start + len(block)] = block


def _array(group: zarr.Group, name: str, data: NDArray, dims: tuple[str, ...]) -> zarr.Array:
    """An array of the set, filled unless it is empty; text as Zarr's strings of any length."""
    text = data.dtype.kind == "U"
    array = group.create_array(
        name,
        shape=data.shape,
        chunks=data.shape if len(dims) == 1 else (min(TOGETHER, len(data)), *data.shape[1:]),
        dtype="str" if text else data.dtype,
        compressors=ZstdCodec(level=5, checksum=True),
        dimension_names=dims,
    )
    if text or data.any():
        array[...] = data.astype(np.dtypes.StringDType()) if text else data
    return array


def _summary(
    table: dict[str, NDArray], mask: NDArray[np.uint8], planned: int, target: Store, seconds: float
) -> dict[str, Any]:
    return {
        "out": str(target.path),
        "chips": len(mask),
        "with_mine": int((mask == 1).any(axis=(1, 2)).sum()),
        "unobserved": planned - len(mask),
        "blocks": len(np.unique(table["block"])),
        "train": int((table["split"] == "train").sum()),
        "val": int((table["split"] == "val").sum()),
        "mine_share": round(float((mask == 1).sum() / (mask != IGNORE).sum()), 4),
        "zones": sorted(set(table["zone"].tolist())),
        "items": len({i for row in table["items"] for i in row.split(";")}),
        "seconds": round(seconds, 2),
    }
