"""The footprint year by year: one store, a table of areas by site and year, and a chart of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, TypeVar

from .areas import area_table
from .cluster import connect
from .consistency import make_consistent
from .errors import InputError, NoItemsError, ReadError
from .files import TABLES, drafted, file_to_write, write_table
from .grid import BBox, check_bbox
from .inference import check_threshold
from .mapping import map_area
from .planning import Plan, plan
from .scenes import FIRST_YEAR, LAST_YEAR, around
from .sites import Site, bounds, read_sites
from .store import Store
from .uncertainty import AreaModel
from .vectors import called
from .zones import CONSISTENT

if TYPE_CHECKING:
    import geopandas
    import pandas as pd
    from distributed import Client
    from matplotlib.figure import Figure

CONSISTENCY = ("hmm",)
T = TypeVar("T")
PANELS = 12  # sites a chart shows, those with the most mine


def series(
    bbox: BBox | None,
    years: str | int | Sequence[int],
    out: str | Path,
    *,
    table: str | Path | None = None,
    chart: str | Path | None = None,
    sites: str | Path | geopandas.GeoDataFrame | None = None,
    buffer: float | None = None,
    threshold: float | None = None,
    consistency: str | None = None,
    cluster: str | None = None,
    workers: int | None = None,
    client: Client | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Maps each year into the store `out` and returns its areas, a row for each site and year (`area_table`).

    bbox: west south east north in degrees; None for the box around `sites`, of which then only the super-tiles that
    meet a site are mapped. years: "2018-2024", "2018,2020", 2019, or numbers. table: a .csv or .parquet file to
    write; chart: a .png (beside the table when None). sites: a vector file or a GeoDataFrame, a row each; None for
    the whole box. buffer: metres around sites. threshold: 0-1, from which a pixel counts as mine, the model's own
    when None. consistency: "hmm" for areas of `probability_consistent`, which it writes into the store. cluster,
    workers, client, progress and options (fields of `Options`) as of `map_area`; extent is "zone" unless given, so
    that years and places can be added: what is there is never written again. A year without any scenes is a row
    without observations. Raises subclasses of MinemapError.
    """
    files = {"table": table, "chart": chart, "sites": sites}
    job = _Job.of(bbox, years, **files, buffer=buffer, threshold=threshold, consistency=consistency)
    options = job.options(options)
    with connect(cluster, workers) if client is None else nullcontext(client) as connected:
        _map_years(job, out, options, cluster=cluster, workers=workers, client=connected, progress=progress)
    if consistency:
        make_consistent(out)
    layer = CONSISTENT if consistency else "probability"
    where: dict[str, Any] = {"bbox": job.bbox} if job.sites is None else {"sites": job.sites}
    frame = area_table(out, threshold=threshold, years=job.years, layer=layer, **where)
    about = Store.at(out).attributes()
    if AreaModel.of(about["recipe"], about["parameters"]["resolution"]) is None:
        warnings.warn(f"the errors of model {about['model']} were not measured: area_km2 is empty", stacklevel=2)
    if job.table:
        write_table(frame, job.table)
    if job.chart:
        draw_chart(frame, job.chart, Store.at(out))
    return frame


def plan_years(
    bbox: BBox | None,
    years: str | int | Sequence[int],
    out: str | Path,
    *,
    table: str | Path | None = None,
    chart: str | Path | None = None,
    sites: str | Path | geopandas.GeoDataFrame | None = None,
    buffer: float | None = None,
    threshold: float | None = None,
    consistency: str | None = None,
    **options: Any,
) -> dict[int, Plan]:
    """What `series`, told the same, would do in each year that has scenes. Searches the source; writes nothing."""
    files = {"table": table, "chart": chart, "sites": sites}
    job = _Job.of(bbox, years, **files, buffer=buffer, threshold=threshold, consistency=consistency)
    return _by_year(job, lambda year: plan(job.bbox, str(year), out, **job.options(options)))


@dataclass(frozen=True)
class _Job:
    """What was asked, checked before anything is mapped."""

    bbox: BBox
    years: list[int]
    sites: list[Site] | None
    near: Any  # polygons that super-tiles must meet, None for the whole box
    table: Path | None
    chart: Path | None

    @staticmethod
    def of(
        bbox: BBox | None,
        years: str | int | Sequence[int],
        *,
        table: str | Path | None = None,
        chart: str | Path | None = None,
        sites: str | Path | geopandas.GeoDataFrame | None = None,
        buffer: float | None = None,
        threshold: float | None = None,
        consistency: str | None = None,
    ) -> _Job:
        if bbox is None and sites is None:
            raise InputError("no place is given: give a bbox, or sites")
        if buffer is not None and sites is None:
            raise InputError(f"buffer is {buffer:g}, but no sites are given to put it around")
        if consistency not in (None, *CONSISTENCY):
            raise InputError(f"unknown consistency {consistency!r}: known is {', '.join(CONSISTENCY)}")
        if threshold is not None:
            check_threshold(threshold)
        places = read_sites(sites, buffer=buffer) if sites is not None else None
        near = _union(places) if bbox is None and places else None
        box = check_bbox(bbox) if bbox is not None else bounds(places or [])
        if bbox is not None and places and not _union(places).intersects(around(box)):
            asked = " ".join(f"{n:g}" for n in box)
            raise InputError(f"{called(sites, 'sites')} and bbox {asked} have no place in common")
        written = file_to_write(table, TABLES, "table") if table is not None else None
        picture = (
            file_to_write(chart, (".png",), "chart") if chart is not None else written and written.with_suffix(".png")
        )
        return _Job(box, parse_years(years), places, near, written, picture)

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Those of the map: into a store that can grow."""
        return {"extent": "zone", **given, "near": self.near}


def _union(sites: list[Site]) -> Any:
    import shapely

    return shapely.union_all([site.area for site in sites])


def parse_years(years: str | int | Sequence[int]) -> list[int]:
    """ "2018-2024", "2018,2020", "2019", a number or numbers as ascending years. Raises InputError."""
    parts: Iterable[object] = str(years).split(",") if isinstance(years, str | int | Integral) else years
    found: set[int] = set()
    for part in map(str, parts):
        ends = re.fullmatch(r"\s*(\d{4})(?:\s*-\s*(\d{4}))?\s*", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not FIRST_YEAR <= first <= last <= LAST_YEAR:
            raise InputError(f"years {years!r}: give a range 2018-2024, a list 2018,2020, or a year 2019")
        found |= set(range(first, last + 1))
    if not found:
        raise InputError("years is empty: give a range 2018-2024, a list 2018,2020, or a year 2019")
    return sorted(found)


def _map_years(job: _Job, out: str | Path, options: dict[str, Any], **how: Any) -> None:
    """Maps year after year."""
    own = dict(options)

    def one(year: int) -> None:
        try:
            map_area(job.bbox, str(year), out, **how, **own)
        except ReadError:  # all but what can't be read was made
            own["overwrite"] = False
            raise
        own["overwrite"] = False  # what this run has made stays

    _by_year(job, one)


def _by_year(job: _Job, make: Callable[[int], T]) -> dict[int, T]:
    """What is made of each year; one without any scenes stays unobserved, unless that is so for all.

    Years with files that can't be read don't keep the others from being made: the ReadError comes at the end.
    """
    made: dict[int, T] = {}
    untold: dict[int, NoItemsError] = {}
    broken: dict[int, ReadError] = {}
    for year in job.years:
        try:
            made[year] = make(year)
        except NoItemsError as error:
            untold[year] = error
        except ReadError as error:
            broken[year] = error
        if made or broken:  # were all without scenes, the error alone would say so
            for without, why in untold.items():
                warnings.warn(f"{without} stays unobserved: {why}", stacklevel=4)
            untold.clear()
    if broken:
        first = next(iter(broken))
        raise ReadError(f"{', '.join(map(str, broken))} not mapped whole: {broken[first]}") from broken[first]
    if not made:
        raise next(iter(untold.values()))
    return made


def draw_chart(frame: pd.DataFrame, path: Path, store: Store) -> None:
    """Mapped area by year, a panel a site, with the estimate's bounds; poorly observed years are hollow, unjoined and
    without bounds: what they show is no loss."""
    with drafted(path) as draft:
        make_chart(frame, store).savefig(draft, dpi=110)


def make_chart(frame: pd.DataFrame, store: Store) -> Figure:
    """The figure of `draw_chart`. Not of pyplot, whose backend is the user's."""
    from matplotlib.figure import Figure

    largest = frame.groupby("site", sort=False)["mapped_area_km2"].max().fillna(-1).nlargest(PANELS)
    names = [name for name in frame["site"].unique() if name in largest.index]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(5 * columns + 1, 3.2 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        _panel(axis, frame[frame["site"] == name], str(name))
        axis.set_xlim(frame["year"].min() - 0.5, frame["year"].max() + 0.5)  # of all sites, seen or not
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    shown: dict[str, Any] = {}
    for axis in axes.flat:
        shown |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=4, frameon=False)
    model, of = store.attributes()["model"], frame["site"].nunique()
    title = f"Mine area by year, model {model}" + (f" ({len(names)} of {of} sites)" if of > PANELS else "")
    figure.suptitle(fill(title, 45 * columns), parse_math=False)
    return figure


def _panel(axis: Any, rows: pd.DataFrame, name: str) -> None:
    year, mapped, poor = rows["year"], rows["mapped_area_km2"], rows["poorly_observed"]
    beyond = rows["extrapolated"]
    for kind, colour, word in ((~beyond, "tab:blue", ""), (beyond, "silver", ", extrapolated")):
        known = rows[kind & ~poor & rows["area_km2"].notna()]
        middle, low, high = (known[name] for name in ("area_km2", "area_km2_lower", "area_km2_upper"))
        if len(known):
            label = f"estimate, 90 %{word}"
            away = [(middle - low).clip(lower=0), (high - middle).clip(lower=0)]
            axis.errorbar(known["year"], middle, away, fmt="_", capsize=4, color=colour, label=label)
    axis.plot(year, mapped.where(~poor), "o-", color="tab:red", label="mapped")
    if poor.any():
        axis.plot(year[poor], mapped[poor], "o", mfc="white", color="tab:red", label="mapped, poorly observed")
    axis.set_title(fill(name, 45), parse_math=False)  # a "$" in a name is no formula
    axis.set_ylabel("km²")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
