"""Whole maps of real imagery."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine
from conftest import item, item_file, write_tif

from minemap import map_area
from minemap.checkpoint import DEFAULT_MODEL, available, load_model
from minemap.grid import zone_epsg
from minemap.sentinel2 import BANDS

BOX = (2.7935, 42.3320, 2.8365, 42.3630)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no SCL:UserWarning"),
    pytest.mark.skipif(DEFAULT_MODEL not in available(), reason="the default model is not bundled yet"),
]


def stored(path, name):
    return xr.open_zarr(path, group="utm32631", mask_and_scale=False)[name].isel(time=0)


@pytest.fixture(scope="module")
def reservoir(boadella, tmp_path_factory):
    out = tmp_path_factory.mktemp("reservoir") / "map.zarr"
    return out, map_area(BOX, "2020/2022", out, stac=boadella, chunk=512)


def test_a_reservoir_is_observed_and_its_water_is_no_mine(reservoir, boadella, shared):
    out, summary = reservoir
    assert summary["zones"] == ["utm32631"]
    assert summary["km2_observed"] / summary["km2_total"] >= 0.95
    wrong, water = _wrong_water(out, boadella)
    assert water.sum() > 2000
    assert not wrong.any()


def _wrong_water(out, boadella):
    """Open water called mine, and open water, bool (y, x)."""
    percent = stored(out, "probability")
    water = _water(boadella, percent)
    mine = (percent.values != 255) & (percent.values >= load_model().recipe.threshold * 100)
    return mine & water, water


def _water(boadella, percent):
    """NDWI above 0 on at least 9 of the dates, nearest pixels of the sources; from rasterio alone."""
    from pyproj import Transformer

    lon, lat = Transformer.from_crs(32631, 4326, always_xy=True).transform(
        *np.meshgrid(percent["x"].values, percent["y"].values)
    )
    wet = np.zeros(percent.shape, int)
    for found in json.loads(boadella.read_text())["features"]:
        with rasterio.open(found["assets"]["green"]["href"]) as g, rasterio.open(found["assets"]["nir"]["href"]) as n:
            green, nir = g.read(1).astype(float), n.read(1).astype(float)
            column, row = (np.floor(v).astype(int) for v in ~g.transform @ (lon, lat))
        inside = (row >= 0) & (row < green.shape[0]) & (column >= 0) & (column < green.shape[1])
        rows, columns = np.where(inside, row, 0), np.where(inside, column, 0)
        wet += inside & (green[rows, columns] > nir[rows, columns])
    return wet >= 9


def test_a_reservoir_is_the_same_from_another_box_and_chunk(reservoir, boadella, tmp_path):
    out, _ = reservoir
    other = tmp_path / "other.zarr"
    map_area((2.80, 42.335, 2.8365, 42.3630), "2020/2022", other, stac=boadella, chunk=2048)
    for name in ("probability", "observations"):
        one, two = stored(out, name), stored(other, name)
        counts = stored(out, "observations"), stored(other, "observations")
        y, x = (np.intersect1d(one[d], two[d]) for d in ("y", "x"))
        seen = np.logical_and(*(c.sel(y=y, x=x).values > 0 for c in counts))
        assert seen.sum() > 80_000
        np.testing.assert_array_equal(one.sel(y=y, x=x).values[seen], two.sel(y=y, x=x).values[seen])


def test_real_mines_through_the_map_score_as_through_evaluate(shared, tmp_path):
    """Chips of mines6 as COGs and items, mapped, against the network on the arrays: within 2 points."""
    from minemap.training.chips import load_chips
    from minemap.training.evaluate import predict_chips

    chosen = _mining_chips(shared)[:12]
    images, masks, places = _chips(shared)
    items, windows = [], []
    for number, (sample, date) in enumerate(chosen):
        items.append(_served(tmp_path, number, images[sample, date], places[sample]))
        windows.append((items[-1]["bbox"], masks[sample, date]))
    path = item_file(tmp_path / "items.json", items)
    pairs = []
    for number, (bbox, mask) in enumerate(windows):
        out = tmp_path / f"{number}.zarr"
        map_area(bbox, "2021-06-01", out, stac=path, chunk=512, min_clear=1)
        pairs.append((_mapped(out, tmp_path / f"{number}" / "blue.tif"), mask))
    model = load_model()
    chips = load_chips(shared / "mines6" / "chips.npz")
    rows = np.isin(np.arange(len(chips)), [2 * sample + date for sample, date in chosen])
    reference = predict_chips(model.network(), model.recipe, chips.where(rows))
    recall, iou = _scores([(p >= model.recipe.threshold * 100, m) for p, m in pairs])
    expected = _scores([(p >= model.recipe.threshold, m) for p, (_, m) in zip(reference, pairs, strict=True)])
    assert recall == pytest.approx(expected[0], abs=0.02) and iou == pytest.approx(expected[1], abs=0.02)
    assert recall > 0.6


def _chips(shared):
    import csv

    with np.load(shared / "mines6" / "chips.npz") as data:
        images, masks = data["image"], data["mask"]
    with (shared / "mines6" / "chips.csv").open() as file:
        places = [(float(r["lon"]), float(r["lat"]), r["split"], r["category"]) for r in csv.DictReader(file)]
    return images, masks, places


def _mining_chips(shared):
    _, masks, places = _chips(shared)
    return [
        (sample, 1)
        for sample, place in enumerate(places)
        if place[2] == "val" and (masks[sample, 1] == 1).mean() > 0.05 and (masks[sample, 1] != 255).mean() > 0.9
    ]


def _served(folder, number, image, place):
    from pyproj import Transformer

    lon, lat = place[:2]
    epsg = zone_epsg(lon, lat)
    x, y = Transformer.from_crs(4326, epsg, always_xy=True).transform(lon, lat)
    transform = Affine(10, 0, round(x / 10) * 10 - 240, 0, -10, round(y / 10) * 10 + 240)
    (folder / f"{number}").mkdir()
    stored = np.maximum(image, 0).astype(np.uint16)
    files = {
        b: str(write_tif(folder / f"{number}" / f"{b}.tif", stored[i], epsg, transform)) for i, b in enumerate(BANDS)
    }
    back = Transformer.from_crs(epsg, 4326, always_xy=True)
    bbox = back.transform_bounds(transform.c, transform.f - 480, transform.c + 480, transform.f)
    return item(f"chip-{number}", "2021-06-01", bbox, files, **{"proj:epsg": epsg})


def _mapped(out, chip):
    from minemap.store import Store

    with rasterio.open(chip) as source:
        transform, epsg = source.transform, source.crs.to_epsg()
    data = xr.open_zarr(out, group=Store(out).groups()[0], mask_and_scale=False)["probability"].isel(time=0)
    assert data.rio.crs.to_epsg() == epsg
    x = transform.c + 5 + 10 * np.arange(48)
    y = transform.f - 5 - 10 * np.arange(48)
    return data.sel(x=x, y=y).values


def _scores(pairs):
    """Recall and IoU of mine over decided, observed pixels."""
    both = sum(int((p & (m == 1)).sum()) for p, m in pairs)
    truth = sum(int((m == 1).sum()) for _, m in pairs)
    either = sum(int(((p & (m != 255)) | (m == 1)).sum()) for p, m in pairs)
    return both / truth, both / either
