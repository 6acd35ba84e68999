"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOX = ("-63.36", "6.24", "-63.34", "6.26")


def outcome(done: subprocess.CompletedProcess[str]) -> tuple[int, list[str]]:
    return done.returncode, done.stderr.strip().splitlines()


BAD = {
    "south over north": (("--bbox", "-63", "7", "-62", "6"), "south 7.0 lies north of 6.0"),
    "latitude over 90": (("--bbox", "-63", "6", "-62", "91"), "north is 91"),
    "beyond utm": (("--bbox", "-63", "80", "-62", "86"), "UTM maps end at"),
    "no area": (("--bbox", "-63", "6", "-63", "7"), "has no area"),
    "three numbers": (("--bbox", "-63", "6", "-62"), "needs 4 numbers"),
    "a word": (("--bbox", "-63", "six", "-62", "7"), "not a list of numbers"),
    "month 13": (("--date", "2023-13"), "month must be in 1..12"),
    "no date": (("--date", "last year"), "is not a year, month or day"),
    "start after end": (("--date", "2024/2023"), "ends before it starts"),
    "unknown source": (("--stac", "google"), "unknown STAC source 'google'"),
    "nobody there": (("--stac", "http://127.0.0.1:9"), "Connection refused"),
    "unknown model": (("--model", "nonesuch"), "no model 'nonesuch'"),
    "months": (("--months", "0-13"), "numbers from 1 to 12"),
    "cloud": (("--max-cloud", "101"), "it is a percentage"),
    "no scenes": (("--max-scenes", "0"), "max_scenes is 0, and a pixel needs 3 clear looks"),
    "west over east": (("--bbox", "-62", "6", "-63", "7"), "west -62.0 lies east of -63.0"),
    "no host": (("--stac", "http:///x"), "check the address"),
    "no address": (("--stac", "http://[bad"), "is no address"),
    "scl": (("--mask-scl", "1,99"), "run from 0 to 11"),
    "aoi": (("--aoi", "nothing.geojson"), "can't be read as a vector file"),
    "empty": (("--date", "1999"), "10 found|removed"),
    "chunk": (("--chunk", "300"), "invalid choice"),
    "cluster": (("--cluster", "mars"), "unknown cluster 'mars'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(case, scene, model, minemap, tmp_path):
    words, message = BAD[case]
    out = tmp_path / "deep" / "map.zarr"
    good = {"--bbox": BOX, "--date": ("2023",), "--stac": (scene.items,), "--model": (model,)}
    good.pop(words[0], None)
    rest = [word for name, values in good.items() for word in (name, *values)]
    status, lines = outcome(minemap("map", *rest, *words, "--out", out, "--quiet"))
    assert status in (1, 2)
    assert len(lines) == 1 and re.search(message, lines[0]), lines
    assert lines[0].startswith(("minemap: ", "minemap map: "))
    assert not list(tmp_path.iterdir())


def test_an_item_file_that_is_not_json(model, minemap, tmp_path):
    broken = tmp_path / "items.json"
    broken.write_text("{not json")
    done = minemap(
        "map", "--bbox", *BOX, "--date", "2023", "--stac", broken, "--model", model, "--out", tmp_path / "m.zarr"
    )
    assert outcome(done)[0] == 1 and len(outcome(done)[1]) == 1
    assert "is not a STAC ItemCollection" in done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOTDIR])
def test_what_the_system_refuses_is_no_surprise(number, minemap, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number), "/full/map.zarr")

    monkeypatch.setattr(json, "dumps", refuse)
    status, lines = outcome(minemap("models", "--json"))
    assert status == 1 and len(lines) == 1
    assert lines[0].startswith(f"minemap: {os.strerror(number).lower()} (/full/map.zarr): ")


@pytest.mark.parametrize("name", ["weights.safetensors", "recipe.json", "SHA256SUMS"])
def test_a_model_with_a_flipped_byte(name, scene, model, minemap, tmp_path):
    bad = shutil.copytree(model, tmp_path / "bad")
    data = bytearray((bad / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bad / name).write_bytes(bytes(data))
    done = minemap(
        "map", "--bbox", *BOX, "--date", "2023", "--stac", scene.items, "--model", bad, "--out", tmp_path / "m.zarr"
    )
    assert outcome(done)[0] == 1 and len(outcome(done)[1]) == 1
    assert not (tmp_path / "m.zarr").exists()


def test_an_output_that_is_not_ours(scene, model, minemap, tmp_path):
    words = ("map", "--bbox", *BOX, "--date", "2023", "--stac", scene.items, "--model", model, "--out")
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_text("meow")
    for out in (folder, folder / "cat.jpg"):
        for extra in ((), ("--overwrite",)):
            status, lines = outcome(minemap(*words, out, *extra))
            assert status == 1 and len(lines) == 1 and "is not a minemap store" in lines[0]
    assert (folder / "cat.jpg").read_text() == "meow"
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]
    status, lines = outcome(minemap(*words, "/proc/nothing/map.zarr"))
    assert status == 1 and len(lines) == 1


def test_help_is_quick_and_light():
    code = (
        "import sys; from minemap.cli import parser; parser();"
        "print([m for m in ('torch', 'rasterio', 'xarray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_map_info_export(scene, model, minemap, tmp_path):
    out = tmp_path / "map.zarr"
    words = (
        "map",
        "--bbox=" + ",".join(BOX),
        "--date",
        "2023",
        "--stac",
        scene.items,
        "--model",
        model,
        "--out",
        out,
    )
    done = minemap(*words, "--chunk", "512", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    for key in [
        "km2_total",
        "km2_observed",
        "km2_mine",
        "super_tiles",
        "super_tiles_done",
        "items",
        "seconds",
        "out",
        "model",
        "model_sha256",
    ]:
        assert key in summary
    assert summary["km2_observed"] <= summary["km2_total"]
    again = json.loads(minemap(*words, "--chunk", "512", "--json", "--quiet").stdout)
    assert again["super_tiles_computed"] == 0
    assert {k: again[k] for k in again if k.startswith("km2")} == {
        k: summary[k] for k in summary if k.startswith("km2")
    }
    plain = minemap(*words, "--chunk", "512")
    assert "km² mapped" in plain.stdout and "super-tiles" in plain.stderr
    other = minemap(*words, "--chunk", "1024")
    assert other.returncode == 1 and "was made with chunk = 512" in other.stderr
    other = minemap(*words, "--chunk", "512", "--max-cloud", "30")
    assert other.returncode == 1 and "was made with max_cloud = 60.0" in other.stderr
    told = minemap("info", out)
    assert "utm32620" in told.stdout and "random" in told.stdout
    for name in ("map.png", "map.tif"):
        assert minemap("export", out, tmp_path / name).returncode == 0
        assert (tmp_path / name).stat().st_size > 1000
    refused = minemap("export", out, tmp_path / "map.xyz")
    assert refused.returncode == 2 and "endings are" in refused.stderr
    assert "no period" in minemap("export", out, tmp_path / "map.tif", "--date", "2001").stderr


def test_dry_run_writes_nothing_and_loads_no_torch(scene, model, tmp_path):
    code = (
        "import sys; from minemap.cli import main;"
        f"main(['map','--bbox',*{BOX!r},'--date','2023','--stac',{str(scene.items)!r},'--model',{str(model)!r},"
        f"'--out',{str(tmp_path / 'm.zarr')!r},'--dry-run']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "super_tiles" in done.stdout and "bytes_to_read" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_plan_of_many_zones_tells_where_it_is(scene, minemap):
    wide = ("--bbox", -75, 6.2, -45, 6.3, "--date", 2023, "--stac", scene.items, "--dry-run")
    told = minemap("map", *wide, "--out", "map.zarr")
    assert told.returncode == 0, told.stderr
    zones = [line for line in told.stderr.splitlines() if "searching" in line]
    assert zones[0] == "minemap: searching 2023-01-01/2023-12-31 of utm32618, zone 1 of 6"
    assert len(zones) == 6
    assert "searching" not in minemap("map", *wide, "--out", "map.zarr", "--quiet").stderr


def sections():
    """Command -> its section of the README, with that of `map`, whose options many share."""
    parts = re.split(r"^### ", (ROOT / "README.md").read_text(), flags=re.MULTILINE)[1:]
    found = {name: part for part in parts for name in re.findall(r"minemap (\w+)", part.splitlines()[0])}
    return {name: part + found["map"] for name, part in found.items()}


def test_readme_names_every_command_and_option_and_no_other():
    from minemap.cli import parser

    commands = next(a for a in parser()._actions if a.choices and "map" in a.choices).choices
    told = sections()
    assert told.keys() == commands.keys()
    known = {"--help", "--debug", "--version"}
    for name, command in commands.items():
        options = {option for action in command._actions for option in action.option_strings} - {"-h", "--help"}
        known |= options
        missing = options - set(re.findall(r"(?<![\w-])--[a-z-]+", told[name])) - {"--debug"}
        assert not missing, (name, missing)
    everywhere = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", (ROOT / "README.md").read_text()))
    assert everywhere <= known, everywhere - known


def test_a_reader_that_has_gone_is_no_failure():
    there, here = os.pipe()
    os.close(there)
    words = [sys.executable, "-m", "minemap", "models"]
    done = subprocess.run(words, stdout=here, stderr=subprocess.PIPE, check=False)
    os.close(here)
    assert (done.returncode, done.stderr) == (0, b"")


def test_nobody_listening_for_warnings_is_no_end(scene, model, tmp_path):
    there, here = os.pipe()
    os.close(there)
    words = ["map", "--bbox", *BOX, "--date", "2023", "--stac", scene.items, "--model", model, "--chunk", "512"]
    command = [sys.executable, "-m", "minemap", *map(str, words), "--out", str(tmp_path / "map.zarr"), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=here, check=False)
    os.close(here)
    assert done.returncode == 0 and json.loads(done.stdout)["super_tiles_done"] > 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full"])
def test_closed_streams_are_no_failure(closed):
    command = f"exec {sys.executable} -m minemap {{}} {closed}"
    done = subprocess.run(["bash", "-c", command.format("models --json")], capture_output=True, check=False)
    assert done.returncode == 0 and bool(done.stdout) == closed.startswith("2>") and not done.stderr
    failed = subprocess.run(["bash", "-c", command.format("info no.zarr")], capture_output=True, check=False)
    assert failed.returncode == 1 and not failed.stdout


def test_a_locale_without_our_characters():
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    words = [sys.executable, "-m", "minemap", "models", "south-america-2026"]
    done = subprocess.run(words, env=env, capture_output=True, check=False)
    assert done.returncode == 0 and b"False alarms" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("--bbox", "-63.", "6", "-62.5", "7"),
        ("--bbox", "-63,", "6,", "-62.5,", "7"),
        ("--bbox", "-63,6,-62.5,7"),
        ("--bbox=-63,6,-62.5,7",),
        ("--bbox", "-6.3e1", "6", "-62.5", "7"),
    ],
)
def test_a_box_in_any_spelling(words):
    from minemap.cli import _split_bbox, parser

    found = parser().parse_args(_split_bbox(["map", *words, "--date", "2023", "--out", "x=-1"]))
    assert [float(n) for n in found.bbox] == [-63, 6, -62.5, 7] and found.out == "x=-1"
