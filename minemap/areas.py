"""Areas of a map by site and period: what was mapped, what it may really be, what was gained and lost.

A site is tallied super-tile by super-tile: km² on the ellipsoid by whole per cent of probability (and of not
observed), so that any threshold and any model of errors needs nothing else. Each pixel is counted in the zone that
owns it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .contents import computed_tiles, ledger_digest, read_periods, sorted_periods
from .errors import InputError, StoreError
from .grid import WINDOW, BBox, Grid, check_bbox, pixel_area_km2
from .inference import NOT_OBSERVED, check_threshold, mine_from
from .scenes import Period, parse_period
from .sensors import asset_key
from .sites import Site, read_sites
from .store import Store
from .uncertainty import NOWHERE, AreaModel
from .vectors import AOI, inside_aoi
from .zones import CONSISTENT

if TYPE_CHECKING:
    import geopandas
    import pandas as pd

POOR = 0.8  # share of a site observed, below which a period is flagged: its areas are those of the part that was seen
LEVELS = 256  # values of a stored pixel


def area_table(
    path: str | Path,
    *,
    sites: str | Path | geopandas.GeoDataFrame | Sequence[Site] | None = None,
    bbox: BBox | None = None,
    buffer: float | None = None,
    threshold: float | None = None,
    years: Sequence[int] | None = None,
    layer: str = "probability",
) -> pd.DataFrame:
    """A row for each site and period of a map, sorted by site (in the file's order) and time.

    sites: a vector file, a GeoDataFrame or a list; bbox: one site, "bbox"; neither: one site, "map", all that was
    ever computed. buffer: metres around the file's features, needed for points. threshold: 0-1, the model's own when
    None. years: whole calendar years (one that was never mapped is not observed), all periods when None. layer:
    "probability" or "probability_consistent".

    Columns: site; year, of the period's first day; mapped_area_km2, pixels from the threshold on; area_km2,
    area_km2_lower, area_km2_upper, the estimate and its 90 % bounds (NaN where the model knows no errors);
    observed_fraction of the site; gain_km2 and loss_km2 against the row before, on the pixels observed in both, which
    are common_observed_fraction of the site (NaN in a site's first row); poorly_observed, a flag: observed_fraction
    below POOR; extrapolated, a flag: the model's errors were not measured under such conditions (region, resolution,
    bands, share of mine), nor ever for "probability_consistent", so that the bounds are not to be trusted; period,
    first and last day; site_area_km2, seen or not. All other areas are of observed pixels: what was not seen is in
    none of them, and where nothing was seen they are NaN, as for a site outside the map. All are on the ellipsoid.
    Raises InputError, StoreError.
    """
    store = Store.at(path)
    chosen = _sites(sites, bbox, buffer)
    periods = _periods(store, years, layer)
    about = store.attributes()
    limit = about["recipe"]["threshold"] if threshold is None else check_threshold(threshold)
    tallies = _tally(store, chosen, periods, mine_from(limit), layer)
    model = AreaModel.of(about["recipe"], about["parameters"]["resolution"])
    if model is not None and (layer == CONSISTENT or _lacks_a_band(store, about["recipe"]["bands"])):
        model = replace(model, region=NOWHERE)  # as if measured nowhere
    return _table(tallies, periods, mine_from(limit), model)


def _sites(
    sites: str | Path | geopandas.GeoDataFrame | Sequence[Site] | None, bbox: BBox | None, buffer: float | None
) -> list[Site]:
    if sites is not None and bbox is not None:
        raise InputError("give sites or a bbox to tabulate, not both")
    if sites is None:
        return [Site("bbox", bbox=check_bbox(bbox)) if bbox is not None else Site("map")]
    if not isinstance(sites, list | tuple):
        return read_sites(sites, buffer=buffer)
    names = [site.name for site in sites]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two sites are named {twice[0]}: unite them, or give one another name")
    return list(sites)


def _periods(store: Store, years: Sequence[int] | None, layer: str) -> list[Period]:
    """The periods of a map, or the asked years."""
    found = sorted_periods(store)
    if layer == CONSISTENT and not all(_is_consistent(store, group) for group in store.groups()):
        raise StoreError(
            f"{store.path} has no {layer} of all that is mapped now: minemap series --consistency hmm makes it anew"
        )
    if years is None:
        return found
    wanted = [parse_period(str(year)) for year in sorted(set(years))]
    if not set(wanted) & set(found):
        names = ", ".join(map(str, found))
        raise InputError(f"{store.path} has no map of {', '.join(str(p.start.year) for p in wanted)}: it has {names}")
    return wanted


def _lacks_a_band(store: Store, bands: Sequence[str]) -> bool:
    """Whether none of a map's scenes has some band that its model learned from. Without a list of scenes: no."""
    left = set(bands)
    for item in store.items():
        left -= {band for band in left if asset_key(item, band)}
        if not left:
            return False
    return left != set(bands)


def _is_consistent(store: Store, group: str) -> bool:
    """Whether a zone's consistent probability is whole and made from what is mapped now.

    A copy without a ledger can't be mapped again, so there it is.
    """
    source = store.consistent_source(group)
    return source is not None and (not store.meta.is_dir() or source == ledger_digest(store, group))


# --- tallying ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """km² of a site: in all; float64 (period, LEVELS) by stored value; and (period, 3), against the period before:
    observed in both, gained, lost."""

    total: np.ndarray  # float64 (1,)
    levels: np.ndarray
    change: np.ndarray
    boxes: list[BBox]  # W S E N, degrees, of the site's pixels in each super-tile

    @staticmethod
    def empty(periods: int) -> Tally:
        return Tally(np.zeros(1), np.zeros((periods, LEVELS)), np.zeros((periods, 3)), [])

    @property
    def observed(self) -> np.ndarray:
        """km² observed in each period."""
        return self.levels[:, :NOT_OBSERVED].sum(axis=1)

    def add(self, values: np.ndarray, area: np.ndarray, limit: int) -> None:
        """Counts pixels of the site: stored values uint8 (period, pixel), km² float64 (pixel,)."""
        self.total[0] += area.sum()
        for n, level in enumerate(values):
            self.levels[n] += np.bincount(level, weights=area, minlength=LEVELS)
        for n, (before, after) in enumerate(pairwise(values), start=1):
            both = (before != NOT_OBSERVED) & (after != NOT_OBSERVED)
            was, now = before >= limit, after >= limit
            self.change[n] += [area[which].sum() for which in (both, both & now & ~was, both & was & ~now)]


def _tally(store: Store, sites: list[Site], periods: list[Period], limit: int, layer: str) -> dict[str, Tally]:
    """Reads each super-tile once, whatever the number of sites in it; holds one super-tile and one mask at a time."""
    about = store.attributes()["parameters"]
    tallies = {site.name: Tally.empty(len(periods)) for site in sites}
    tiles = _by_tile(store, sites, about["chunk"], about["resolution"])
    if not tiles.keys() & set(computed_tiles(store)):
        raise InputError(f"{store.path} holds nothing of the asked places: map them first")
    for tile, present in tiles.items():
        read: tuple[np.ndarray, np.ndarray] | None = None
        for site in present:
            mask = _mask(store, site, tile, periods)
            if not mask.any():
                continue
            values, area = read = read or (read_periods(store, tile, periods, layer), pixel_area_km2(tile))
            tallies[site.name].add(values[:, mask], area[mask], limit)
            tallies[site.name].boxes.append(_around(mask, tile))
    return tallies


def _by_tile(store: Store, sites: list[Site], chunk: int, resolution: float) -> dict[Grid, list[Site]]:
    """The super-tiles that sites may meet, from the north-west, each with those sites."""
    found: dict[Grid, list[Site]] = {}
    for site in sites:
        everything = site.area is None and site.bbox is None
        for tile in computed_tiles(store) if everything else site.tiles(chunk, resolution):
            found.setdefault(tile, []).append(site)
    return dict(sorted(found.items(), key=lambda pair: (pair[0].epsg, -pair[0].top, pair[0].left)))


def _around(mask: np.ndarray, tile: Grid) -> BBox:
    """The box in degrees around the pixels of a mask."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    return tile.window(int(rows[0]), int(columns[0]), height, width).lonlat_bounds


def _mask(store: Store, site: Site, tile: Grid, periods: list[Period]) -> np.ndarray:
    """Which pixels of a super-tile are the site's, bool (y, x); boxes and whole maps end at the map's own aoi."""
    if site.area is not None:
        return site.mask(tile)
    mask = site.mask(tile) if site.bbox is not None else tile.owned() & _computed(store, tile, periods)
    return mask & inside_aoi(tile, store.meta / AOI) if (store.meta / AOI).exists() else mask


def _computed(store: Store, tile: Grid, periods: list[Period]) -> np.ndarray:
    """Which pixels of a super-tile lie in windows that were computed in any of the periods, bool (y, x)."""
    if not store.meta.is_dir():
        return np.ones(tile.shape, bool)
    mask = np.zeros(tile.shape, bool)
    for period in periods:
        if record := store.record(tile, period):
            top, bottom, left, right = (n * WINDOW for n in record["windows"])
            mask[top:bottom, left:right] = True
    return mask


# --- the table --------------------------------------------------------------------------------------------------


def _table(tallies: dict[str, Tally], periods: list[Period], limit: int, model: AreaModel | None) -> pd.DataFrame:
    import pandas as pd

    for name, tally in tallies.items():
        if not tally.total[0]:
            warnings.warn(f"site {name} holds no pixel: give a larger area, or a buffer", stacklevel=3)
    rows = [row for name, tally in tallies.items() for row in _rows(name, tally, periods, limit, model)]
    return pd.DataFrame(rows)


def _rows(
    name: str, tally: Tally, periods: list[Period], limit: int, model: AreaModel | None
) -> Iterable[dict[str, object]]:
    total = tally.total[0] or np.nan
    estimate, outside = _estimated(tally, model)
    for n, (period, levels) in enumerate(zip(periods, tally.levels, strict=True)):
        observed = tally.observed[n]
        common, gain, loss = tally.change[n] if n else (np.nan,) * 3
        yield {
            "site": name,
            "year": period.start.year,
            "mapped_area_km2": levels[limit:NOT_OBSERVED].sum() if observed else np.nan,
            "area_km2": estimate[0, n],
            "area_km2_lower": estimate[1, n],
            "area_km2_upper": estimate[2, n],
            "observed_fraction": min(observed / total, 1.0) if observed else 0.0,  # sums differ in the last digit
            "gain_km2": gain if common else np.nan,
            "loss_km2": loss if common else np.nan,
            "common_observed_fraction": min(common / total, 1.0) if n else np.nan,
            "poorly_observed": not observed / total >= POOR,
            "extrapolated": bool(outside[n]),
            "period": str(period),
            "site_area_km2": float(tally.total[0]),
        }


def _estimated(tally: Tally, model: AreaModel | None) -> tuple[np.ndarray, np.ndarray]:
    """Estimate, lower and upper bound in km² (3, period), NaN where not known, and whether they are extrapolated."""
    if model is None:
        return np.full((3, len(tally.levels)), np.nan), np.ones(len(tally.levels), bool)
    outside = model.extrapolates(tally.levels, tally.boxes)
    return np.where(tally.observed > 0, model.interval(tally.levels), np.nan), outside
