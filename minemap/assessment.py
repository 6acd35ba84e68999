"""How good a map is, from points labelled by eye: a stratified random sample, and design-based estimates from it.

After Olofsson et al. 2014 (Remote Sensing of Environment 148:42-57), with the ratio estimators of Stehman 2014
(International Journal of Remote Sensing 35:4923-4939) because the strata are finer than the map's classes. Where
strata and classes are the same, both give the same numbers.

Strata: mine; near, what is not mine within NEAR metres of mine, where omissions are likely; far, the rest. The
sample gives mine 30 %, near 20 % and far 50 % of the points: mine is rare, so that points spread evenly would hardly
meet it, and what is missed far from any mine weighs most in an area. Within a stratum every m² is as likely to be
drawn. A stratum gives at least two points, or all it has.

The file of points keeps the km² of the strata: a map that has grown since has pixels that could not be drawn.
"""

from __future__ import annotations

import csv
import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from .contents import choose_period, computed_tiles, read_periods
from .errors import InputError
from .files import check_file, write_atomically
from .grid import Grid, continuous_lonlat, pixel_area_km2
from .inference import NOT_OBSERVED, check_threshold, mine_from
from .scenes import Period, parse_period
from .store import Store

STRATA = ("mine", "near", "far")
SHARES = (0.3, 0.2, 0.5)  # of the points
NEAR = 100.0  # metres
FEWEST = 2  # points in a stratum of more pixels, without which there is no variance
Z95 = 1.959964
LABELS = {"mine": 1, "1": 1, "1.0": 1, "yes": 1, "true": 1, "not mine": 0, "0": 0, "0.0": 0, "no": 0, "false": 0}
KM2 = ("mine_km2", "near_km2", "far_km2")  # of the strata, the same for all points: they do not tell a point's own
FIELDS = ("id", "lon", "lat", "date", "stratum", "label", "zone", "row", "column", "seed", "threshold", *KM2)
WHOLE = ("stratum", "row", "column", "seed")  # fields that are whole numbers
ROUND = 6  # digits of km² in a file: a square metre


@dataclass(frozen=True)
class Design:
    """What fixes the strata of a map: which period, threshold (0-1) and seed of the draw."""

    period: Period
    threshold: float
    seed: int

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}: give 0 or more")

    def codes(self) -> list[int]:
        """The numbers 1 to 3 that stand for STRATA in a file of points: shuffled, so that they do not tell."""
        return [int(n) + 1 for n in np.random.default_rng((self.seed, 3)).permutation(len(STRATA))]


def sample(
    path: str | Path,
    out: str | Path,
    *,
    n: int = 500,
    date: str | None = None,
    threshold: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Draws `n` pixels of a map to be labelled by eye, as GeoJSON points `out` and a table (.csv) beside it.

    date: one of the map's periods, the last one when None. threshold: 0-1, the model's own when None. Every point has
    an empty `label`, to be filled with "mine" or "not mine" (left empty where imagery does not tell), and a `stratum`
    whose number does not say what the map holds. The same seed draws the same points. Returns what was drawn.
    Raises InputError, StoreError.
    """
    out = Path(out)
    if out.suffix.lower() not in (".geojson", ".json"):
        raise InputError(f"points {out.name!r} can't be written: the ending is .geojson")
    check_file(out, "points")
    if n < FEWEST * len(STRATA):
        raise InputError(f"n is {n}: at least {FEWEST * len(STRATA)} points are needed, some hundreds are useful")
    for file in (out, out.with_suffix(".csv")):
        if file.exists() and any(_word(row) for row in _own_points(file)):
            raise InputError(f"{file} holds labels: choose another name for the points, or move it away")
    store = Store.at(path)
    design = _design(store, date, threshold, seed)
    areas, points = _drawn(store, design, n)
    if not points:
        raise InputError(f"{store.path} has nothing observed in {design.period}: choose another date, or map more")
    _write_points(points, out)
    counts = {name: sum(p["stratum"] == code for p in points) for name, code in _coded(design)}
    return {"points": str(out), "table": str(out.with_suffix(".csv")), "n": len(points), "seed": seed,
            "date": str(design.period), "threshold": design.threshold, "strata": counts,
            "strata_km2": dict(zip(STRATA, areas.round(ROUND).tolist(), strict=True))}  # fmt: skip


def _own_points(path: Path) -> list[dict[str, Any]]:
    """The points of a file that new ones would take the place of."""
    try:
        return _read_points(path)
    except InputError as error:
        raise InputError(f"{path} exists and holds no points of minemap sample: choose another name") from error


def _design(store: Store, date: str | None, threshold: float | None, seed: int) -> Design:
    period = choose_period(store, date)
    return Design(period, store.attributes()["recipe"]["threshold"] if threshold is None else threshold, seed)


def _coded(design: Design) -> Iterator[tuple[str, int]]:
    yield from zip(STRATA, design.codes(), strict=True)


# --- strata of a map --------------------------------------------------------------------------------------------


def _strata(store: Store, tile: Grid, design: Design) -> np.ndarray:
    """Index into STRATA of every pixel of a super-tile, uint8 (y, x); len(STRATA) = not observed or not owned.

    What lies around the super-tile in the same zone is looked at for `near`; across a zone's border it is not.
    """
    reach = round(NEAR / tile.resolution)
    values = read_periods(store, tile, [design.period])[0]
    around = _around(store, tile, reach, design)
    mine = (around >= mine_from(design.threshold)) & (around != NOT_OBSERVED)
    near = _within(mine, reach)[reach:-reach, reach:-reach]
    out = np.where(mine[reach:-reach, reach:-reach], 0, np.where(near, 1, 2)).astype(np.uint8)
    return np.where((values == NOT_OBSERVED) | ~tile.owned(), np.uint8(len(STRATA)), out)


def _within(mine: np.ndarray, reach: int) -> np.ndarray:
    return ndimage.distance_transform_edt(~mine) <= reach if mine.any() else np.zeros(mine.shape, bool)


def _around(store: Store, tile: Grid, reach: int, design: Design) -> np.ndarray:
    """What is stored in and `reach` pixels around a super-tile, uint8 (y, x), 255 beyond the map."""
    wide, whole = tile.buffered(reach), store.grid(tile.group)
    row, column = wide.offset_in(whole)
    top, left = max(row, 0), max(column, 0)
    bottom, right = min(row + wide.height, whole.height), min(column + wide.width, whole.width)
    inner = whole.window(top, left, bottom - top, right - left)
    out = np.full(wide.shape, NOT_OBSERVED, np.uint8)
    index = store.periods(tile.group).index(design.period) if design.period in store.periods(tile.group) else None
    if index is not None:
        out[top - row : bottom - row, left - column : right - column] = store.read_tile(inner, index, "probability")
    return out


def _by_tile(store: Store, design: Design) -> Iterator[tuple[Grid, np.ndarray, np.ndarray]]:
    """Super-tile by super-tile: its Grid, strata uint8 (y, x), and km² float64 (y, x)."""
    for tile in computed_tiles(store):
        yield tile, _strata(store, tile, design), pixel_area_km2(tile)


def _sums(strata: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Pixels (or points) of each stratum, or their km², (3,)."""
    weights = None if weights is None else weights.ravel()
    return np.bincount(strata.ravel(), weights=weights, minlength=len(STRATA) + 1)[: len(STRATA)]


# --- drawing ----------------------------------------------------------------------------------------------------


def _drawn(store: Store, design: Design, n: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """km² of the strata, and the points, in one pass that holds one super-tile.

    Each pixel gets a random key u^(1/km²); those with the largest keys of a stratum are a sample without replacement
    whose chances go with the area (Efraimidis and Spirakis 2006, Information Processing Letters 97:181-185).
    """
    areas, best = np.zeros(len(STRATA)), [[] for _ in STRATA]  # type: tuple[np.ndarray, list[list[tuple]]]
    for tile, strata, area in _by_tile(store, design):
        areas += _sums(strata, area)
        place = (design.seed, tile.epsg, round(tile.left), round(tile.top + 1e8))  # not the order of the tiles
        keys = np.log(np.random.default_rng(place).random(strata.shape)) / area
        for k in range(len(STRATA)):
            best[k] = heapq.nlargest(n, [*best[k], *_top(keys, strata == k, n, tile)])
    wanted = _allocation(n, [len(found) for found in best])
    chosen = [(k, *key[1:]) for k in range(len(STRATA)) for key in best[k][: wanted[k]]]
    order = np.random.default_rng((design.seed, 1)).permutation(len(chosen))
    return areas, [_point(i + 1, chosen[j], design, areas) for i, j in enumerate(order)]


def _top(keys: np.ndarray, which: np.ndarray, n: int, tile: Grid) -> list[tuple[Any, ...]]:
    """(key, EPSG, row and column of the zone's lattice) of the `n` largest keys."""
    rows, columns = np.nonzero(which)
    found = keys[rows, columns]
    top = np.argsort(found)[-n:] if len(found) <= n else np.argpartition(found, -n)[-n:]
    row, column = round(-tile.top / tile.resolution), round(tile.left / tile.resolution)
    return [(found[i], tile.epsg, row + int(rows[i]), column + int(columns[i]), tile.resolution) for i in top]


def _allocation(n: int, present: list[int]) -> list[int]:
    """Points of each stratum, `n` in all where there are as many: FEWEST, then one by one to whichever stratum that
    has more is the furthest below its share (Sainte-Laguë's method)."""
    wanted = [min(FEWEST, have) for have in present]
    for _ in range(min(n, sum(present)) - sum(wanted)):
        open_ = [k for k, have in enumerate(present) if wanted[k] < have]
        wanted[min(open_, key=lambda k: (wanted[k] + 0.5) / SHARES[k])] += 1
    return wanted


def _point(number: int, chosen: tuple[Any, ...], design: Design, areas: np.ndarray) -> dict[str, Any]:
    stratum, epsg, row, column, resolution = chosen
    lon, lat = continuous_lonlat(epsg, (column + 0.5) * resolution, -(row + 0.5) * resolution)
    values = (number, round(float((lon + 180) % 360 - 180), 7), round(float(lat), 7), str(design.period),
              design.codes()[stratum], "", f"utm{epsg}", row, column, design.seed, design.threshold,
              *areas.round(ROUND).tolist())  # fmt: skip
    return dict(zip(FIELDS, values, strict=True))


def _write_points(points: list[dict[str, Any]], out: Path) -> None:
    features = [
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [p["lon"], p["lat"]]}, "properties": p}
        for p in points
    ]
    write_atomically(out, json.dumps({"type": "FeatureCollection", "features": features}, indent=1))
    lines = [",".join(FIELDS), *(",".join(str(p[name]) for name in FIELDS) for p in points)]
    write_atomically(out.with_suffix(".csv"), "\n".join(lines) + "\n")


# --- assessing --------------------------------------------------------------------------------------------------


def assess(path: str | Path, points: str | Path) -> dict[str, Any]:
    """Accuracies and areas of a map with 95 % intervals, from points of `sample` that have been labelled.

    points: the GeoJSON or the table, its `label` filled; points without a label are left out. A table may come back
    from a spreadsheet, with semicolons and decimal commas. Returns `accuracy`'s result with the numbers of points.
    Raises InputError, StoreError.
    """
    store, rows = Store.at(path), _read_points(Path(points))
    labelled = [row for row in rows if _word(row)]
    design, drawn_from = _one_draw(rows, Path(points))
    code = {number: k for k, (_, number) in enumerate(_coded(design))}
    strata = np.array([code.get(row["stratum"], len(STRATA)) for row in labelled], int)
    areas, pixels = _check(store, design, drawn_from, labelled, strata)
    truth, mapped = np.array([_label(row) for row in labelled], int), (strata == 0).astype(int)
    found = accuracy(areas, strata, mapped, truth, classes=("not mine", "mine"), pixels=pixels)
    drawn = {
        "date": str(design.period),
        "threshold": design.threshold,
        "points": len(rows),
        "labelled": len(labelled),
    }
    return {**drawn, **found}


def told(found: dict[str, Any]) -> str:
    """The result of `assess` as text."""
    lines = [
        f"{found['labelled']} of {found['points']} points labelled, {found['date']}, threshold {found['threshold']}"
    ]
    lines.append(f"{'overall accuracy':30} {_range(found['overall'])}")
    for name in ("mine", "not mine"):
        for key, words in (("users", "user's accuracy"), ("producers", "producer's accuracy"), ("area", "km²")):
            lines.append(f"{name + ', ' + words:30} {_range(found[name][key])}")
    return "\n".join(lines)


def _range(value: dict[str, Any] | None) -> str:
    if value is None:
        return "unknown: there are no such points"
    low, high = value["ci95"]
    return f"{value['estimate']:.4g}  (95 %: {low:.4g} to {high:.4g})"


def _read_points(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin with a byte order mark
        if path.suffix.lower() == ".csv":
            lines = text.splitlines() or [""]
            rows = list(csv.DictReader(lines, delimiter=";" if ";" in lines[0] else ","))
        else:
            rows = [feature["properties"] for feature in json.loads(text)["features"]]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"points {path} can't be read: give a file of minemap sample ({error})") from error
    missing = {name for row in rows or [{}] for name in set(FIELDS) - set(row or ())}
    if missing:
        raise InputError(f"points {path} have no {', '.join(sorted(missing))}: give a file of minemap sample")
    try:
        real = [{name: _number(row[name]) for name in ("threshold", *KM2)} for row in rows]
        whole = [{name: int(_number(row[name])) for name in WHOLE} for row in rows]
    except (OverflowError, ValueError) as error:
        raise InputError(f"points {path}: only labels may be changed ({error})") from error
    return [row | some | others for row, some, others in zip(rows, real, whole, strict=True)]


def _number(value: Any) -> float:
    """Of a file; spreadsheets may write a decimal comma."""
    return float(str(value).replace(",", "."))


def _one_draw(rows: list[dict[str, Any]], path: Path) -> tuple[Design, np.ndarray]:
    """The design that all points come from, and the km² that the strata had."""
    found = {(str(row["date"]), row["threshold"], row["seed"], *(row[name] for name in KM2)) for row in rows}
    if len(found) != 1:
        raise InputError(f"points {path} come from {len(found)} draws: assess each file on its own")
    date, threshold, seed, *areas = found.pop()
    try:
        return Design(parse_period(date), threshold, seed), np.array(areas)
    except InputError as error:
        raise InputError(f"points {path}: only labels may be changed ({error})") from error


def _word(row: dict[str, Any]) -> str:
    """A point's label as a word, "" where it has none; a number or a truth value is one."""
    return "" if row["label"] is None else str(row["label"]).strip().lower()


def _label(row: dict[str, Any]) -> int:
    word = _word(row)
    if word not in LABELS:
        raise InputError(f"point {row['id']} has the label {row['label']!r}: use mine, not mine, or leave it empty")
    return LABELS[word]


def _check(
    store: Store, design: Design, drawn_from: np.ndarray, rows: list[dict[str, Any]], strata: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """km² and pixels of the strata; InputError where the map is not as it was at the draw, or too few are labelled.

    drawn_from: km² of the strata at the draw.
    """
    _design(store, str(design.period), design.threshold, design.seed)
    wanted = {(r["zone"], r["row"], r["column"]): k for r, k in zip(rows, strata.tolist(), strict=True)}
    areas, pixels, agree = np.zeros(len(STRATA)), np.zeros(len(STRATA), int), 0
    for tile, found, area in _by_tile(store, design):
        areas += _sums(found, area)
        pixels += _sums(found)
        top, left = round(-tile.top / tile.resolution), round(tile.left / tile.resolution)
        for (zone, row, column), k in wanted.items():
            if zone == tile.group and 0 <= row - top < tile.height and 0 <= column - left < tile.width:
                agree += found[row - top, column - left] == k
    for name, km2, before in zip(STRATA, areas, drawn_from, strict=True):
        if not np.isclose(km2, before, rtol=1e-9, atol=10.0**-ROUND):
            told = f"{store.path} has {km2:.6g} km² in stratum {name}, {before:.6g} when the points were drawn"
            raise InputError(f"{told}: draw a new sample")
    if agree != len(wanted):
        told = f"{store.path} differs from what {len(wanted) - agree} points were drawn from"
        raise InputError(f"{told}: draw a new sample")
    for name, have, count in zip(STRATA, pixels, _sums(strata), strict=True):
        if count < min(FEWEST, have):
            raise InputError(f"stratum {name} has {count} labelled points: label at least {min(FEWEST, have)}")
    return areas, pixels


def accuracy(
    areas: np.ndarray,
    strata: np.ndarray,
    mapped: np.ndarray,
    truth: np.ndarray,
    *,
    classes: tuple[str, ...],
    pixels: np.ndarray,
) -> dict[str, Any]:
    """Design-based estimates from a stratified random sample.

    areas: of each stratum, any unit, float64 (stratum,). strata, mapped, truth: int (point,), each point's stratum,
    and its class on the map and in truth as an index into `classes`. pixels: of each stratum, (stratum,); one that is
    sampled whole has no variance (the correction for a finite population). Returns `overall` accuracy and, by class,
    `users`, `producers` and `area`, each with `estimate`, `se` and `ci95` (lower, upper; areas in the unit of
    `areas`); None where a class has no points. Intervals are 1.96 standard errors, cut at 0, and at 1 for accuracies.
    """
    used = [(km2, strata == k, have) for k, (km2, have) in enumerate(zip(areas, pixels, strict=True)) if km2 > 0]
    every = np.ones(len(strata))
    right = (mapped == truth).astype(float)
    found: dict[str, Any] = {"overall": _ratio(used, right, every)}
    for i, name in enumerate(classes):
        on_map, in_truth = (mapped == i).astype(float), (truth == i).astype(float)
        share = _ratio(used, in_truth, every)
        found[name] = {
            "users": _ratio(used, on_map * in_truth, on_map),
            "producers": _ratio(used, on_map * in_truth, in_truth),
            "area": share and _scaled(share, float(areas.sum())),
        }
    return found


def _ratio(strata: list[tuple[float, np.ndarray, float]], y: np.ndarray, x: np.ndarray) -> dict[str, Any] | None:
    """Σ y / Σ x over the whole map with its standard error, the variance by linearisation (Stehman 2014).

    strata: the area of each, which points lie in it, bool (point,), and its pixels.
    """
    total = sum(km2 * x[which].mean() for km2, which, _ in strata)
    if not total:
        return None
    estimate = sum(km2 * y[which].mean() for km2, which, _ in strata) / total
    away = y - estimate * x
    se = np.sqrt(sum(km2**2 * _variance(away[which], pixels) for km2, which, pixels in strata)) / total
    return _interval(float(estimate), float(se), 1.0)


def _variance(drawn: np.ndarray, pixels: float) -> float:
    """Of the mean of points drawn from so many pixels; 0 where all are drawn, be it one."""
    return drawn.var(ddof=1) / len(drawn) * (1 - len(drawn) / pixels) if len(drawn) < pixels else 0.0


def _scaled(share: dict[str, Any], total: float) -> dict[str, Any]:
    return _interval(share["estimate"] * total, share["se"] * total, total)


def _interval(estimate: float, se: float, most: float) -> dict[str, Any]:
    return {"estimate": estimate, "se": se, "ci95": (max(0.0, estimate - Z95 * se), min(most, estimate + Z95 * se))}
