"""A real STAC API (rustac) over items whose assets a real HTTP server serves in byte ranges."""

from __future__ import annotations

import json
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import xarray as xr
from conftest import RangeHandler, item, served_catalogue, stac_api

from minemap import map_area
from minemap.errors import CatalogueError, NoItemsError
from minemap.scenes import search

BOX = (-63.4, 6.2, -63.3, 6.3)


@pytest.fixture
def api(scene, serve, tmp_path):
    """The address of a STAC API over the synthetic scene."""
    catalogue = served_catalogue(tmp_path / "catalogue.json", scene.items, serve(scene.items.parent))
    with stac_api(catalogue) as address:
        yield address


def test_map_from_a_stac_api(api, scene, model, minemap, tmp_path):
    west, south, east, north = scene.bbox
    bbox = (west + 0.015, south + 0.015, east - 0.015, north - 0.015)
    out = tmp_path / "map.zarr"
    box = [f"{n:.6f}" for n in bbox]
    done = minemap(
        "map",
        "--bbox",
        *box,
        "--date",
        "2023",
        "--stac",
        api,
        "--model",
        model,
        "--out",
        out,
        "--json",
        "--chunk",
        512,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["km2_observed"] / summary["km2_total"] > 0.9
    local = tmp_path / "local.zarr"
    map_area([float(n) for n in box], "2023", local, stac=scene.items, model=model, chunk=512)
    one, two = (xr.open_zarr(p, group="utm32620", mask_and_scale=False)["probability"].values for p in (out, local))
    np.testing.assert_array_equal(one, two)


def test_search_filters_and_pages(api, scene, monkeypatch):
    monkeypatch.setattr("minemap.scenes.PAGE", 2)
    everything = search(scene.bbox, "2023", stac=api, max_cloud=100)
    assert [i["id"] for i in everything] == [
        i["id"] for i in search(scene.bbox, "2023", stac=scene.items, max_cloud=100)
    ]
    assert all(i["assets"]["blue"]["href"].startswith("http://127.0.0.1") for i in everything)
    with pytest.raises(NoItemsError, match="0 found"):
        search((10, 10, 11, 11), "2023", stac=api)
    with pytest.raises(NoItemsError, match=r"no items in .* collection landsat"):
        search(scene.bbox, "2023", stac=api, collection="landsat")


def test_an_address_below_the_api_is_said(api, scene):
    (collection,) = {i["collection"] for i in search(scene.bbox, "2023", stac=api)}
    for below in (f"/collections/{collection}", f"/collections/{collection}/items"):
        with pytest.raises(CatalogueError, match="does not answer as a STAC API"):
            search(scene.bbox, "2023", stac=api.rstrip("/") + below)


class Pages(RangeHandler):
    """A STAC API whose search has three pages with an item each, but for the second, and then empty ones."""

    second: ClassVar[dict] = {}
    last = 3

    def do_GET(self):  # noqa: N802 (the protocol's name)
        here = "http://" + self.headers["Host"]
        conforms = ["https://api.stacspec.org/v1.0.0/core", "https://api.stacspec.org/v1.0.0/item-search"]
        about = {"type": "Catalog", "stac_version": "1.0.0", "id": "pages", "description": "", "conformsTo": conforms}
        search = {"rel": "search", "href": f"{here}/search", "type": "application/geo+json", "method": "POST"}
        number = int(parse_qs(urlsplit(self.path).query).get("page", ["1"])[0])
        found = item(f"S2A_{number}", f"2023-05-0{number}", BOX, {"blue": f"{here}/b.tif"})
        page = {"type": "FeatureCollection", "features": [found] if number <= 3 else []}
        page = self.second if number == 2 else page
        following = [{"rel": "next", "href": f"{here}/search?page={number + 1}"}] if number < self.last else []
        answer = page | {"links": following} if "/search" in self.path else about | {"links": [search]}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):  # noqa: N802
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()


def test_an_empty_page_is_not_the_end(serve, tmp_path):
    address = serve(tmp_path, type("Empty", (Pages,), {"second": {"features": []}}))
    assert [i["id"] for i in search(BOX, "2023", stac=address)] == ["S2A_1", "S2A_3"]


def test_empty_pages_without_an_end_end(serve, tmp_path):
    address = serve(tmp_path, type("Endless", (Pages,), {"second": {"features": []}, "last": 10**6}))
    assert [i["id"] for i in search(BOX, "2023", stac=address)] == ["S2A_1", "S2A_3"]
    nothing = serve(tmp_path, type("Nothing", (Pages,), {"second": {"features": [], "links": None}}))
    assert len(search(BOX, "2023", stac=nothing)) == 2


@pytest.mark.parametrize("second", [{"features": None}, {"code": 500, "description": "try later"}])
def test_a_page_that_is_none_is_said(second, serve, tmp_path):
    address = serve(tmp_path, type("Broken", (Pages,), {"second": second}))
    with pytest.raises(CatalogueError, match="does not answer as a STAC API"):
        search(BOX, "2023", stac=address)
