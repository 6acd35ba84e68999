"""Maps in object storage: a real S3 server on loopback, reached by s3fs as a user's would be."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import painted

import minemap as mm
from minemap.areas import area_table
from minemap.errors import StoreError
from minemap.grid import Grid
from minemap.places import place_of, remove
from minemap.scenes import parse_period
from minemap.store import Store

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
YEAR = parse_period("2023")


@pytest.fixture(scope="module")
def storage():
    """Variables of an environment that leads to an S3 server, as users set them; it has the bucket `maps`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = shutil.which("moto_server", path=str(Path(sys.executable).parent)) or "moto_server"
    words = [program, "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as environment:
            for name, value in (KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}).items():
                environment.setenv(name, value)
            place_of("s3://maps").fs.mkdir("maps")
            yield
        server.terminate()


@pytest.fixture
def bucket(storage, request):
    """An address below which only this test writes."""
    place_of("s3://maps").fs.clear_instance_cache()  # of the environment that another test had
    return f"s3://maps/{request.node.name}".replace("[", "-").rstrip("]")


@pytest.fixture(scope="module")
def on_disk(inner, options, tmp_path_factory):
    out = tmp_path_factory.mktemp("disk") / "map.zarr"
    mm.map_area(inner, "2023", out, **options)
    return out


@pytest.fixture(scope="module")
def there(storage, inner, options):
    """The same map in object storage."""
    out = "s3://maps/whole/map.zarr"
    summary = mm.map_area(inner, "2023", out, **options)
    assert summary["out"] == out
    assert summary["super_tiles_computed"] == summary["super_tiles_done"] == summary["super_tiles"] >= 4
    return out


@pytest.fixture
def copied(there, bucket):
    """A copy of it that a test may change."""
    out = place_of(f"{bucket}/map.zarr")
    out.fs.copy("maps/whole/", f"{out.parent.path}/", recursive=True)
    return out


def keys(store: str | Path) -> dict[str, bytes]:
    """Name -> bytes of all that a Zarr store holds."""
    place = place_of(store)
    if isinstance(place, Path):
        return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}
    return {key.removeprefix(f"{place.path}/"): place.fs.cat_file(key) for key in place.fs.find(place.path)}


def test_a_map_there_has_the_bytes_of_one_on_disk(there, inner, options, on_disk):
    assert keys(there) == keys(on_disk)
    again = mm.map_area(inner, "2023", there, **options)
    assert (again["super_tiles_computed"], again["super_tiles_done"]) == (0, again["super_tiles"])


def test_so_has_one_that_other_processes_made(bucket, inner, options, on_disk):
    mm.map_area(inner, "2023", f"{bucket}/map.zarr", cluster="local", workers=2, **options)
    assert keys(f"{bucket}/map.zarr") == keys(on_disk)


def test_a_killed_run_goes_on(bucket, inner, options, on_disk):
    out = f"{bucket}/map.zarr"
    told = ["--stac", options["stac"], "--model", options["model"], "--chunk", 512, "--json"]
    words = ["minemap", "map", "--bbox", *inner, "--date", 2023, "--out", out, *told]
    command = [sys.executable, "-m", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as run:
        ledger = place_of(f"{out}.meta/ledger")
        while run.poll() is None and not list(ledger.glob("*/*/*.json")):
            time.sleep(0.1)
        assert run.poll() is None
        run.kill()
    summary = mm.map_area(inner, "2023", out, **options)
    assert summary["super_tiles_computed"] < summary["super_tiles_done"] == summary["super_tiles"]
    assert keys(out) == keys(on_disk)


def test_other_parameters_are_refused_and_overwrite_starts_anew(copied, inner, options, on_disk):
    with pytest.raises(StoreError, match=r"was made with max_cloud = 60\.0, this run has 50\.0"):
        mm.map_area(inner, "2023", copied, max_cloud=50, **options)
    Store.at(copied).create(Store.at(copied).attributes())
    assert keys(copied).keys() == {"zarr.json"}
    assert {key.split("/")[0] for key in keys(copied.parent)} == {"map.zarr", "map.zarr.meta"}  # no draft
    assert mm.map_area(inner, "2023", copied, overwrite=True, **options)["super_tiles_computed"] >= 4
    assert keys(copied) == keys(on_disk)


@pytest.fixture
def two_years(bucket, tmp_path):
    """The same painted map of two years in object storage and on disk; a mine that grew by half."""
    grid = Grid(32620, 512 * 900, 512 * 1360, 512, 1024)
    first = np.zeros(grid.shape, np.uint8)
    first[100:300, 400:600] = 90
    second = first.copy()
    second[100:300, 600:700] = 90
    years = {grid: {"2022": first, "2023": second}}
    return painted(place_of(f"{bucket}/map.zarr"), years), painted(tmp_path / "map.zarr", years)


def test_what_people_take_away_is_the_same(there, on_disk, minemap, tmp_path):
    for source, folder in ((there, tmp_path / "there"), (on_disk, tmp_path / "here")):
        folder.mkdir()
        for name in ("map.tif", "map.geojson", "map.png", "map.html"):
            told = minemap("export", source, folder / name, "--quiet")
            assert told.returncode == 0, told.stderr
    for name in ("map.tif", "map.geojson", "map.png"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert "2023-01-01/2023-12-31: 4 super-tiles" in minemap("info", f"{there}/").stdout
    told = minemap("export", there, "s3://maps/map.tif")
    assert told.returncode == 2
    assert "is an address: only maps can be there, give the name of a file" in told.stderr


def test_so_are_areas_and_change(two_years, bucket, tmp_path):
    source, local = two_years
    assert area_table(source).to_csv() == area_table(local).to_csv()
    found = mm.change(source, before="2022", after="2023", out=f"{bucket}/change.zarr")
    assert found["km2_gain"] == pytest.approx(2, rel=1e-3)  # 200 by 100 pixels of 10 m
    mm.change(local, before="2022", after="2023", out=tmp_path / "change.zarr")
    np.testing.assert_array_equal(
        mm.open_map(f"{bucket}/change.zarr").change, mm.open_map(tmp_path / "change.zarr").change
    )


def test_open_map_reads_it_lazily(two_years):
    there, here = (mm.open_map(store) for store in two_years)
    assert there.chunks == here.chunks
    np.testing.assert_array_equal(there.probability, here.probability)


def test_a_zone_whose_making_stopped_is_made_again(copied, inner, options, on_disk):
    store = Store.at(copied)
    (group,) = store.groups()
    (copied / group / "zarr.json").unlink()  # it is put last
    (copied / f"draft-{group}" / "zarr.json").write_text("{}")
    remove(store.meta / "ledger")
    assert store.groups() == []
    mm.map_area(inner, "2023", copied, **options)
    assert keys(copied) == keys(on_disk)


def test_the_run_that_began_last_goes_on(two_years):
    store = Store.at(two_years[0])
    (tile, *_) = store.done("utm32620", YEAR)
    late = "is being written by a run that began after this one"
    with pytest.raises(StoreError, match=late), store.locked() as earlier:
        with store.locked() as later:
            for write in (
                lambda: earlier.bound().write_record(tile, YEAR, {"windows": [0, 2, 0, 2]}),
                lambda: earlier.add_period(tile.group, parse_period("2024")),
                lambda: earlier.add_consistent(tile.group, None),
                lambda: earlier.create({}),
                earlier.consolidate,
            ):
                with pytest.raises(StoreError, match=late):
                    write()
            later.bound().write_record(tile, YEAR, {"windows": [0, 2, 0, 2], "by": "the later"})
        raise KeyError("what the later run took away")
    assert store.record(tile, YEAR)["by"] == "the later"
    assert parse_period("2024") not in store.periods(tile.group)


def test_of_two_runs_at_once_none_spoils_the_other(bucket, inner, options, tmp_path):
    dates = ("2023-01/2023-08", "2023-05/2023-12")
    told = ["--stac", options["stac"], "--model", options["model"], "--chunk", 512, "--min-clear", 1, "--quiet"]
    out = f"{bucket}/map.zarr"
    words = [["map", "--bbox", *inner, "--date", date, "--out", out, *told] for date in dates]
    commands = [[sys.executable, "-m", "minemap", *map(str, line)] for line in words]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    ends = [(run.communicate()[1], run.returncode) for run in runs]
    assert 0 in [status for _, status in ends]
    for date, command, (line, status) in zip(dates, commands, ends, strict=True):
        if status:
            assert "by a run that began after this one" in line or "at the same time" in line, line
            subprocess.run(command, check=True)
        mm.map_area(inner, date, tmp_path / "map.zarr", min_clear=1, **options)
    there, here = mm.open_map(out), mm.open_map(tmp_path / "map.zarr")
    np.testing.assert_array_equal(there.time_bounds, here.time_bounds)
    np.testing.assert_array_equal(there.probability, here.probability)
    assert float(abs(there.probability[0] - there.probability[1]).max()) > 0  # two dates that differ


def test_a_new_zone_counts_when_it_is_whole(copied):
    order = []
    copy = copied.fs.cp_file
    copied.fs.cp_file = lambda source, target: (order.append(target), copy(source, target))
    try:
        Store.at(copied).add_zone(Grid(32621, 512 * 900, 512 * 1360, 512, 512), 512, None)
    finally:
        copied.fs.cp_file = copy
    assert len(order) > 10
    assert order[-1] == f"{copied.path}/utm32621/zarr.json"
    assert Store.at(copied).groups() == ["utm32620", "utm32621"]


def test_a_damaged_super_tile_is_named_and_made_again(copied, inner, options, on_disk, minemap):
    name = next(key for key in keys(copied) if "/probability/c/" in key)
    (copied / name).write_bytes(b"damaged")
    told = minemap("export", copied, on_disk.with_name("x.tif"))
    assert told.returncode == 1
    assert f"{copied}/utm32620/probability is damaged within" in told.stderr
    mm.map_area(inner, "2023", copied, **options)
    assert keys(copied) == keys(on_disk)


@pytest.mark.parametrize(
    ("out", "environment", "status", "line"),
    [
        ("s3://nomaps/map.zarr", {}, 1, "map.zarr.meta/run can't be written: The specified bucket does not exist"),
        ("s3://maps", {}, 2, "output s3://maps has no name: give the name of a store"),
        ("s3://maps/map.zarr", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 1, "map.zarr can't be reached: Could not"),
        ("s3://maps/whole/map.zarr/m.zarr", {}, 2, "lies within the store s3://maps/whole/map.zarr: choose a place"),
        ("s3://maps/map*.zarr", {}, 2, "an address may have none of"),
        ("s3://maps//map.zarr", {}, 2, "and no // in it, choose another name"),
        ("ftp://maps/map.zarr", {}, 2, "give a folder, or one of s3://"),
        ("gs://maps/map.zarr", {}, 2, "pip install gcsfs universal-pathlib"),
    ],
)
def test_refusals_are_one_line(out, environment, status, line, bucket, there, inner, options, minemap, monkeypatch):
    if out.startswith("gs"):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
        place_of(out).fs.clear_instance_cache()
    told = minemap("map", "--bbox", *inner, "--date", 2023, "--stac", options["stac"], "--out", out, "--quiet")
    assert (told.returncode, told.stdout) == (status, "")
    assert line in told.stderr
    assert len(told.stderr.splitlines()) == 1


def test_without_credentials_it_says_so(bucket, inner, options, minemap, monkeypatch):
    for name in KEYS:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/none")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    place_of("s3://maps/map.zarr").fs.clear_instance_cache()
    told = minemap("info", "s3://maps/map.zarr")
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == "minemap: s3://maps/map.zarr can't be reached: Unable to locate credentials\n"


def test_chips_are_made_in_folders(bucket, minemap, tmp_path):
    mines = tmp_path / "mines.geojson"
    ring = [[-63, 6], [-63, 6.01], [-62.99, 6.01], [-62.99, 6], [-63, 6]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    mines.write_text(json.dumps({"type": "Feature", "properties": {}, "geometry": geometry}))
    told = minemap("chips", "--polygons", mines, "--date", 2023, "--out", f"{bucket}/chips.zarr")
    assert told.returncode == 2
    assert "lies in object storage, where only maps can be: give a folder" in told.stderr
