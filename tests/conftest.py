"""What the tests share: the synthetic scene, a small checkpoint, the shared data, real servers on loopback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from minemap.checkpoint import load_model
from minemap.demo import Demo, DemoConfig, make_demo
from minemap.grid import Grid
from minemap.scenes import parse_period
from minemap.sentinel2 import BANDS
from minemap.store import Store
from minemap.zones import QUICKLOOK

SHARED = Path(os.environ.get("MINEMAP_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")).resolve()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, or a skip."""
    if not SHARED.is_dir():
        pytest.skip("requires shared data")
    return SHARED


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """A year of the synthetic scene, 640 px a side, in zone 20 N."""
    folder = tmp_path_factory.mktemp("scene")
    return make_demo(folder, DemoConfig(seed=5, size=640, years=(2023,), scenes_per_year=5, cloud=0.05))


@pytest.fixture(scope="session")
def inner(scene: Demo) -> tuple[float, float, float, float]:
    """A box inside the scene, a fifth of it away from each edge."""
    return shrunk(scene.bbox, 1 / 5)


@pytest.fixture(scope="session")
def options(scene: Demo, model: Path) -> dict[str, object]:
    """What every map of the scene is told."""
    return {"stac": scene.items, "model": model, "chunk": 512}


def shrunk(bbox: tuple[float, float, float, float], share: float) -> tuple[float, float, float, float]:
    """The box without `share` of its width and height at each side."""
    west, south, east, north = bbox
    dx, dy = (east - west) * share, (north - south) * share
    return west + dx, south + dy, east - dx, north - dy


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network with random weights: nothing it says is true, but it says the same every time."""
    import torch

    from minemap.checkpoint import Recipe, save
    from minemap.models import build

    torch.manual_seed(0)
    options = {"encoder_name": "tu-regnetx_002", "in_channels": len(BANDS)}
    options |= {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}
    recipe = Recipe(
        name="random",
        architecture="fpn",
        options=options,
        bands=BANDS,
        mean=(0.05, 0.08, 0.08, 0.25, 0.2, 0.12),
        std=(0.05, 0.05, 0.07, 0.1, 0.1, 0.1),
        threshold=0.5,
    )
    folder = tmp_path_factory.mktemp("model") / "random"
    save(folder, build("fpn", **options), recipe)
    return folder


@pytest.fixture
def minemap(capsys: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in this process; exit status and output as a process would give them."""
    from minemap.cli import main

    def run(*words: Any) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        command = [str(word) for word in words]
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            try:
                status = main(command)
            except SystemExit as stop:  # argparse's way out
                status = int(stop.code or 0)
        told = capsys.readouterr()
        return subprocess.CompletedProcess(command, status, told.out, told.err)

    return run


class RangeHandler(SimpleHTTPRequestHandler):
    """Files of a folder with byte ranges, as object stores serve COGs. `faults` may answer in its place."""

    protocol_version = "HTTP/1.1"
    faults: Callable[[RangeHandler], bool] | None = None

    def do_GET(self) -> None:
        if self.faults and self.faults():
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        start, end, status = 0, len(data) - 1, 200
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first, _, last = asked[6:].partition("-")
            start, end, status = int(first), min(int(last or end), end), 206
        self.send_response(status)
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start : end + 1])

    do_HEAD = do_GET  # noqa: N815 (the protocol's name)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts HTTP servers with byte ranges over a folder; returns their address."""
    servers = []

    def start(folder: Path, handler: type[RangeHandler] = RangeHandler) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@contextmanager
def stac_api(catalogue: Path) -> Iterator[str]:
    """The address of a real STAC API (rustac) over an ItemCollection."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = shutil.which("rustac", path=str(Path(sys.executable).parent)) or "rustac"
    options = ["--use-duckdb", "false", "--create-collections", "--addr", f"127.0.0.1:{port}"]
    words = [program, "serve", *options, str(catalogue)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        address = f"http://127.0.0.1:{port}"
        for _ in range(100):
            try:
                urlopen(address, timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield address
        server.terminate()


def served_catalogue(path: Path, items: Path, address: str) -> Path:
    """A copy of a scene's item file whose assets are at an address."""
    catalogue = json.loads(items.read_text())
    for found in catalogue["features"]:
        for asset in found["assets"].values():
            asset["href"] = f"{address}/{asset['href'].removeprefix('./')}"
    path.write_text(json.dumps(catalogue))
    return path


def item(
    name: str, day: str, bbox: tuple[float, float, float, float], hrefs: dict[str, str], **properties: Any
) -> dict:
    """A STAC item with one asset a band."""
    west, south, east, north = bbox
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "collection": "sentinel-2-l2a",
        "bbox": list(bbox),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"datetime": f"{day}T10:00:00Z", **properties},
        "assets": {band: {"href": href, "type": "image/tiff"} for band, href in hrefs.items()},
        "links": [],
    }


def item_file(path: Path, items: list[dict]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    return path


@pytest.fixture(scope="session")
def boadella(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An item file over the 12 real dates of the reservoir of Boadella (EPSG:4326, no SCL)."""
    import rasterio

    found = []
    for folder in sorted((shared / "boadella").iterdir()):
        hrefs = {band: str(folder / f"{band}.tif") for band in BANDS}
        with rasterio.open(hrefs["blue"]) as source:
            bbox = tuple(source.bounds)
        found.append(item(f"boadella-{folder.name}", folder.name, bbox, hrefs, **{"proj:epsg": 4326}))
    return item_file(tmp_path_factory.mktemp("boadella") / "items.json", found)


@pytest.fixture(scope="session")
def tile_33t(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An item file over the 5 real Earth Search items of tile 33TWL, at 120 m."""
    found = []
    for path in sorted((shared / "earth_search_33T").glob("*/*.json")):
        raw = json.loads(path.read_text())
        for asset in raw["assets"].values():
            if asset["href"].startswith("./"):
                asset["href"] = str(path.parent / asset["href"])
        found.append(raw)
    return item_file(tmp_path_factory.mktemp("tile") / "items.json", found)


def write_tif(path: Path, data: np.ndarray, epsg: int, transform: Any, **profile: Any) -> Path:
    """One band as a plain tiled GeoTIFF with nodata 0."""
    import rasterio

    shape = {"height": data.shape[0], "width": data.shape[1], "count": 1, "dtype": data.dtype}
    options = {"driver": "GTiff", "crs": f"EPSG:{epsg}", "transform": transform, "nodata": 0, **shape, **profile}
    with rasterio.open(path, "w", **options) as target:
        target.write(data, 1)
    return path


def painted(
    path: Path,
    zones: dict[Grid, dict[str, np.ndarray]],
    *,
    chunk: int = 512,
    items: tuple[str, ...] = (),
    **attributes: Any,
) -> Path:
    """A finished map whose per cent we choose: grid -> period -> uint8 (y, x), 255 not observed; nothing is run.

    Its quicklook is dark green, and light where most is mine. items: ids of what it was made from. attributes: of
    the store, in place of ours.
    """
    model = load_model("demo-2026")
    store = Store(path)
    store.create(
        {
            "minemap": "0.1.0",
            "model": model.recipe.name,
            "model_sha256": model.sha256,
            "recipe": json.loads(json.dumps(asdict(model.recipe))),
            "parameters": {"precision": "fp32", "chunk": chunk, "resolution": 10.0},
            "parameters_hash": "0" * 64,
            "stac": "nowhere",
            **attributes,
        }
    )
    store.write_items([item(name, "2023-06-01", (0, 0, 1, 1), {}) for name in items])
    for grid, periods in zones.items():
        store.add_zone(grid, chunk, None)
        for period, percent in periods.items():
            span = parse_period(period)
            index = store.add_period(grid.group, span)
            for tile in grid.tiles(chunk):
                row, column = tile.offset_in(grid)
                inside = slice(row, row + chunk), slice(column, column + chunk)
                layers = {"probability": percent[inside], "quicklook": _look(percent[inside])}
                store.write_tile(tile, index, layers)
                record = {"windows": [0, chunk // 256, 0, chunk // 256], "items": list(items)}
                store.write_record(tile, span, record)
    store.consolidate()
    return path


def _look(percent: np.ndarray) -> np.ndarray:
    height, width = (side // QUICKLOOK for side in percent.shape)
    blocks = percent.reshape(height, QUICKLOOK, width, QUICKLOOK).swapaxes(1, 2).reshape(height, width, -1)
    seen, mine = (blocks != 255).any(axis=2), ((blocks >= 50) & (blocks != 255)).mean(axis=2) > 0.5
    colours = np.where(mine[..., None], (230, 190, 150), (40, 70, 30)) * seen[..., None]
    return colours.transpose(2, 0, 1).astype(np.uint8)
