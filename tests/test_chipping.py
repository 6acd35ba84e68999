"""`minemap chips`: the map's own pixels, the polygons' own masks, splits by place."""

from __future__ import annotations

import json
import shutil

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
import xarray as xr
from conftest import item, item_file
from pyproj import Geod
from rasterio.features import shapes

from minemap import map_area
from minemap.demo import DemoConfig, make_demo
from minemap.errors import InputError, NoItemsError, StoreError
from minemap.sentinel2 import BANDS
from minemap.training.chipping import (
    ChipRule,
    blocks,
    empty_places,
    make_chips,
    mine_places,
    name_of,
    read_ground,
    splits,
)
from minemap.training.chips import check_leakage, load_chips

FINE = ChipRule(size=64, min_area=0, val=0.3)
QUICK = {"max_cloud": 100, "min_clear": 2}


@pytest.fixture(scope="module")
def land(tmp_path_factory):
    """Two scenes in two zones with their true outlines: folder, item file, polygon file, truth by zone, boxes."""
    folder = tmp_path_factory.mktemp("land")
    places = {"a": (-63.35, 6.25), "b": (-59.2, 5.1)}
    scenes = {
        name: make_demo(folder / name, DemoConfig(seed=5, size=256, years=(2023,), scenes_per_year=4, lon=x, lat=y))
        for name, (x, y) in places.items()
    }
    items, outlines = [], []
    for name, scene in scenes.items():
        for found in json.loads(scene.items.read_text())["features"]:
            for asset in found["assets"].values():
                asset["href"] = str(folder / name / asset["href"].removeprefix("./"))
            items.append({**found, "id": f"{name}-{found['id']}"})
        with rasterio.open(scene.truth[2023]) as source:
            mine = source.read(1)
            parts = [shapely.geometry.shape(s) for s, v in shapes(mine, mine == 1, transform=source.transform) if v]
            outlines.append(geopandas.GeoSeries(parts, crs=source.crs).to_crs(4326))
    polygons = folder / "mines.geojson"
    geopandas.GeoDataFrame(geometry=[g for o in outlines for g in o], crs=4326).to_file(polygons)
    return folder, item_file(folder / "items.json", items), polygons, scenes


@pytest.fixture(scope="module")
def made(land):
    folder, items, polygons, _ = land
    out = folder / "chips.zarr"
    rule = ChipRule(size=64, min_area=0, val=0.3, negatives=12)
    return out, make_chips(polygons, "2023", out, stac=items, rule=rule, **QUICK)


def truth_of(scenes, row):
    """The demo's truth on a chip's window, read by rasterio alone."""
    scene = next(s for s in scenes.values() if f"utm{s.epsg}" == str(row.zone.values))
    with rasterio.open(scene.truth[2023]) as source:
        left, top = float(row.left), float(row.top)
        window = rasterio.windows.from_bounds(left, top - 640, left + 640, top, source.transform)
        return source.read(1, window=window, boundless=True, fill_value=255)


def test_a_set_opens_with_xarray_and_says_what_it_is(made):
    out, summary = made
    data = xr.open_zarr(out, consolidated=False)
    assert dict(data["image"].sizes) == {"sample": summary["chips"], "band": 6, "y": 64, "x": 64}
    assert data["image"].dtype == np.uint16 and data["mask"].dtype == np.uint8
    assert tuple(data.attrs["bands"]) == BANDS
    assert data.attrs["parameters"]["date"] == "2023-01-01/2023-12-31"
    assert set(data) >= {"place", "date", "block", "split", "zone", "lon", "lat", "left", "top", "items"}
    assert summary["zones"] == ["utm32620", "utm32621"] and summary["blocks"] == 2
    assert summary["train"] + summary["val"] == summary["chips"] and summary["val"] > 0
    assert json.loads((out.parent / "chips.zarr.meta" / "items.json").read_text())["features"]
    assert not (out.parent / "chips.zarr.meta" / "chips").exists()


def test_windows_lie_on_the_lattice_and_masks_are_the_truth(made, land):
    data = xr.open_zarr(made[0], consolidated=False)
    assert not (data["left"] % 640).any() and not (data["top"] % 640).any()
    assert len(set(data["place"].values)) == len(data["place"])
    for row in (data.isel(sample=n) for n in range(data.sizes["sample"])):
        mask, truth = row["mask"].values, truth_of(land[3], row)
        seen = mask != 255
        np.testing.assert_array_equal(seen, (row["image"] > 0).all("band").values)
        assert seen.any() and (truth[seen] != 255).all()
        np.testing.assert_array_equal(mask[seen], truth[seen])


def test_every_mined_pixel_that_is_seen_is_in_one_chip(made, land):
    data = xr.open_zarr(made[0], consolidated=False)
    for scene in land[3].values():
        with rasterio.open(scene.truth[2023]) as source:
            truth = int((source.read(1) == 1).sum())
        own = data.sel(sample=(data["zone"] == f"utm{scene.epsg}").values)
        mined = sum((truth_of(land[3], own.isel(sample=n)) == 1).sum() for n in range(own.sizes["sample"]))
        assert mined == truth


def test_negatives_hold_no_mine(made, land):
    asked = {name_of(place) for place in mine_places(read_ground(land[2], None, 0), 64, 10.0)}
    data = xr.open_zarr(made[0], consolidated=False)
    negatives = [
        row
        for row in (data.isel(sample=n) for n in range(data.sizes["sample"]))
        if str(row.place.values) not in asked
    ]
    assert 0 < len(negatives) <= 12
    for row in negatives:
        assert not (row["mask"].values == 1).any() and not (truth_of(land[3], row) == 1).any()


def test_training_sees_the_pixels_that_maps_see(made, land, model, tmp_path):
    _, items, _, scenes = land
    out = tmp_path / "map.zarr"
    box = scenes["a"].bbox
    map_area(box, "2023", out, stac=items, model=model, chunk=512, keep_composite=True, **QUICK)
    mapped = xr.open_zarr(out, group="utm32620", mask_and_scale=False)["composite"].isel(time=0)
    data = xr.open_zarr(made[0], consolidated=False)
    compared = 0
    for n in np.flatnonzero((data["zone"] == "utm32620").values):
        row = data.isel(sample=int(n))
        x, y = float(row["left"]) + 5 + 10 * np.arange(64), float(row["top"]) - 5 - 10 * np.arange(64)
        same = mapped.reindex(x=x, y=y, fill_value=0).values
        seen = (same > 0).all(axis=0)  # the map holds the windows of its box only
        np.testing.assert_array_equal(row["image"].values[:, seen], same[:, seen])
        compared += seen.sum()
    assert compared > 10_000


def test_blocks_are_far_apart_and_lie_in_one_split(made):
    chips = load_chips(made[0])
    check_leakage(chips.split("train"), chips.split("val"))
    geod = Geod(ellps="WGS84")
    place = [(float(x), float(y)) for x, y in zip(chips.column("lon"), chips.column("lat"), strict=True)]
    block, split = chips.column("block"), chips.column("split")
    for i, a in enumerate(place):
        for j, b in enumerate(place[:i]):
            apart = geod.inv(*a, *b)[2]
            assert apart > 5000 or (block[i] == block[j] and split[i] == split[j])


def test_an_npz_holds_the_same(made, land):
    folder, items, polygons, _ = land
    rule = ChipRule(size=64, min_area=0, val=0.3, negatives=12)
    out = folder / "chips.npz"
    assert make_chips(polygons, "2023", out, stac=items, rule=rule, **QUICK)["chips"] == made[1]["chips"]
    one, other = load_chips(out), load_chips(made[0])
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.mask, other.mask)
    assert {k: v.tolist() for k, v in one.columns.items()} == {k: v.tolist() for k, v in other.columns.items()}


def test_an_interrupted_set_goes_on(land, made, tmp_path):
    _, items, polygons, _ = land
    out = tmp_path / "chips.zarr"

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_chips(polygons, "2023", out, stac=items, rule=FINE, progress=stop, **QUICK)
    assert not out.exists()
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "chips.zarr.meta" / "chips").iterdir()}
    assert len(first) == 3
    with pytest.raises(StoreError, match="begun with another max_cloud"):
        make_chips(polygons, "2023", out, stac=items, rule=FINE, max_cloud=50, min_clear=2)
    kept = []

    def look(done, total):
        if done == total:
            kept.extend(p for p, t in first.items() if p.stat().st_mtime_ns == t)

    make_chips(polygons, "2023", out, stac=items, rule=FINE, progress=look, **QUICK)
    assert len(kept) == 3
    one, whole = load_chips(out), load_chips(made[0])
    rows = [whole.column("place").tolist().index(name) for name in one.column("place")]
    np.testing.assert_array_equal(one.image, whole.image[rows])


def test_from_polygons_to_scores_on_the_command_line(land, minemap, tmp_path):
    _, items, polygons, _ = land
    out = tmp_path / "chips.zarr"
    words = ("chips", "--polygons", polygons, "--date", "2023", "--stac", items, "--size", 64, "--min-clear", 2)
    done = minemap(*words, "--min-area", 0, "--val", 0.4, "--max-cloud", 100, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["chips"] > 5
    run = tmp_path / "run"
    quick = ("epochs=1", "epoch_samples=8", "sizes=[64]", "holdout=0", "precision=fp32")
    done = minemap("train", "baseline", "--chips", out, "--out", run, "--set", *quick, "--json")
    assert done.returncode == 0, done.stderr
    done = minemap("evaluate", "--chips", out, "--model", run / "model", "--split", "val", "--by", "block", "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert 0 <= scores["miou"] <= 100 and len(scores["by"]) == 1


# --- what can't be made -----------------------------------------------------------------------------------------


def test_bad_input_says_what_to_do(land, tmp_path):
    _, items, polygons, _ = land
    out = tmp_path / "chips.zarr"

    def asks(error, match, file=polygons, target=out, **options):
        with pytest.raises(error, match=match):
            make_chips(file, "2023", target, stac=items, **{"rule": FINE, **options})

    asks(InputError, r"none of 9\.8 km² or more .* --min-area", rule=None)
    asks(InputError, r"ends in \.zarr or \.npz", target=tmp_path / "chips.csv")
    asks(InputError, "can't be read as a vector file", file=tmp_path / "nowhere.geojson")
    asks(InputError, "no layer 'x': choose one of mines", layer="x")
    (tmp_path / "points.geojson").write_text('{"type":"Point","coordinates":[1,2]}')
    asks(InputError, "holds no polygons", file=tmp_path / "points.geojson")
    asks(StoreError, "is not a set of chips", target=_foreign(tmp_path), overwrite=True)
    with pytest.raises(InputError, match="size is 48: give one of 64"):
        ChipRule(size=48)
    with pytest.raises(InputError, match="val is 1: it is a share"):
        ChipRule(val=1)
    assert not out.exists()


def _foreign(folder):
    (folder / "foreign.zarr").mkdir()
    (folder / "foreign.zarr" / "thesis.txt").write_text("years of work")
    return folder / "foreign.zarr"


def test_outlines_with_a_spike_keep_their_ground(tmp_path):
    """Made valid, a bow tie with a spike is a collection of a multipolygon and a line."""
    tie = shapely.Polygon([(0, 5), (0.02, 5.02), (0.02, 5.05), (0.02, 5.02), (0.02, 5), (0, 5.02)])
    flat = shapely.Polygon([(1, 5), (1.02, 5.02), (1.01, 5.01)])
    geopandas.GeoDataFrame(geometry=[tie, flat], crs=4326).to_file(tmp_path / "p.gpkg")
    parts = read_ground(tmp_path / "p.gpkg", None, 0).polygons
    assert len(parts) == 2 and sum(part.area for part in parts) == pytest.approx(2e-4)
    geopandas.GeoDataFrame(geometry=[flat], crs=4326).to_file(tmp_path / "flat.gpkg")
    with pytest.raises(InputError, match="holds no polygons"):
        read_ground(tmp_path / "flat.gpkg", None, 0)


def test_polygons_without_a_crs_are_refused(land, tmp_path):
    _, items, polygons, _ = land
    bare = geopandas.read_file(polygons).set_crs(None, allow_override=True)
    with pytest.warns(UserWarning, match="crs"):
        bare.to_file(tmp_path / "bare.gpkg")
    with pytest.raises(InputError, match="has no coordinate reference system"):
        make_chips(tmp_path / "bare.gpkg", "2023", tmp_path / "chips.zarr", stac=items, rule=FINE)


def test_no_items_and_nothing_observed(land, tmp_path):
    _, items, polygons, _ = land
    with pytest.raises(NoItemsError, match="no items in"):
        make_chips(polygons, "2019", tmp_path / "chips.zarr", stac=items, rule=FINE)
    assert not list(tmp_path.iterdir())
    with pytest.raises(NoItemsError, match=r"none of \d+ chips was observed .* --min-clear \(it is 24\)"):
        make_chips(polygons, "2023", tmp_path / "chips.zarr", stac=items, rule=FINE, min_clear=24)
    assert not (tmp_path / "chips.zarr").exists()


def test_a_band_that_no_item_has_is_absent(land, tmp_path):
    _, items, polygons, _ = land
    content = json.loads(items.read_text())
    for found in content["features"]:
        found["assets"].pop("swir22")
    poor = item_file(tmp_path / "poor.json", content["features"])
    make_chips(polygons, "2023", tmp_path / "chips.npz", stac=poor, rule=FINE, **QUICK)
    image = load_chips(tmp_path / "chips.npz").image
    assert np.isnan(image[:, BANDS.index("swir22")]).all() and np.isfinite(image[:, 0]).any()


@pytest.mark.parametrize(("lon", "lat"), [(-60.0, 5.0), (-60.0, -5.0), (-57.0, 0.0), (179.99, 10.0)])
def test_mines_at_the_edge_of_a_zone_are_in_chips(tmp_path, lon, lat):
    """Mines beside the edge and across it: each pixel is in the window of the zone that owns it."""
    along, across = np.meshgrid(0.012 * np.arange(-4, 5), (-0.006, 0.001, 0.006) if lon < 179 else (-0.006, 0.001))
    x, y = (lon + across, lat + along) if lat else (lon + along, lat + across)
    squares = [shapely.box(a - 0.004, b - 0.004, a + 0.004, b + 0.004) for a, b in zip(x.flat, y.flat, strict=True)]
    geopandas.GeoDataFrame(geometry=squares, crs=4326).to_file(tmp_path / "mines.gpkg")
    ground = read_ground(tmp_path / "mines.gpkg", None, 0)
    places = mine_places(ground, 256, 10.0)
    mined = sum((ground.zones[p.epsg].mask(p) & p.owned()).sum() for p in places) * 1e-4
    geod = Geod(ellps="WGS84")
    true = sum(abs(geod.geometry_area_perimeter(g)[0]) for g in shapely.get_parts(shapely.union_all(squares))) / 1e6
    assert mined == pytest.approx(true, rel=0.01)


def test_negatives_lie_in_the_zone_that_owns_them(tmp_path):
    mine = shapely.box(-60.01, 4.99, -60.002, 5.0)
    geopandas.GeoDataFrame(geometry=[mine], crs=4326).to_file(tmp_path / "mine.gpkg")
    ground = read_ground(tmp_path / "mine.gpkg", None, 0)
    found = empty_places(mine_places(ground, 256, 10.0), ground, ChipRule(size=256, negatives=1000))
    assert found and {p.epsg for p in found} == {32620}
    lons = [p._degrees(p.y, p.x)[0].mean() for p in found]
    assert max(lons) < -60


def test_mines_on_both_sides_of_the_antimeridian_are_in_one_chip(tmp_path):
    """A window of zone 60 that reaches over 180 degrees holds what lies beyond, at -180 in the file."""
    squares = [shapely.box(179.990, -0.012, 179.996, -0.004), shapely.box(-179.998, -0.012, -179.992, -0.004)]
    geopandas.GeoDataFrame(geometry=squares, crs=4326).to_file(tmp_path / "mines.gpkg")
    ground = read_ground(tmp_path / "mines.gpkg", None, 0)
    beyond = 0
    for place in (p for p in mine_places(ground, 512, 10.0) if p.epsg == 32760):
        lon, _ = place._degrees(place.y, place.x)
        beyond += int((ground.zones[32760].mask(place) & (lon % 360 > 180)).sum())
    assert beyond > 1000


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("seed", range(5))
def test_something_is_left_to_learn_from(count, seed):
    drawn = splits(np.array([f"b{n}" for n in range(count)]), 0.95, seed)
    assert set(drawn) == {"train", "val"}


def test_a_set_that_cannot_be_made_anew_keeps_what_it_was(made, land, tmp_path):
    _, items, polygons, _ = land
    out = tmp_path / "chips.zarr"
    shutil.copytree(made[0], out)
    shutil.copytree(made[0].with_name("chips.zarr.meta"), tmp_path / "chips.zarr.meta")
    with pytest.raises(NoItemsError):
        make_chips(polygons, "2001", out, stac=items, rule=FINE, overwrite=True, **QUICK)
    assert load_chips(out).mask.size and (tmp_path / "chips.zarr.meta" / "items.json").exists()
    np.savez(tmp_path / "results.npz", years=1)
    (tmp_path / "text.zarr").write_text("years of work")
    for foreign in ("results.npz", "text.zarr"):
        with pytest.raises(StoreError, match="is not a set of chips"):
            make_chips(polygons, "2023", tmp_path / foreign, stac=items, rule=FINE, overwrite=True)
    with pytest.raises(InputError, match="option aoi is a map's"):
        make_chips(polygons, "2023", tmp_path / "a.npz", stac=items, rule=FINE, aoi="b.gpkg")


# --- the real polygons ------------------------------------------------------------------------------------------


def test_real_polygons_give_windows_in_many_zones(shared):
    file = shared / "mine_polygons" / "coarse_and_validated_116_tiles.gpkg"
    with pytest.raises(InputError, match="3 layers: name one of tiles, polygons_original, polygons_annotated"):
        read_ground(file, None, 9.8)
    ground = read_ground(file, "polygons_original", 9.8)
    places = mine_places(ground, 256, 10.0)
    assert len({p.epsg for p in places}) > 5 and len(places) == len(set(places))
    block = blocks(places)
    split = splits(block, 0.2, 0)
    assert 0.1 < (split == "val").mean() < 0.3
    assert not set(block[split == "val"]) & set(block[split == "train"])
    mined = sum(ground.zones[p.epsg].mask(p).sum() for p in places) * 1e-4
    geod = Geod(ellps="WGS84")
    large = sum(abs(geod.geometry_area_perimeter(g)[0]) for g in ground.polygons[ground.large]) / 1e6
    assert mined == pytest.approx(large, rel=0.02)


def test_no_items_over_the_polygons(land, tmp_path):
    _, _, polygons, _ = land
    far = item_file(tmp_path / "far.json", [item("x", "2023-05-01", (10, 10, 11, 11), {"blue": "/x.tif"})])
    with pytest.raises(NoItemsError, match=r"none of \d+ chips was observed"):
        make_chips(polygons, "2023", tmp_path / "chips.zarr", stac=far, rule=FINE)
