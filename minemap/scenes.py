"""Which scenes: a period, a search in a STAC source, the choice of acquisitions for each cell.

Items are plain STAC JSON (dicts) throughout: pystac rewrites `proj:epsg` on reading, which stackstac can't use.
"""

from __future__ import annotations

import calendar
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
import shapely
from shapely.geometry import box, shape

from .errors import CatalogueError, InputError, NoItemsError, first_line
from .grid import BBox, Grid, cell_grid, continuous_lonlat
from .sensors import Sensor, asset_key, one_sensor, scaling, sensor_named, sensor_of
from .sentinel2 import BANDS, RESOLUTION, SCL, Item, baseline

if TYPE_CHECKING:
    from pystac_client import ItemSearch
    from pystac_client.stac_api_io import StacApiIO

SOURCES = {
    "earth-search": "https://earth-search.aws.element84.com/v1",
    "planetary-computer": "https://planetarycomputer.microsoft.com/api/stac/v1",
}
PLANETARY_COMPUTER = "MINEMAP_PLANETARY_COMPUTER"  # variable: the STAC root of another instance of it
COLLECTION = "sentinel-2-l2a"
EMPTY_PAGES = 5  # in a row, after which nothing follows
PAGE = 100  # items a page; larger answers exceed what Earth Search sends
TIMEOUT = (5, 30)  # seconds to connect, to read
SAME_GROUND = 0.9  # share of an item's ground that a newer one shows, for it to be an older version of that
FIRST_YEAR, LAST_YEAR = 1900, 2261  # pandas counts nanoseconds from 1970, until 2262
MARGIN = 160  # pixels around a cell that its windows look at (tiles.Layout.margin): items that only meet them count


@dataclass(frozen=True)
class Period:
    """First and last day, both included."""

    start: date
    end: date

    def __str__(self) -> str:
        return f"{self.start}/{self.end}"

    @property
    def slug(self) -> str:
        return f"{self.start}_{self.end}"

    @property
    def interval(self) -> str:
        """As STAC's `datetime` wants it."""
        return f"{self.start}T00:00:00Z/{self.end}T23:59:59Z"

    def holds(self, moment: datetime) -> bool:
        return self.start <= moment.date() <= self.end


def parse_period(text: str | Period) -> Period:
    """A year, a month, a day, or start/end of these: 2023, 2023-06, 2023-06-15, 2022-11/2023-02."""
    if isinstance(text, Period):
        return text
    parts = str(text).strip().split("/")
    if len(parts) > 2:
        raise InputError(f"date {text!r} has more than one '/': give one date, or start/end")
    spans = [_span(part.strip(), text) for part in parts]
    period = Period(spans[0][0], spans[-1][1])
    if period.start > period.end:
        raise InputError(f"date {text!r} ends before it starts: the order is start/end")
    return period


def _span(part: str, whole: str) -> tuple[date, date]:
    found = re.fullmatch(r"(\d{4})(?:-(\d{2}))?(?:-(\d{2}))?", part)
    if not found:
        raise InputError(f"date {whole!r} is not a year, month or day (2023, 2023-06, 2023-06-15) or start/end")
    year, month, day = (int(g) if g else None for g in found.groups())
    try:
        first = date(year or 0, month or 1, day or 1)
    except ValueError as error:
        raise InputError(f"date {whole!r}: {error}") from None
    if not FIRST_YEAR <= first.year <= LAST_YEAR:
        raise InputError(f"date {whole!r}: years run from {FIRST_YEAR} to {LAST_YEAR}")
    last_month = month or 12
    return first, date(first.year, last_month, day or calendar.monthrange(first.year, last_month)[1])


def parse_months(given: str | int | Sequence[int] | None) -> tuple[int, ...]:
    """ "6-9", "11-2" (over the new year), "1,6,7", a number or numbers, as month numbers; () for all."""
    text = given if isinstance(given, str) or not isinstance(given, Iterable) else ",".join(map(str, given))
    if text in (None, ""):
        return ()
    months: list[int] = []
    for part in str(text).split(","):
        ends = re.fullmatch(r"\s*(\d{1,2})(?:-(\d{1,2}))?\s*", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, 0)
        if not (1 <= first <= 12 and 1 <= last <= 12):
            raise InputError(f"months {text!r}: give numbers from 1 to 12, as 6-9, 11-2 or 1,6,7")
        months += [(first + i - 1) % 12 + 1 for i in range((last - first) % 12 + 1)]
    return tuple(dict.fromkeys(months))


@dataclass(frozen=True)
class Source:
    """Where items come from. name: as the user gave it; url: of the API, or the item file's path."""

    name: str
    url: str
    collection: str
    is_file: bool = False

    @property
    def signed(self) -> bool:
        """Whether assets are opened with the Planetary Computer's tokens."""
        return self.name == "planetary-computer" or self.url.startswith(SOURCES["planetary-computer"])


def source(name: str | Path = "earth-search", collection: str | None = None) -> Source:
    """A known source's name, the URL of a STAC API, or the path of an item file."""
    if not isinstance(name, str | Path):
        raise InputError(f"stac is a {type(name).__name__}: give a source's name, an address, or an item file's path")
    name = str(name)
    if name in SOURCES:
        other = os.environ.get(PLANETARY_COMPUTER) if name == "planetary-computer" else None
        if other and not other.startswith(("http://", "https://")):
            raise InputError(f"{PLANETARY_COMPUTER} is {other!r}: give the URL of a STAC API, or unset it")
        return Source(name, other or SOURCES[name], collection or COLLECTION)
    if name.startswith(("http://", "https://")):
        try:
            urlsplit(name)
        except ValueError as error:
            raise InputError(f"STAC source {name!r} is no address: {error}") from error
        return Source(name, name, collection or COLLECTION)
    if Path(name).is_file():
        return Source(name, str(Path(name).resolve()), collection or "", is_file=True)
    known = ", ".join(SOURCES)
    raise InputError(f"unknown STAC source {name!r}: give one of {known}, the URL of an API, or an item file")


@dataclass
class Tally:
    """How many items a search found and how many each filter removed, for messages."""

    found: int = 0
    removed: dict[str, int] = field(default_factory=dict)

    def keep(self, items: list[Item], wanted: Iterable[bool], why: str) -> list[Item]:
        kept = [item for item, yes in zip(items, wanted, strict=True) if yes]
        if len(kept) < len(items):
            self.removed[why] = self.removed.get(why, 0) + len(items) - len(kept)
        return kept

    def __str__(self) -> str:
        removed = ", ".join(f"{n} by {why}" for why, n in self.removed.items())
        return f"{self.found} found" + (f", removed: {removed}" if removed else "")


def search(
    bbox: BBox,
    period: str | Period,
    *,
    stac: str | Source = "earth-search",
    collection: str | None = None,
    max_cloud: float = 60.0,
    months: str | int | Sequence[int] = (),
    exclude: tuple[str, ...] = (),
    versions: bool = False,
) -> list[Item]:
    """The items over `bbox` (degrees; west > east crosses the antimeridian) in a period, as plain STAC JSON.

    months: of the year, as "6-9" or numbers; none for all. exclude: ids. versions: keep older versions of a product
    beside its newest (highest processing baseline); `Scenes` chooses among them cell by cell. Sorted by id.
    Raises NoItemsError, which says what was asked and what each filter removed; CatalogueError when the source
    can't be read.
    """
    if isinstance(exclude, str):
        raise InputError(f"exclude is {exclude!r}: give a tuple of ids")
    numbers = bbox is not None and len(bbox) == 4 and all(isinstance(n, Real) and isfinite(n) for n in bbox)
    if not numbers or bbox[1] > bbox[3]:
        raise InputError(f"bbox {bbox} is not four degrees: west south east north")
    if not isinstance(max_cloud, Real):
        raise InputError(f"max_cloud is {max_cloud!r}: it is a percentage, 0 to 100")
    where = stac if isinstance(stac, Source) else source(stac, collection)
    when, of_year = parse_period(period), parse_months(months)
    tally = Tally()
    items = list({item["id"]: item for item in _fetch(where, bbox, when)}.values())
    tally.found = len(items)
    items = tally.keep(items, (item["id"] not in exclude for item in items), "--exclude")
    items = _filter(items, tally, when=when, max_cloud=max_cloud, months=of_year, versions=versions)
    if not items:
        box_text = " ".join(f"{n:g}" for n in bbox)
        what = f"collection {where.collection} " if where.collection else ""
        raise NoItemsError(
            f"no items in {where.name} {what}for bbox {box_text}, {when}, cloud up to {max_cloud:g} %: {tally}; "
            "try a longer period, more cloud or other months"
        )
    return sorted(items, key=lambda item: item["id"])


def _filter(
    items: list[Item], tally: Tally, *, when: Period, max_cloud: float, months: tuple[int, ...], versions: bool
) -> list[Item]:
    items = tally.keep(items, (when.holds(moment(i)) for i in items), "the period")
    items = tally.keep(items, (not months or moment(i).month in months for i in items), "--months")
    items = tally.keep(items, (sensor_of(i).uses(i) for i in items), "their platform")
    has_bands = (any(asset_key(i, band) for band in BANDS) for i in items)
    items = tally.keep(items, has_bands, "having none of the bands")
    best = {item["id"] for item in (items if versions else newest(items))}
    items = tally.keep(items, (i["id"] in best for i in items), "being an older version of another")
    return tally.keep(items, (cloud(i) <= max_cloud for i in items), f"--max-cloud {max_cloud:g}")


def _fetch(where: Source, bbox: BBox, period: Period) -> Iterator[Item]:
    if where.is_file:
        yield from _from_file(where, bbox)
        return
    for part in _halves(bbox):
        yield from _from_api(where, part, period)


def _halves(bbox: BBox) -> list[BBox]:
    west, south, east, north = bbox
    if west <= east:
        return [bbox]
    return [(west, south, 180.0, north), (-180.0, south, east, north)]


def around(bbox: BBox) -> shapely.Geometry:
    """A box W S E N as polygons in degrees, two where it crosses the antimeridian."""
    return shapely.union_all([box(*part) for part in _halves(bbox)])


def _from_api(where: Source, bbox: BBox, period: Period) -> Iterator[Item]:
    from pystac.errors import STACTypeError
    from pystac_client import Client
    from pystac_client.errors import ClientTypeError
    from pystac_client.exceptions import APIError
    from pystac_client.stac_api_io import StacApiIO
    from requests.exceptions import RequestException
    from urllib3 import Retry

    statuses = [408, 429, 500, 502, 503, 504]
    retry = Retry(6, connect=2, backoff_factor=0.3, status_forcelist=statuses, allowed_methods=None)
    try:
        io = StacApiIO(timeout=TIMEOUT, max_retries=retry)
        client = Client.open(where.url, stac_io=io)
        found = client.search(collections=[where.collection], bbox=bbox, datetime=period.interval, limit=PAGE)
        for item in _without_end(_pages(found, io), where.url):
            yield _clean(item, base=_self_link(item))
    except (APIError, RequestException, OSError) as error:
        raise CatalogueError(
            f"STAC source {where.url}: {first_line(error)}; check the address, or try later"
        ) from error
    except (
        KeyError, TypeError, ValueError, NotImplementedError, AttributeError, STACTypeError, ClientTypeError
    ) as error:  # fmt: skip
        raise CatalogueError(f"{where.url} does not answer as a STAC API: {first_line(error)}") from error


def _pages(found: ItemSearch, io: StacApiIO) -> Iterator[list[Item]]:
    """The items of each page, up to the last link. pystac-client takes a page without items for the end: an empty one
    that others follow, and an error that was sent as a page (a KeyError here). Some servers link from their last page
    to empty ones for ever: after EMPTY_PAGES of these it is the end."""
    from pystac import Link

    parameters = found.get_parameters()
    page = io.read_json(found.url, method=found.method, parameters=parameters)
    empty = 0
    while True:
        yield page["features"]
        empty = 0 if page["features"] else empty + 1
        following = [link for link in page.get("links") or [] if link["rel"] == "next"]
        if not following or empty == EMPTY_PAGES:
            return
        page = io.read_json(Link.from_dict(following[0]), parameters=parameters)


def _without_end(pages: Iterable[list[Item]], url: str) -> Iterator[Item]:
    """The items; CatalogueError where a catalogue's pages lead to each other for ever."""
    seen: set[str] = set()
    read = 0
    for page in pages:
        seen.update(item["id"] for item in page)
        read += len(page)
        if read > 2 * (len(seen) + PAGE):
            raise CatalogueError(f"STAC source {url}: its pages repeat themselves without an end")
        yield from page


def sensor_at(where: Source) -> Sensor:
    """The one sensor of a source: of its collection, or of an item file's items. Raises InputError for several."""
    if not where.is_file:
        return sensor_named(where.collection)
    return one_sensor((item for item, _ in _read_file(where)), f"the items of {where.name}")


def _from_file(where: Source, bbox: BBox) -> Iterator[Item]:
    wanted = around(bbox)
    yield from (item for item, area in _read_file(where) if area.intersects(wanted))


def _read_file(where: Source) -> list[tuple[Item, shapely.Geometry]]:
    """The items of a file that are of its collection, where one is named, and their areas."""
    try:
        content = json.loads(Path(where.url).read_text(encoding="utf-8-sig"))  # with or without a mark of the order
        raw = content if isinstance(content, list) else content.get("features", [content])
        items = [_named(i, base=Path(where.url)) for i in raw]
        wanted = [i for i in items if not where.collection or i.get("collection") == where.collection]
        return [(item, area_of(item)) for item in wanted]
    except (ValueError, KeyError, TypeError, AttributeError, shapely.errors.ShapelyError) as error:
        raise CatalogueError(f"item file {where.name} is not a STAC ItemCollection: {first_line(error)}") from error
    except OSError as error:
        raise CatalogueError(f"item file {where.name} can't be read: {error.strerror}") from error


def _named(item: Item, *, base: Path) -> Item:
    """The item cleaned; what is wrong with it is told with its id, or as "item ?" where it has none."""
    try:
        return _clean(item, base=base)
    except KeyError as error:
        raise ValueError(f"item {item.get('id', '?')} has no {first_line(error)}") from error
    except (TypeError, AttributeError) as error:
        name = item.get("id", "?") if isinstance(item, dict) else "?"
        raise ValueError(f"item {name}: {first_line(error)}") from error


def _self_link(item: Item) -> str:
    return next((link["href"] for link in item.get("links") or () if link.get("rel") == "self"), "")


def _clean(item: Item, *, base: str | Path) -> Item:
    """A copy with what we read and nothing else: our assets, absolute hrefs, `proj:epsg` beside `proj:code`."""
    keys = filter(None, (asset_key(item, band) for band in (*BANDS, SCL)))
    assets = {key: _clean_asset(item["assets"][key], base) for key in keys}
    properties = _with_epsg(item["properties"])
    properties["datetime"] = moment({"properties": properties, "id": item["id"]}).isoformat()
    names = ("type", "stac_version", "collection", "bbox", "geometry")
    kept: Item = {name: item[name] for name in names if name in item}
    if len(kept.get("bbox") or ()) == 6:  # with heights
        kept["bbox"] = [kept["bbox"][n] for n in (0, 1, 3, 4)]
    if not kept.get("bbox"):
        kept["bbox"] = list(shape(item["geometry"]).bounds)
    own = _self_link(item)
    links = [{"rel": "self", "href": _absolute(own, base)}] if own else []
    cleaned = {**kept, "id": str(item["id"]), "properties": properties, "assets": assets, "links": links}
    try:  # what is asked of an item later on
        cloud(cleaned), scaling(cleaned), [urlsplit(asset["href"]) for asset in assets.values()]
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"item {item['id']}: {first_line(error)}") from error
    return cleaned


def _clean_asset(asset: dict[str, Any], base: str | Path) -> dict[str, Any]:
    return {**_with_epsg(asset), "href": _absolute(asset["href"], base)}


def _absolute(href: str, base: str | Path) -> str:
    """An href as an address or a plain path. base: the item's own address, or the item file's path."""
    if isinstance(base, str):
        return urljoin(base, href)
    if href.startswith("file://"):
        return unquote(href.removeprefix("file://"))
    return href if "://" in href or href.startswith("/vsi") else str((base.parent / href).resolve())


def _with_epsg(fields: dict[str, Any]) -> dict[str, Any]:
    """HACK for gjoseph92/stackstac#262: it knows `proj:epsg` only, newer catalogues have `proj:code` only."""
    code = str(fields.get("proj:code") or "")
    if code.startswith("EPSG:") and "proj:epsg" not in fields:
        return {**fields, "proj:epsg": int(code[5:])}
    return dict(fields)


def moment(item: Item) -> datetime:
    """When the item was sensed, UTC."""
    properties = item["properties"]
    text = properties.get("datetime") or properties.get("start_datetime")
    if not text:
        raise ValueError(f"item {item['id']} has no datetime")
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def cloud(item: Item) -> float:
    """Cloud cover in per cent; 0 when the item does not say."""
    return float(item["properties"].get("eo:cloud_cover") or 0.0)


def acquisition_id(item: Item) -> str:
    """The same for all items that one satellite sensed in one pass, whatever the tile or the baseline."""
    properties = item["properties"]
    take = properties.get("s2:datatake_id") or properties.get("eopf:datatake_id")
    if take:
        return re.sub(r"_N\d{2}\.\d{2}$", "", take)
    start = re.search(r"MSIL2A_(\d{8}T\d{6})", f"{properties.get('s2:product_uri', '')} {item['id']}")
    platform = properties.get("platform") or properties.get("constellation") or "any"
    path = properties.get("landsat:wrs_path")
    return f"{platform}_{start[1] if start else _solar_day(item)}" + (f"_{path}" if path else "")


def _solar_day(item: Item) -> date:
    """The day at the item's own longitude: a pass over eastern Australia goes on over midnight UTC."""
    lon = shapely.get_coordinates(area_of(item))[:, 0]
    if np.ptp(lon) > 180:  # cut at the antimeridian
        lon = np.where(lon < 0, lon + 360, lon)
    middle = (lon.min() + lon.max()) / 2
    return (moment(item) + timedelta(hours=((middle + 180) % 360 - 180) / 15)).date()


def area_of(item: Item) -> shapely.Geometry:
    """What an item says that it shows, in degrees."""
    if item.get("geometry"):
        return shapely.make_valid(shape(item["geometry"]))
    return around(tuple(item["bbox"]))


def newest(items: list[Item], shown: Callable[[Item], shapely.Geometry] = area_of) -> list[Item]:
    """Without older versions: of items of one acquisition and tile, those whose ground a newer one shows too go.

    Newest: highest baseline, then highest sequence number, then latest made, then id. Two datastrips of one
    tile (their footprints hardly overlap) are no versions of each other. shown: what of an item counts (all of it).
    """
    kept: dict[tuple[str, str], list[Item]] = {}
    for item in sorted(items, key=_version, reverse=True):
        newer = kept.setdefault(_tile_key(item), [])
        own, *others = map(shown, (item, *newer))
        if all(own.intersection(other).area <= SAME_GROUND * own.area for other in others):
            newer.append(item)
    return [item for newer in kept.values() for item in newer]


def _version(item: Item) -> tuple[float, int, str, str]:
    properties = item["properties"]
    made = properties.get("s2:generation_time") or properties.get("created") or ""
    sequence = properties.get("s2:sequence") or "0"
    return baseline(item) or 0.0, int(sequence) if str(sequence).isdigit() else 0, made, item["id"]


def _tile_key(item: Item) -> tuple[str, str]:
    properties = item["properties"]
    code = properties.get("grid:code") or properties.get("s2:mgrs_tile") or ""
    found = re.search(r"\d{1,2}[A-Z]{3}", f"{code} {item['id']}")
    return acquisition_id(item), found[0] if found else str(properties.get("landsat:wrs_row", ""))


@dataclass(frozen=True)
class Acquisition:
    """One pass of one satellite over a cell: its items by id, which are merged into one look."""

    id: str
    items: tuple[Item, ...]


class Scenes:
    """The items of a search, indexed by place, and the choice among them."""

    def __init__(self, items: list[Item], max_scenes: int) -> None:
        self.items = items
        self.max_scenes = max_scenes
        areas = [area_of(item) for item in items]
        near = [i for i, a in enumerate(areas) if a.bounds[0] < -170 or a.bounds[2] > 170]
        # Twice around the antimeridian, so that a cell that crosses it finds both sides
        shifted = [(i, shapely.affinity.translate(areas[i], dx)) for i in near for dx in (-360, 360)]
        self._owner = [*range(len(items)), *(i for i, _ in shifted)]
        self._shapes = np.array([*areas, *(a for _, a in shifted)], dtype=object)
        self._tree = shapely.STRtree(self._shapes)
        self._acquisitions = [acquisition_id(item) for item in items]
        self._moments = [moment(item) for item in items]

    def choose(self, epsg: int, cell: tuple[int, int], resolution: float = RESOLUTION) -> list[Acquisition]:
        """At most `max_scenes` acquisitions for a cell, in order of time.

        Each month's clearest first, then each month's second, and so on, so that they spread over the period;
        ties by id. How clear: the share of the cell that the acquisition covers and its clouds leave free. Of several
        versions of what a product shows of the cell the newest. Depends on the items and the cell alone.
        """
        place = _cell_polygon(cell_grid(epsg, cell, resolution))
        shown: dict[int, shapely.Geometry] = {}
        near = self._tree.query(place, predicate="intersects")
        for index, part in zip(near, shapely.intersection(self._shapes[near], place), strict=True):
            item = self._owner[index]  # in two parts, if cut at the antimeridian
            shown[item] = shapely.union(shown[item], part) if item in shown else part
        of_id = {self.items[i]["id"]: part for i, part in shown.items()}
        kept = {item["id"] for item in newest([self.items[i] for i in shown], lambda item: of_id[item["id"]])}
        groups: dict[str, dict[int, float]] = {}
        for item, part in shown.items():
            if self.items[item]["id"] in kept:
                groups.setdefault(self._acquisitions[item], {})[item] = part.area / place.area
        chosen = _spread([self._candidate(name, group) for name, group in groups.items()])
        return [
            Acquisition(c.id, tuple(sorted((self.items[i] for i in c.members), key=lambda item: item["id"])))
            for c in sorted(chosen[: self.max_scenes], key=lambda c: (c.when, c.id))
        ]

    def _candidate(self, name: str, group: dict[int, float]) -> _Candidate:
        """group: item -> the share of the cell that it covers."""
        clear = sum(share * (1 - cloud(self.items[i]) / 100) for i, share in group.items())
        return _Candidate(name, min(self._moments[i] for i in group), min(clear, 1.0), tuple(group))


@dataclass(frozen=True)
class _Candidate:
    id: str
    when: datetime
    clear: float
    members: tuple[int, ...]


def _spread(candidates: list[_Candidate]) -> list[_Candidate]:
    by_month: dict[tuple[int, int], list[_Candidate]] = {}
    for candidate in candidates:
        by_month.setdefault((candidate.when.year, candidate.when.month), []).append(candidate)
    ranked = []
    for month in by_month.values():
        month.sort(key=lambda c: (-round(c.clear, 6), c.id))
        ranked += [(rank, -round(c.clear, 6), c.id, c) for rank, c in enumerate(month)]
    return [c for *_, c in sorted(ranked, key=lambda r: r[:3])]


def _cell_polygon(cell: Grid) -> shapely.Polygon:
    """The cell with its margin in degrees, continuous across the antimeridian."""
    left, bottom, right, top = cell.bounds
    margin = MARGIN * cell.resolution
    around = box(left - margin, bottom - margin, right + margin, top + margin)
    x, y = shapely.get_coordinates(shapely.segmentize(around, (right - left) / 8)).T
    return shapely.polygons(np.stack(continuous_lonlat(cell.epsg, x, y), axis=1))


def search_area(grid: Grid) -> BBox:
    """What to ask a catalogue for so that every cell of `grid` finds its items: bounds with the margin, degrees."""
    return grid.buffered(MARGIN).lonlat_bounds
