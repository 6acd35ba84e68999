"""The Planetary Computer, stood in for by real servers: a STAC API, short-lived tokens, storage that wants them.

Assets keep addresses as `http://account.blob.core.windows.net/container/...`; GDAL reaches them through a proxy
(GDAL_HTTP_PROXY), which is our storage. The list of hosts that may be opened is the one of real use.
"""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import xarray as xr
from conftest import RangeHandler, served_catalogue, stac_api

from minemap import map_area
from minemap.errors import ReadError
from minemap.reader import Access, read_overview
from minemap.scenes import search, source

# planetary_computer 1.0 with pydantic 2: theirs to change
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
STORAGE = "http://minescenes.blob.core.windows.net"
BUCKET = "sentinel2-l2"


class Rules:
    """lives: seconds that a token opens anything. claims: seconds that it says it does; None: no tokens at all."""

    lives, claims = 1.0, 1.0
    issued: list[float]
    told: Counter[int]


@pytest.fixture
def stand_in(scene, serve, tmp_path, monkeypatch):
    """Tokens and storage on one port, the STAC API on another; the environment points at both."""
    from planetary_computer import sas
    from planetary_computer.settings import Settings

    rules = Rules()
    rules.issued, rules.told = [], Counter()

    class Azure(RangeHandler):
        def send_response(self, code, message=None):
            if not self.is_token:
                rules.told[code] += 1
            super().send_response(code, message)

        def faults(self):  # type: ignore[override]
            self.is_token = self.path.startswith("/api/sas/v1/token/")
            return self._token() if self.is_token else self._refused()

        def _token(self):
            if rules.claims is None or not self.path.endswith(f"/minescenes/{BUCKET}"):
                self.send_error(404)
                return True
            rules.issued.append(time.time())
            until = (datetime.now(UTC) + timedelta(seconds=rules.claims)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            token = f"st=now&se=then&sp=rl&sig={len(rules.issued) - 1}"
            body = json.dumps({"msft:expiry": until, "token": token}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return True

        def _refused(self):
            parts = urlsplit(self.path)
            if parts.path.startswith("/public/"):  # a container that is open to all
                self.path = parts.path.removeprefix("/public")
                return False
            signature = parse_qs(parts.query).get("sig", [""])[0]
            known = signature.isdigit() and int(signature) < len(rules.issued)
            time.sleep(0.02)  # so that a map takes longer than a token lives
            if not known or time.time() > rules.issued[int(signature)] + rules.lives:
                self.send_error(403)
                return True
            self.path = parts.path.removeprefix(f"/{BUCKET}")
            return False

    azure = serve(scene.items.parent, Azure)
    catalogue = served_catalogue(tmp_path / "catalogue.json", scene.items, f"{STORAGE}/{BUCKET}")
    monkeypatch.setenv("PC_SDK_SAS_URL", f"{azure}/api/sas/v1/token")
    monkeypatch.setenv("GDAL_HTTP_PROXY", azure)
    monkeypatch.setattr("minemap.reader.PAUSE", 0.01)
    sas.TOKEN_CACHE.clear()
    Settings.get.cache_clear()
    with stac_api(catalogue) as api:
        monkeypatch.setenv("MINEMAP_PLANETARY_COMPUTER", api)
        yield rules
    sas.TOKEN_CACHE.clear()
    Settings.get.cache_clear()


@pytest.fixture
def words(scene, model, tmp_path):
    west, south, east, north = scene.bbox
    box = [f"{n:.6f}" for n in (west + 0.02, south + 0.02, east - 0.02, north - 0.02)]
    common = ("--model", model, "--chunk", 512, "--json", "--out", tmp_path / "map.zarr")
    return "map", "--bbox", *box, "--date", "2023", "--stac", "planetary-computer", *common


def probability(path):
    return xr.open_zarr(path, group="utm32620", mask_and_scale=False)["probability"].values


@pytest.mark.parametrize("claims", [1.0, 3600.0], ids=["short-lived", "revoked"])
def test_a_map_outlives_its_tokens(stand_in, words, scene, model, minemap, tmp_path, claims):
    stand_in.claims = claims
    done = minemap(*words)
    assert done.returncode == 0, done.stderr
    assert len(stand_in.issued) > 1 and stand_in.told[206] > 100
    assert stand_in.issued[-1] - stand_in.issued[0] > stand_in.lives
    if claims > stand_in.lives:  # believed in for an hour, refused after a second: a fresh one is asked for
        assert stand_in.told[403] > 0
    local = tmp_path / "local.zarr"
    map_area([float(n) for n in words[2:6]], "2023", local, stac=scene.items, model=model, chunk=512)
    np.testing.assert_array_equal(probability(tmp_path / "map.zarr"), probability(local))
    for path in tmp_path.glob("map.zarr*/**/*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"sig=" not in (gzip.decompress(data) if path.suffix == ".gz" else data), path
    kept = json.loads((tmp_path / "map.zarr.meta" / "items.json").read_text())["features"]
    assert all(a["href"].startswith(STORAGE) for i in kept for a in i["assets"].values())
    again = minemap(*words)
    assert json.loads(again.stdout)["super_tiles_computed"] == 0


def test_without_tokens_one_line_says_so(stand_in, words, minemap):
    stand_in.claims = None
    done = minemap(*words)
    assert done.returncode == 1
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("minemap:")]
    assert "the Planetary Computer gave no token for it: 404" in line


def test_other_catalogues_get_no_tokens(stand_in, scene, monkeypatch):
    import os

    found = search(scene.bbox, "2023", stac=os.environ["MINEMAP_PLANETARY_COMPUTER"], max_cloud=100)
    href = found[0]["assets"]["red"]["href"]
    access = Access.of(source(os.environ["MINEMAP_PLANETARY_COMPUTER"]))
    with pytest.raises(ReadError, match=r"can't be read: .*403"):
        read_overview(href, access)
    assert not stand_in.issued
    signed = read_overview(href, Access.of(source("planetary-computer")))
    assert signed.any() and stand_in.issued


def test_items_of_a_file_with_old_tokens_get_new_ones(stand_in, scene):
    import os

    found = search(scene.bbox, "2023", stac=os.environ["MINEMAP_PLANETARY_COMPUTER"], max_cloud=100)
    href = found[0]["assets"]["red"]["href"]
    old = f"{href}?st=2020-01-01T00:00:00Z&se=2020-01-01T01:00:00Z&sp=rl&sig=99"
    of_a_file = Access.of(source(str(scene.items)))
    assert read_overview(old, of_a_file).any()
    issued = len(stand_in.issued)
    assert issued
    later = old.replace("se=2020", "se=2999")  # whoever made the item may have signed it for a container of theirs
    with pytest.raises(ReadError, match=r"can't be read: .*403"):
        read_overview(later, of_a_file)
    assert len(stand_in.issued) == issued


def test_a_container_that_is_open_to_all_needs_no_token(stand_in, scene):
    import os

    found = search(scene.bbox, "2023", stac=os.environ["MINEMAP_PLANETARY_COMPUTER"], max_cloud=100)
    href = found[0]["assets"]["red"]["href"].replace(f"/{BUCKET}/", "/public/")
    assert read_overview(href, Access.of(source(str(scene.items)))).any()
    with pytest.raises(ReadError, match="gave no token"):
        read_overview(href, Access.of(source("planetary-computer")))


def test_the_stand_in_opens_no_other_hosts(stand_in):
    access = Access.of(source("planetary-computer"))
    with pytest.raises(ReadError, match=r"host evil\.example is not allowed"):
        read_overview("http://evil.example/x.tif", access)
    with pytest.raises(ReadError, match=r"host 127\.0\.0\.2 is not allowed"):
        read_overview("http://127.0.0.2/x.tif", access)
    assert not stand_in.told
