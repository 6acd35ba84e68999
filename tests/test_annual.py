"""Years into one store, on the synthetic scene with its known truth."""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
from matplotlib import pyplot as plt
from shapely.geometry import Point, box

import minemap as package
from minemap import series
from minemap.annual import make_chart, parse_years, plan_years
from minemap.areas import area_table
from minemap.changes import first_year
from minemap.contents import computed_tiles, read_periods, sorted_periods
from minemap.demo import DemoConfig, make_demo
from minemap.errors import InputError, NoItemsError, ReadError, StoreError
from minemap.grid import pixel_area_km2
from minemap.store import Store, open_map

pytestmark = pytest.mark.filterwarnings("ignore:the errors of model:UserWarning")
YEARS = (2019, 2020, 2021, 2022, 2023)
CLOUDED = 2021
COLUMNS = ["site", "year", "mapped_area_km2", "area_km2", "area_km2_lower", "area_km2_upper", "observed_fraction"]


@pytest.fixture(scope="module")
def land(tmp_path_factory):
    """Five years of a scene in the middle of a super-tile of 512 px."""
    seen = {"years": YEARS, "scenes_per_year": 6, "cloud": 0.15, "hidden_years": {CLOUDED: 0.6}}
    config = DemoConfig(seed=7, size=448, lon=-63.00723, lat=6.27641, **seen)
    return make_demo(tmp_path_factory.mktemp("land"), config)


@pytest.fixture(scope="module")
def options(land):
    return {"stac": land.items, "model": "demo-2026", "chunk": 512, "max_cloud": 90.0}


@pytest.fixture(scope="module")
def mapped(land, options, tmp_path_factory):
    """Five years of the scene, mapped in two runs: the last year came later."""
    folder = tmp_path_factory.mktemp("series")
    frame = series(land.bbox, "2019-2022", folder / "map.zarr", table=folder / "first.csv", **options)
    before = shards(folder / "map.zarr")
    frame = series(land.bbox, "2019-2023", folder / "map.zarr", table=folder / "areas.csv", **options)
    return folder, frame, before


def shards(path):
    """Content and time of every shard of a store."""
    files = [p for p in path.glob("utm*/[poq]*/c/**/*") if p.is_file()]
    return {p.relative_to(path): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


def truth_of(land, year, grid):
    """The true footprint on a grid, 1 mine, 0 not, 255 outside the scene."""
    out = np.full(grid.shape, 255, np.uint8)
    with rasterio.open(land.truth[year]) as source:
        data, left, top = source.read(1), source.transform.c, source.transform.f
    row, column = round((grid.top - top) / 10), round((left - grid.left) / 10)
    out[row : row + data.shape[0], column : column + data.shape[1]] = data
    return out


@pytest.fixture(scope="module")
def stacks(land, mapped):
    """Map (0, 1, 255) and truth of all years, uint8 (year, y, x); km² of a pixel; which pixels were asked for."""
    store = Store(mapped[0] / "map.zarr")
    (tile,) = computed_tiles(store)
    values = read_periods(store, tile, sorted_periods(store))
    limit = round(store.attributes()["recipe"]["threshold"] * 100)
    mine = np.where(values == 255, 255, values >= limit).astype(np.uint8)
    truth = np.stack([truth_of(land, year, tile) for year in YEARS])
    return mine, truth, pixel_area_km2(tile), tile.inside(land.bbox)


def test_yearly_areas_are_those_of_the_truth(mapped, stacks):
    """Within 5 % of the truth where it was seen, in the clouded year as well."""
    _, frame, _ = mapped
    mine, truth, area, inside = stacks
    assert frame["year"].tolist() == list(YEARS)
    for n, row in enumerate(frame.itertuples()):
        seen = inside & (mine[n] != 255)
        true = area[seen & (truth[n] == 1)].sum()
        assert row.mapped_area_km2 == pytest.approx(area[seen & (mine[n] == 1)].sum(), abs=1e-6)
        assert abs(row.mapped_area_km2 - true) <= 0.05 * true, (row.year, row.mapped_area_km2, true)


def test_first_year_mined(stacks):
    """Right for 80 % of all mined pixels, those that clouds hid in the year they were mined among them."""
    mine, truth, _, inside = stacks
    true, found = first_year(truth, YEARS), first_year(mine, YEARS)
    mined = inside & (true > 0)
    assert mined.sum() > 10_000
    assert (true[mined] == found[mined]).mean() >= 0.8


def test_a_clouded_year_is_flagged_and_no_loss(mapped, stacks):
    _, frame, _ = mapped
    rows = frame.set_index("year")
    assert rows["poorly_observed"].to_dict() == {year: year == CLOUDED for year in YEARS}
    assert rows.loc[CLOUDED, "observed_fraction"] == pytest.approx(0.4, abs=0.08)
    dip = rows.loc[CLOUDED - 1, "mapped_area_km2"] - rows.loc[CLOUDED, "mapped_area_km2"]
    assert dip > 0.3 * rows.loc[CLOUDED - 1, "mapped_area_km2"]  # what reading clouds as loss would say
    assert rows.loc[CLOUDED, "loss_km2"] < 0.1 * dip
    assert rows.loc[CLOUDED, "common_observed_fraction"] < 0.45
    mine, truth, area, inside = stacks
    both = inside & (mine[3] != 255) & (mine[4] != 255)
    gained = both & (truth[4] == 1) & (truth[3] == 0)
    assert rows.loc[2023, "gain_km2"] == pytest.approx(area[gained].sum(), rel=0.35)


def test_adding_a_year_or_a_place_rewrites_nothing(mapped, land, options):
    folder, _, before = mapped
    after = shards(folder / "map.zarr")
    assert len(after) > len(before) > 0 and {name: after[name] for name in before} == before
    moved = tuple(np.array(land.bbox) + np.array([0.05, 0, 0.05, 0]))  # a neighbouring super-tile without scenes
    series(moved, [2023], folder / "map.zarr", **options)
    grown = shards(folder / "map.zarr")
    assert {name: grown[name] for name in after} == after


def test_table_and_chart(mapped):
    folder, frame, _ = mapped
    table = pd.read_csv(folder / "areas.csv")
    assert list(table.columns)[:7] == COLUMNS
    pd.testing.assert_frame_equal(table, frame, check_exact=False, atol=1e-6, rtol=0)
    assert plt.imread(folder / "areas.png").shape[2] == 4 and not list(folder.glob(".*draft*"))
    store = Store(folder / "map.zarr")
    (panel,) = make_chart(frame, store).axes
    sure, doubtful = panel.lines
    np.testing.assert_array_equal(sure.get_xdata(), YEARS)
    seen = frame["mapped_area_km2"].where(frame["year"] != CLOUDED)
    np.testing.assert_array_equal(sure.get_ydata(), seen)
    np.testing.assert_array_equal(doubtful.get_xydata(), frame.loc[seen.isna(), ["year", "mapped_area_km2"]])
    assert panel.get_xlim() == (YEARS[0] - 0.5, YEARS[-1] + 0.5)
    rich = frame.assign(area_km2=1.0, area_km2_lower=0.5, area_km2_upper=1.5, extrapolated=frame["year"] > 2020)
    (panel,) = make_chart(rich, store).axes
    spans = [line[0, 1] < line[1, 1] for bars in panel.collections for line in bars.get_segments()]
    assert len(spans) == len(YEARS) - 1 and all(spans)  # none of the clouded year


def test_charts_of_odd_tables(mapped):
    """A year alone, nothing seen at all, names that are long or look like formulas."""
    folder, frame, _ = mapped
    store = Store(folder / "map.zarr")
    unseen = frame.assign(mapped_area_km2=np.nan, poorly_observed=True)
    for some in (frame[:1], unseen, unseen[:1]):
        (panel,) = make_chart(some, store).axes
        assert panel.get_xlim() == (some["year"].min() - 0.5, some["year"].max() + 0.5)
    names = (r"cost $5 $\q$", "a long name " * 12, "x" * 200)
    figure = make_chart(pd.concat([frame.assign(site=name) for name in names]), store)
    figure.draw_without_rendering()
    ends = [(panel.title.get_window_extent().x0, panel.title.get_window_extent().x1) for panel in figure.axes]
    assert all(left >= 0 and right <= figure.bbox.width for left, right in ends)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))


def test_consistency_is_kept_beside(mapped, land, options):
    folder, frame, _ = mapped
    before = {name: value for name, value in shards(folder / "map.zarr").items() if "probability/" in str(name)}
    with pytest.raises(StoreError, match="no probability_consistent of all that is mapped now"):
        area_table(folder / "map.zarr", bbox=land.bbox, layer="probability_consistent")
    smooth = series(land.bbox, YEARS, folder / "map.zarr", consistency="hmm", **options)
    after = {name: value for name, value in shards(folder / "map.zarr").items() if "probability/" in str(name)}
    assert before == after
    np.testing.assert_allclose(smooth["observed_fraction"], frame["observed_fraction"])
    assert smooth["loss_km2"].sum() <= frame["loss_km2"].sum()
    data = open_map(folder / "map.zarr")
    assert data["probability_consistent"].sizes == data["probability"].sizes


def test_the_command_line(mapped, land, minemap, tmp_path):
    folder, frame, _ = mapped
    place = Point((land.bbox[0] + land.bbox[2]) / 2, (land.bbox[1] + land.bbox[3]) / 2)
    geopandas.GeoDataFrame({"site": ["pit"]}, geometry=[place], crs=4326).to_file(tmp_path / "pit.geojson")
    words = ("--stac", land.items, "--model", "demo-2026", "--chunk", 512, "--max-cloud", 90)
    words = (*words, "--out", folder / "map.zarr")
    sites = ("--sites", tmp_path / "pit.geojson", "--buffer", 800)
    done = minemap("series", "--years", "2019,2022-2023", *sites, *words, "--table", tmp_path / "t.parquet", "--json")
    assert done.returncode == 0, done.stderr
    assert "the errors of model demo-2026 were not measured" in done.stderr
    told = json.loads(done.stdout)
    assert [row["year"] for row in told["rows"]] == [2019, 2022, 2023] and told["rows"][0]["gain_km2"] is None
    table = pd.read_parquet(tmp_path / "t.parquet")
    assert table["site"].tolist() == ["pit"] * 3 and (tmp_path / "t.png").exists()
    assert (table["mapped_area_km2"] < frame["mapped_area_km2"].max()).all()
    dry = minemap("series", "--years", "2019,2022", *sites, *words, "--dry-run", "--json")
    assert dry.returncode == 0 and set(json.loads(dry.stdout)) == {"2019", "2022"}
    bad = minemap("series", "--years", "2019-22", *sites, *words)
    assert bad.returncode == 2 and "years '2019-22': give a range" in bad.stderr


def test_only_super_tiles_that_meet_a_site(land, options, model, tmp_path):
    """Without a box: of the 16 super-tiles around two sites in opposite corners, two are planned."""
    west, south, *_ = land.bbox
    far = [box(west, south, west + 0.001, south + 0.001), box(west + 0.15, south + 0.15, west + 0.151, south + 0.151)]
    geopandas.GeoDataFrame(geometry=far, crs=4326).to_file(tmp_path / "far.geojson")
    (planned,) = plan_years(None, 2020, tmp_path / "new.zarr", sites=tmp_path / "far.geojson", **options).values()
    assert len(planned.work) == 2 and not (tmp_path / "new.zarr").exists()


def test_a_year_without_scenes_is_not_observed(land, options, tmp_path, model):
    some = {**options, "model": model}
    with pytest.warns(UserWarning, match="2016 stays unobserved"):
        frame = series(land.bbox, [2016, 2019], tmp_path / "map.zarr", **some)
    assert frame["observed_fraction"].tolist()[0] == 0 and frame["poorly_observed"].tolist()[0]
    assert np.isnan(frame["mapped_area_km2"][0]) and frame["mapped_area_km2"][1] >= 0
    with warnings.catch_warnings(), pytest.raises(NoItemsError, match="2016"):
        warnings.simplefilter("error")  # the error says it all
        series(land.bbox, 2016, tmp_path / "none.zarr", **some)
    assert not (tmp_path / "none.zarr").exists()


def test_a_year_with_an_unreadable_file_keeps_no_other_from_being_made(land, options, tmp_path, model):
    catalogue = json.loads(land.items.read_text())
    for feature in catalogue["features"]:
        for asset in feature["assets"].values():
            asset["href"] = str(land.items.parent / asset["href"])
        if feature["properties"]["datetime"].startswith("2019"):
            feature["assets"]["red"]["href"] = str(tmp_path / "missing.tif")
    (tmp_path / "items.json").write_text(json.dumps(catalogue))
    some = {**options, "model": model, "stac": tmp_path / "items.json"}
    with pytest.raises(ReadError, match=r"2019 not mapped whole: 1 of 1 super-tiles can't be read.*missing\.tif"):
        series(land.bbox, [2019, 2020], tmp_path / "map.zarr", **some)
    assert done_by_year(tmp_path / "map.zarr") == {"2019": 0, "2020": 1}
    west, south, east, north = land.bbox
    wider = (west, south, east + 0.3, north)  # into a cell that no scene reaches
    with pytest.raises(ReadError, match="2019 not mapped whole: 2 of 8"):
        series(wider, [2019, 2020], tmp_path / "map.zarr", overwrite=True, **some)
    done = done_by_year(tmp_path / "map.zarr")
    assert done == {"2019": 6, "2020": 8}  # the store is made anew once


def done_by_year(path):
    store = Store(path)
    return {str(p)[:4]: len(store.done(group, p)) for group in store.groups() for p in store.periods(group)}


def test_a_dry_run_leaves_out_years_without_scenes(land, options, tmp_path):
    with pytest.warns(UserWarning, match="2016 stays unobserved"):
        assert list(plan_years(land.bbox, [2016, 2019], tmp_path / "map.zarr", **options)) == [2019]
    with warnings.catch_warnings(), pytest.raises(NoItemsError, match="2016"):
        warnings.simplefilter("error")
        plan_years(land.bbox, 2016, tmp_path / "map.zarr", **options)


def test_sites_outside_the_box_are_said_before_anything_is_mapped(land, options, tmp_path):
    geopandas.GeoSeries([box(0, 0, 1, 1)], crs=4326).to_file(tmp_path / "far.geojson")
    with pytest.raises(InputError, match=r"far\.geojson and bbox .* have no place in common"):
        series(land.bbox, 2019, tmp_path / "map.zarr", sites=tmp_path / "far.geojson", **options)
    assert not (tmp_path / "map.zarr").exists()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"table": "areas.xlsx"}, "table 'areas.xlsx' can't be written: endings are .csv, .parquet"),
        ({"table": "nowhere/areas.csv"}, "does not exist: make it first"),
        ({"chart": "chart.svg"}, "chart 'chart.svg' can't be written"),
        ({"buffer": 100.0}, "no sites are given"),
        ({"threshold": 50.0}, "threshold 50.0 is a probability"),
        ({"consistency": "magic"}, "unknown consistency 'magic'"),
        ({"sites": "none.geojson"}, "sites none.geojson can't be read"),
    ],
)
def test_bad_input_writes_nothing(words, match, land, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in (series, plan_years):  # a dry run says the same
        with pytest.raises(InputError, match=match):
            run(land.bbox, 2019, tmp_path / "map.zarr", **words, **options)
    assert not list(tmp_path.iterdir())


def test_years():
    assert parse_years("2018-2020") == parse_years([2020, 2018, 2019]) == [2018, 2019, 2020]
    assert parse_years("2018, 2020") == [2018, 2020] and parse_years(2019) == parse_years("2019") == [2019]
    assert parse_years(np.int64(2019)) == [2019]
    for wrong in ("2020-2018", "20", "", [], "2018-2019-2020", "2018-9999"):
        with pytest.raises(InputError, match="years"):
            parse_years(wrong)
    assert package.series is series
