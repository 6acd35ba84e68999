"""Periods, filters, duplicates and the choice of acquisitions."""

from __future__ import annotations

import itertools
import json
from datetime import date

import pytest
from conftest import item, item_file

from minemap.errors import CatalogueError, InputError, NoItemsError
from minemap.grid import cell_grid, grids
from minemap.scenes import Period, Scenes, _without_end, acquisition_id, newest, parse_months, parse_period, search
from minemap.sentinel2 import OFFSET, asset_key, baseline, contradicts, scaling

BOX = (-63.5, 6.0, -63.0, 6.5)
HREFS = {"blue": "/nowhere.tif"}


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("2023", date(2023, 1, 1), date(2023, 12, 31)),
        ("2024-02", date(2024, 2, 1), date(2024, 2, 29)),
        ("2023-06-15", date(2023, 6, 15), date(2023, 6, 15)),
        ("2022-11/2023-02", date(2022, 11, 1), date(2023, 2, 28)),
        ("2023-01-05/2023-01-09", date(2023, 1, 5), date(2023, 1, 9)),
    ],
)
def test_periods(text, start, end):
    assert parse_period(text) == Period(start, end)


@pytest.mark.parametrize(
    "text", ["", "23", "2023-6", "2023-02-30", "2023/2022", "a/b", "2023/2024/2025", "2020/9999", "1677"]
)
def test_bad_periods(text):
    with pytest.raises(InputError, match="date"):
        parse_period(text)


def test_months():
    assert parse_months("6-9") == (6, 7, 8, 9)
    assert parse_months("11-2") == (11, 12, 1, 2)
    assert parse_months("1,6-7") == (1, 6, 7)
    assert parse_months(None) == () == parse_months([])
    assert parse_months(5) == (5,) and parse_months((11, 1)) == (11, 1)
    for text in ("0", "13", "a", "3-", "1,,2", (13,), 0):
        with pytest.raises(InputError, match="months"):
            parse_months(text)


def test_search_says_what_each_filter_removed(tmp_path):
    path = item_file(
        tmp_path / "items.json",
        [
            item("a", "2023-01-10", BOX, HREFS, **{"eo:cloud_cover": 90}),
            item("b", "2023-03-10", BOX, HREFS, **{"eo:cloud_cover": 10}),
            item("c", "2021-03-10", BOX, HREFS),
            item("d", "2023-01-10", (10, 10, 11, 11), HREFS),
        ],
    )
    assert [i["id"] for i in search(BOX, "2023", stac=path)] == ["b"]
    message = "3 found, removed: 1 by the period, 1 by --months, 1 by --max-cloud 60"
    with pytest.raises(NoItemsError, match=message):
        search(BOX, "2023", stac=path, months=(1, 2))


def test_item_files_come_in_several_shapes(tmp_path):
    one = item("a", "2023-01-10", BOX, {"blue": "scenes/blue.tif"})
    path = tmp_path / "items.json"
    for content in (one, [one], {"type": "FeatureCollection", "features": [one]}):
        path.write_text(json.dumps(content))
        found = search(BOX, "2023", stac=path)
        assert found[0]["assets"]["blue"]["href"] == str(tmp_path / "scenes" / "blue.tif")
    path.write_text(json.dumps(one), encoding="utf-8-sig")  # as Windows writes it
    assert len(search(BOX, "2023", stac=path)) == 1
    path.write_text(json.dumps({"features": [{"id": "x"}]}))
    with pytest.raises(CatalogueError, match="is not a STAC ItemCollection"):
        search(BOX, "2023", stac=path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"properties": {"eo:cloud_cover": "n/a"}}, "item x: could not convert string to float"),
        ({"properties": {"datetime": None}}, "item x has no datetime"),
        ({"assets": {"blue": {}}}, "item x has no 'href'"),
        ({"assets": None}, "item x: "),
        ({"assets": {"blue": {"href": "http://[bad"}}}, "item x: Invalid IPv6 URL"),
        ({"assets": {"blue": {"href": "/b.tif", "raster:bands": [{"scale": 0, "offset": 1}]}}}, "item x: .*by zero"),
    ],
)
def test_a_malformed_item_is_named(tmp_path, changes, told):
    made = item("x", "2023-05-01", (-63.4, 6.2, -63.3, 6.3), {"blue": "/b.tif"})
    made = {**made, **changes, "properties": {**made["properties"], **changes.get("properties", {})}}
    with pytest.raises(CatalogueError, match=told):
        search((-63.4, 6.2, -63.3, 6.3), "2023", stac=item_file(tmp_path / "items.json", [made]))


def test_bad_searches(tmp_path):
    path = item_file(tmp_path / "items.json", [item("x", "2023-05-01", (-63.4, 6.2, -63.3, 6.3), {"blue": "/b.tif"})])
    for box in ((1, 2, 3), (-63.4, 6.3, -63.3, 6.2), ("a", 1, 2, 3)):
        with pytest.raises(InputError, match=r"bbox .* is not four degrees"):
            search(box, "2023", stac=path)
    for changes, told in (({"max_cloud": None}, "max_cloud is None"), ({"stac": []}, "stac is a list")):
        with pytest.raises(InputError, match=told):
            search((-63.4, 6.2, -63.3, 6.3), "2023", **{"stac": path, **changes})


def test_pages_that_lead_to_each_other_end():
    with pytest.raises(CatalogueError, match="its pages repeat themselves without an end"):
        list(_without_end(([{"id": str(n % 150)}] for n in itertools.count()), "http://catalogue"))
    assert len(list(_without_end(([{"id": str(n)}] for n in range(1000)), "http://catalogue"))) == 1000


def test_heights_and_missing_links_are_no_matter(tmp_path):
    made = item("x", "2023-05-01", (-63.4, 6.2, -63.3, 6.3), {"blue": "/b.tif"})
    made |= {"bbox": [-63.4, 6.2, 0, -63.3, 6.3, 900], "geometry": None, "links": None}
    (found,) = search((-63.35, 6.25, -63.3, 6.3), "2023", stac=item_file(tmp_path / "items.json", [made]))
    assert found["bbox"] == [-63.4, 6.2, -63.3, 6.3]


def test_the_start_stands_for_a_moment_that_is_not_told(tmp_path):
    made = item("x", "2023-05-01", (-63.4, 6.2, -63.3, 6.3), {"blue": "/b.tif"})
    made["properties"] |= {"start_datetime": made["properties"].pop("datetime")}
    (found,) = search((-63.4, 6.2, -63.3, 6.3), "2023", stac=item_file(tmp_path / "items.json", [{**made, "id": 7}]))
    assert found["properties"]["datetime"].startswith("2023-05-01") and found["id"] == "7"


def test_newest_baseline_wins_and_datastrips_stay():
    code = {"s2:datatake_id": "GS2A_20230101T100031_042590_N02.14", "grid:code": "MGRS-20NMM"}
    old = item("S2A_20NMM_20230101_0_L2A", "2023-01-01", BOX, HREFS, **code, **{"s2:processing_baseline": "02.14"})
    late = {"s2:datatake_id": "GS2A_20230101T100031_042590_N05.10", "grid:code": "MGRS-20NMM"}
    new = item("S2A_20NMM_20230101_1_L2A", "2023-01-01", BOX, HREFS, **late, **{"s2:processing_baseline": "05.10"})
    strip = item("S2A_20NMM_20230101_2_L2A", "2023-01-01", (-63.05, 6.0, -62.9, 6.5), HREFS, **late)
    other = item("S2A_20NNM_20230101_0_L2A", "2023-01-01", BOX, HREFS, **{**late, "grid:code": "MGRS-20NNM"})
    assert acquisition_id(old) == acquisition_id(new)
    for order in ([old, new, strip, other], [other, strip, new, old]):
        assert {i["id"] for i in newest(order)} == {new["id"], strip["id"], other["id"]}
    again = {**new, "id": "S2A_20NMM_20230101_0_L2A", "properties": {**new["properties"], "s2:sequence": "0"}}
    first = {**new, "properties": {**new["properties"], "s2:sequence": "1"}}
    assert [i["id"] for i in newest([again, first])] == [first["id"]]


def test_choice_is_bounded_spread_over_months_and_independent_of_order():
    items = [
        item(f"i{month:02}{day:02}", f"2023-{month:02}-{day:02}", BOX, HREFS, **{"eo:cloud_cover": day + month / 10})
        for month in range(1, 7)
        for day in (3, 13, 23)
    ]
    cell = (21, 33)
    chosen = Scenes(items, 6).choose(32620, cell)
    assert [a.items[0]["id"] for a in chosen] == [f"i{m:02}03" for m in range(1, 7)]
    again = Scenes(items[::-1], 6).choose(32620, cell)
    assert [a.id for a in again] == [a.id for a in chosen]
    assert len(Scenes(items, 8).choose(32620, cell)) == 8
    assert Scenes(items, 8).choose(32620, (40, 400)) == []


def test_real_items_at_the_antimeridian_are_found_from_both_sides(shared, tmp_path):
    items = [json.loads(p.read_text()) for p in (shared / "antimeridian_items").glob("*.json")]
    path = item_file(tmp_path / "items.json", items)
    found = search((179.0, 66.7, -177.0, 67.5), "2023-06", stac=path, max_cloud=100)
    assert len(found) >= 3
    scenes = Scenes(found, 24)
    from minemap.grid import grids

    seen = {}
    for grid in grids((179.0, 66.7, -177.0, 67.5)):
        seen[grid.epsg] = sum(bool(scenes.choose(grid.epsg, tile.cell)) for tile in grid.tiles(2048))
    assert set(seen) == {32660, 32601} and seen[32601] > 0


def test_offsets_are_decided_per_item():
    def decide(**properties):
        return scaling(item("x", "2023-01-01", BOX, HREFS, **properties))

    applied = decide(**{"earthsearch:boa_offset_applied": True, "s2:processing_baseline": "05.09"})
    assert applied.offset == 0 and "boa_offset_applied" in applied.reason
    not_applied = decide(**{"earthsearch:boa_offset_applied": False, "s2:processing_baseline": "05.09"})
    assert not_applied.offset == OFFSET
    assert decide(**{"s2:processing_baseline": "04.00"}).offset == OFFSET
    assert decide(**{"processing:version": "05.11"}).offset == OFFSET
    assert decide(**{"s2:processing_baseline": "02.14"}).offset == 0
    assert decide().offset == 0 and "nothing stated" in decide().reason
    named = item("S2A_MSIL2A_20230818T100031_N0509_R122_T33TWL_20230818T143300", "2023-08-18", BOX, HREFS)
    assert baseline(named) == 5.09


def test_pixels_can_contradict_the_offset():
    import numpy as np

    decided = scaling(item("x", "2023-01-01", BOX, HREFS, **{"s2:processing_baseline": "05.09"}))
    rng = np.random.default_rng(0)
    with_offset = rng.normal(1300, 60, 5000).astype(np.uint16)
    assert not contradicts(decided, with_offset)
    assert contradicts(decided, with_offset - np.uint16(1000))
    assert not contradicts(decided, np.zeros(10, np.uint16))


def test_bands_under_every_catalogue_name():
    for names in (("blue", "swir16"), ("B02", "B11"), ("B02_10m", "B11_20m")):
        found = item("x", "2023-01-01", BOX, dict.fromkeys(names, "/x.tif"))
        assert (asset_key(found, "blue"), asset_key(found, "swir16"), asset_key(found, "scl")) == (*names, None)
    odd = item("x", "2023-01-01", BOX, {"band2": "/x.tif", "all": "/y.tif"})
    odd["assets"]["band2"]["eo:bands"] = [{"common_name": "blue"}]
    odd["assets"]["all"]["eo:bands"] = [{"common_name": "blue"}, {"common_name": "red"}]
    assert asset_key(odd, "blue") == "band2" and asset_key(odd, "red") is None


def _shown(name, box, **properties):
    take = {"s2:datatake_id": "GS2A_20230601T143741_000001_N04.00", "grid:code": "MGRS-20NKP"}
    return item(name, "2023-06-01", box, HREFS, **take, **properties)


def test_a_version_that_shows_less_costs_no_ground():
    """The newer version shows the eastern cell only: the western one keeps the older, whichever was asked for."""
    west, east = cell_grid(32620, (24, 33)).lonlat_bounds, cell_grid(32620, (27, 33)).lonlat_bounds
    whole = (west[0] - 0.1, west[1] - 0.1, east[2] + 0.1, east[3] + 0.1)
    old = _shown("S2A_20NKP_20230601_0_L2A", whole, **{"s2:processing_baseline": "04.00"})
    new = _shown("S2A_20NKP_20230601_1_L2A", (west[2] + 0.05, *whole[1:]), **{"s2:processing_baseline": "05.00"})
    for items in ([old, new], [old]):
        (acquisition,) = Scenes(items, 9).choose(32620, (24, 33))
        assert [i["id"] for i in acquisition.items] == [old["id"]]
    (acquisition,) = Scenes([old, new], 9).choose(32620, (27, 33))
    assert [i["id"] for i in acquisition.items] == [new["id"]]


def test_scenes_across_the_antimeridian_cover_with_both_parts():
    """Cover cut at 180 degrees counts whole: a clouded scene of all of a cell is clearer than a clear one of half."""
    (grid,) = (g for g in grids((179.95, -17.0, -179.95, -16.9), 2048) if g.epsg == 32701)
    cell = next(grid.tiles(2048)).cell
    west, south, east, north = cell_grid(32701, cell).lonlat_bounds
    assert west > east
    all_of_it = item("z", "2023-06-01", (west - 0.2, south - 0.2, east + 0.2, north + 0.2), HREFS)
    parts = [(west - 0.2, 180.0), (-180.0, east + 0.2)]
    rings = [
        [[a, south - 0.2], [b, south - 0.2], [b, north + 0.2], [a, north + 0.2], [a, south - 0.2]] for a, b in parts
    ]
    all_of_it["geometry"] = {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}
    all_of_it["properties"]["eo:cloud_cover"] = 20
    larger = max(((west, 180.0), (-180.0, east)), key=lambda part: part[1] - part[0])
    half = item("a", "2023-06-02", (larger[0], south - 0.2, larger[1], north + 0.2), HREFS)
    (chosen,) = Scenes([half, all_of_it], 1).choose(32701, cell)
    assert chosen.items[0]["id"] == "z"


def test_a_pass_over_midnight_is_one_look():
    """Rows of one path over eastern Australia, on both sides of midnight UTC; both show ground of their own."""
    rows = []
    for row, time, south in (("077", "2023-06-01T23:59:50Z", -34.0), ("078", "2023-06-02T00:00:14Z", -35.4)):
        one = item(f"LC08_090{row}", time[:10], (149.0, south, 151.0, south + 1.6), {"blue": "/b.tif"})
        one["properties"] |= {
            "datetime": time,
            "platform": "landsat-8",
            "landsat:wrs_path": "090",
            "landsat:wrs_row": row,
        }
        rows.append(one)
    assert acquisition_id(rows[0]) == acquisition_id(rows[1])
    assert newest(rows) == rows or newest(rows) == rows[::-1]
    later = {**rows[1], "properties": {**rows[1]["properties"], "datetime": "2023-06-03T00:00:14Z"}}
    assert acquisition_id(later) != acquisition_id(rows[0])
