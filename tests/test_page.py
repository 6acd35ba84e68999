"""The page: one file, no request, right numbers, and it works in a real browser."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import shapely
from conftest import painted
from PIL import Image
from scipy import ndimage

from minemap.areas import area_table
from minemap.checkpoint import load_model
from minemap.errors import InputError
from minemap.grid import CELL, Grid, grids
from minemap.page import POLYGONS, SHAPE_BYTES, export_page
from minemap.polygons import polygons
from minemap.scenes import parse_period
from minemap.store import Store

HOSTILE = '</script><img src="http://127.0.0.1:9/x" onerror="document.title=\'owned\'"><script>document.title="owned"'
YEARS = ("2021", "2022", "2023")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two zones, three years: a mine across the zones' edge that grows, and a small one from 2022 on."""
    drawn = {}
    for grid in grids((-66.02, 6.24, -65.98, 6.26), 512):
        lon, lat = grid._degrees(grid.y, grid.x)
        years = {}
        for n, year in enumerate(YEARS):
            mine = (np.abs(lon + 66) < 0.003 * (n + 1)) & (np.abs(lat - 6.25) < 0.004)
            mine |= (n > 0) & (np.hypot(lon + 65.99, lat - 6.26) < 0.001)
            percent = np.where(mine, 92, 4)
            percent[(n == 1) & (lat < 6.249)] = 255  # a year that hardly saw anything
            years[year] = np.where(grid.owned(), percent, 255).astype(np.uint8)
        drawn[grid] = years
    folder = tmp_path_factory.mktemp("made")
    return painted(folder / "map.zarr", drawn, items=("S2A_one", HOSTILE), model=HOSTILE, stac=HOSTILE)


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    return export_page(made, tmp_path_factory.mktemp("page") / "map.html")


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"))
    return json.loads(text)


def outline(d):
    """An SVG path of rings back as a polygon."""
    rings = []
    for ring in re.findall(r"M[^z]*z", d):
        start, _, steps = ring[1:-1].partition("l")
        points = [list(map(int, re.findall(r"-?\d+", text))) for text in (start, steps)]
        rings.append(np.cumsum(np.reshape(points[0] + points[1], (-1, 2)), axis=0))
    return shapely.Polygon(rings[0], rings[1:])


def test_the_numbers_are_those_of_the_map(made, page):
    data = data_of(page)
    assert [p["name"] for p in data["origin"]["periods"]] == list(YEARS)
    table = area_table(made)
    np.testing.assert_allclose([a["mapped_area_km2"] for a in data["areas"]], table["mapped_area_km2"], atol=1e-5)
    assert [a["poor"] for a in data["areas"]] == [False, True, False]
    for year, rows, count in zip(YEARS, data["polygons"], data["counts"], strict=True):
        frame = polygons(made, date=year)
        assert count == len(frame) == len(rows)
        for row, expected in zip(rows, frame.itertuples(), strict=True):
            assert row["km2"] == pytest.approx(expected.area_km2, abs=1e-6) and row["year"] == expected.first_year
            drawn = outline(row["d"]).area * data["metres"] ** 2 / 1e6
            assert drawn == pytest.approx(row["km2"], rel=0.01)
    assert data["origin"]["periods"][0]["number"] == 2 and data["origin"]["source"] == HOSTILE


def test_pictures_lie_under_the_outlines(page):
    data = data_of(page)
    for picture, rows in zip(data["pictures"], data["polygons"], strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).convert("RGBA"))
        height, width = pixels.shape[:2]
        shape = outline(rows[0]["d"]).buffer(-100)
        x, y = np.meshgrid((np.arange(width) + 0.5) * data["width"] / width, (np.arange(height) + 0.5))
        inside = shapely.contains_xy(shape, x, y * data["height"] / height)
        assert inside.sum() > 20 and (pixels[inside][:, 0] > 120).mean() > 0.95
        away = ~shapely.contains_xy(shape.buffer(400), x, y * data["height"] / height) & (pixels[..., 3] > 0)
        assert (pixels[away][:, 0] < 120).mean() > 0.95
        mine = shapely.contains_xy(
            shapely.union_all([outline(row["d"]) for row in rows]), x, y * data["height"] / height
        )
        assert ((pixels[..., 0] > 120) == mine)[pixels[..., 3] > 0].mean() > 0.999  # half a pixel off: 0.994
    assert [(np.asarray(_image(p))[..., 3] == 0).mean() > 0.3 for p in data["pictures"]] == [False, True, False]


def _image(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA")


def test_the_file_asks_for_nothing_and_no_text_of_data_is_markup(page):
    text = page.read_text("utf-8")
    assert text.count("</script>") == 2 and "<img" not in text and "onerror=" not in text.split('id="data">')[0]
    links = set(re.findall(r"""(?:src|href|url|import)\s*[=(]\s*["']?([^"'\s>)]+)""", text.split('id="data">')[0]))
    assert links == {"data:,", "#poor"}  # the icon that browsers would ask for, and a pattern of the page
    assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg", "http://127.0.0.1:9/x\\"}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A page of 2023 alone, of a map that saw the place without its mine in 2021."""
    grid = Grid(32620, 25 * float(CELL), 34 * float(CELL), 512, 512)
    bare, mined = np.full(grid.shape, 3, np.uint8), np.full(grid.shape, 3, np.uint8)
    mined[200:300, 200:300] = 90
    folder = tmp_path_factory.mktemp("begun")
    path = painted(folder / "map.zarr", {grid: {"2021": bare, "2023": mined}})
    return export_page(path, folder / "m.html", date="2023")


def test_a_page_knows_the_first_year_of_the_map_not_of_what_it_shows(begun):
    data = data_of(begun)
    assert data["first_year"] == 2021 and data["polygons"][0][0]["year"] == 2023


def test_thousands_of_polygons_fit(tmp_path):
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(1024, 1024)), 1.2)
    percent = np.where(noise > np.quantile(noise, 0.75), 90, 3).astype(np.uint8)
    grid = Grid(32620, 25 * float(CELL), 34 * float(CELL), 1024, 1024)
    path = painted(tmp_path / "map.zarr", {grid: {"2023": percent}})
    data = data_of(export_page(path, tmp_path / "map.html"))
    assert data["counts"][0] > POLYGONS == len(data["polygons"][0]) == POLYGONS
    assert sum(len(p["d"]) for p in data["polygons"][0]) <= SHAPE_BYTES
    assert (tmp_path / "map.html").stat().st_size < 10e6
    assert sorted(p["km2"] for p in data["polygons"][0])[0] > 0
    coarse = data_of(export_page(path, tmp_path / "map.html", min_area=0.3))
    assert 0 < coarse["counts"][0] < data["counts"][0] and coarse["areas"] == data["areas"]


def test_outlines_with_countless_holes_end(tmp_path, monkeypatch):
    """Every hole keeps a few bytes however coarse its outline: small ones are left out until the page fits."""
    percent = np.full((512, 512), 90, np.uint8)
    percent[::4, ::4] = 3
    grid = Grid(32620, 25 * float(CELL), 34 * float(CELL), 512, 512)
    path = painted(tmp_path / "map.zarr", {grid: {"2023": percent}})
    monkeypatch.setattr("minemap.page.SHAPE_BYTES", 50_000)
    (rows,) = data_of(export_page(path, tmp_path / "map.html"))["polygons"]
    assert sum(len(row["d"]) for row in rows) <= 50_000
    assert outline(rows[0]["d"]).area > 0


def test_a_zone_with_nothing_done_is_left_out(tmp_path):
    west, east = grids((-66.02, 6.24, -65.98, 6.26), 512)
    percent = np.where(west.owned(), 90, 255).astype(np.uint8)
    path = painted(tmp_path / "map.zarr", {west: {"2023": percent}})
    Store(path).add_zone(east, 512, None)
    Store(path).add_period(east.group, parse_period("2023"))
    Store(path).consolidate()
    (row,) = data_of(export_page(path, tmp_path / "map.html"))["areas"]
    assert row["mapped_area_km2"] == pytest.approx(float(area_table(path)["mapped_area_km2"].iloc[0]), abs=1e-5)


@pytest.mark.parametrize("far", [(9.0, 47.0, 9.01, 47.01), (-65.99, 83.98, -65.9, 84.0)])
def test_the_share_seen_is_of_what_was_mapped_however_far_apart(far, tmp_path):
    """The frame around two distant places, or around one where maps end, is not counted pixel by pixel."""
    drawn = {}
    for place in ((-66.02, 6.24, -66.01, 6.25), far):
        for grid in grids(place, 512):
            drawn[grid] = {"2023": np.where(grid.owned(), 90, 255).astype(np.uint8)}
    (row,) = data_of(export_page(painted(tmp_path / "map.zarr", drawn), tmp_path / "map.html"))["areas"]
    assert row["observed_fraction"] == pytest.approx(1, abs=2e-3) and not row["poor"]


def test_an_estimate_has_whiskers(opened, tmp_path):
    """A model whose errors were measured gives an estimated area with bounds."""
    grid = Grid(32620, 25 * float(CELL), 34 * float(CELL), 512, 512)
    percent = np.full(grid.shape, 3, np.uint8)
    percent[200:300, 200:300] = 90
    recipe = json.loads(json.dumps(asdict(load_model("south-america-2026").recipe)))
    path = painted(tmp_path / "map.zarr", {grid: {"2022/2023": percent}}, recipe=recipe)
    (row,) = data_of(export_page(path, tmp_path / "m.html"))["areas"]
    assert row["area_km2_lower"] < row["area_km2"] < row["area_km2_upper"]
    open_page, _, wrong = opened
    tab = open_page(tmp_path / "m.html")
    assert tab.title() == "Mining footprint 2022-2023" and wrong == []
    assert "Estimated area" in tab.locator("#estimate").inner_text() and not tab.locator("#warn").is_visible()
    assert "Whiskers" in tab.locator("#chart").inner_text()


def test_bad_input(made, minemap, tmp_path):
    done = minemap("export", made, tmp_path / "m.html", "--zone", "utm32619")
    assert done.returncode == 2 and "a page shows all zones" in done.stderr
    for words, message in ((("--date", "2001"), "no period 2001"), (("--threshold", "7"), "is a probability")):
        done = minemap("export", made, tmp_path / "m.html", *words)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    with pytest.raises(InputError, match="does not exist: make it first"):
        export_page(made, tmp_path / "deep" / "m.html")
    assert not list(tmp_path.iterdir())


# --- in a browser -----------------------------------------------------------------------------------------------


UNPROVEN = "that the page works in a browser is NOT PROVEN here: "


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that finds no host, or a skip that says what was not proven."""
    playwright = pytest.importorskip("playwright.sync_api", reason=UNPROVEN + "pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    with playwright.sync_playwright() as started:
        own = started.chromium.executable_path
        found = own if Path(own).exists() else next(filter(None, map(shutil.which, names)), None)
        if found is None:
            pytest.skip(UNPROVEN + "no Chromium, apt-get install chromium (or: playwright install chromium)")
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND"]
        started_browser = started.chromium.launch(executable_path=found, args=arguments)
        yield started_browser
        started_browser.close()


@pytest.fixture
def opened(browser):
    """Opens a page from disk with the network cut off; what it asked for and what went wrong are kept."""
    context = browser.new_context(offline=True, viewport={"width": 1300, "height": 1000})
    asked, wrong = [], []

    def open_page(path):
        tab = context.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("dialog", lambda dialog: wrong.append(dialog.message))
        tab.goto(path.as_uri())
        return tab

    yield open_page, asked, wrong
    context.close()


def test_a_browser_shows_map_slider_and_chart(page, opened, tmp_path):
    open_page, asked, wrong = opened
    tab = open_page(page)
    assert tab.title() == "Mining footprint 2021 to 2023"
    shown = "() => [...document.querySelectorAll('#view > g')].filter(g => g.style.display !== 'none')"
    period = f"() => ({shown})().map(g => g.dataset.period).join()"
    assert tab.evaluate(period) == "2023"
    size = tab.evaluate(
        f"async () => {{ const image = new Image(); image.src = ({shown})()[0].firstChild.href.baseVal;"
        " await image.decode(); return [image.naturalWidth, image.naturalHeight] }"
    )
    assert min(size) > 40
    assert tab.locator("#chart .bar").count() == 3 and tab.locator("#chart .bar.poor").count() == 1
    heights = [float(bar.get_attribute("height")) for bar in tab.locator("#chart .bar").all()]
    mapped = [a["mapped_area_km2"] for a in data_of(page)["areas"]]
    np.testing.assert_allclose(np.array(heights) / heights[2], np.array(mapped) / mapped[2], rtol=1e-3)
    pictures = {"2023": tab.locator("#map").screenshot(path=tmp_path / "2023.png")}

    tab.locator("#slider").focus()
    for expected in ("2022", "2021"):  # with the keyboard alone
        tab.keyboard.press("ArrowLeft")
        assert tab.evaluate(period) == expected == tab.locator("#stamp").inner_text()
        pictures[expected] = tab.locator("#map").screenshot()
    assert len(set(pictures.values())) == 3
    assert _yellow(pictures["2021"]) < 0.8 * _yellow(pictures["2023"])
    assert not tab.locator("#warn").is_visible()
    tab.locator("#chart g").nth(1).click()
    assert tab.evaluate(period) == "2022" and "Poorly observed" in tab.locator("#warn").inner_text()

    before = tab.locator("#view").get_attribute("viewBox")
    tab.locator("#rows button").first.click()
    assert tab.locator(".mine.picked").count() == 1 and tab.locator("#view").get_attribute("viewBox") != before
    tab.locator(".mine.picked").hover(force=True)
    assert "mean probability 92 %" in tab.locator("#tip").inner_text()
    tab.locator("#whole").click()
    tab.locator("#outlines").uncheck()
    assert not tab.locator(".mine.picked").is_visible()

    assert set(tab.locator("#scenes li").all_text_contents()) == {"S2A_one", HOSTILE}
    assert tab.title() == "Mining footprint 2021 to 2023" and tab.locator("img").count() == 0
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()] and wrong == []


def _yellow(png):
    """Pixels in the colour of outlines."""
    red, green, blue = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int).transpose(2, 0, 1)
    return int(((red > 220) & (green > 180) & (blue < 110)).sum())


def test_a_mine_that_was_seen_to_begin_is_not_called_older(begun, opened):
    open_page, _, wrong = opened
    tab = open_page(begun)
    assert tab.locator("#rows td").last.inner_text() == "2023"
    tab.locator("#colour").select_option("year")
    legend = tab.locator("#legend").inner_text()
    assert "2023" in legend and "or before" not in legend and wrong == []
    ticks = tab.locator("#chart text[text-anchor=end]").all_text_contents()
    assert ticks == ["0.00", "0.25", "0.50", "0.75", "1.00", "1.25"]


def test_one_period_has_no_slider(made, opened, tmp_path):
    open_page, asked, wrong = opened
    tab = open_page(export_page(made, tmp_path / "one.html", date="2023", smooth=True))
    assert tab.title() == "Mining footprint 2023"
    assert not tab.locator("#slider").is_visible() and tab.locator("#chart .bar").count() == 1
    assert tab.locator("#view .mine").count() == 2 and tab.locator("#bar").bounding_box()["width"] > 20
    assert len(asked) == 1 + sum(url.startswith("data:") for url in asked) and wrong == []


def until(tab, holds):
    """Whether something comes to hold soon; the page's policy keeps playwright's own way of waiting out."""
    for _ in range(100):
        if holds():
            return True
        tab.wait_for_timeout(30)
    return False


def _scale_is_true(tab):
    """Whether the scale bar is as long in the drawing as its label says."""
    label = tab.locator("#metres").text_content()
    told = float(label.split()[0].replace(",", "")) * (1000 if label.endswith("km") else 1)
    pixels = tab.locator("#bar").evaluate("bar => bar.getBoundingClientRect().width")
    unit = tab.locator("#view").evaluate("view => 1 / view.getScreenCTM().a")
    return pixels * unit * tab.evaluate("D.metres") == pytest.approx(told, rel=0.01)


def test_the_scale_is_true_on_screens_and_paper(page, opened):
    tab = opened[0](page)
    for width, media in ((1300, "screen"), (700, "screen"), (700, "print"), (1300, "print")):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(media=media)
        assert until(tab, lambda: _scale_is_true(tab))


ENDS = """names => [...document.querySelectorAll(names)]
  .filter(t => getComputedStyle(t).visibility === "visible").map(t => {
    const words = document.createRange(); words.selectNodeContents(t);
    const box = words.getBoundingClientRect(); return [box.left, box.right] })"""


def test_names_of_periods_stand_where_they_belong(tmp_path, opened):
    """Months: below the slider's thumb, within the chart, none over another."""
    (grid,) = grids((-63.02, 6.24, -63.0, 6.26), 512)
    months = {f"2023-{month:02}": np.full(grid.shape, 90, np.uint8) for month in range(1, 13)}
    tab = opened[0](export_page(painted(tmp_path / "m.zarr", {grid: months}), tmp_path / "m.html"))
    for width in (1300, 390):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.title() == "Mining footprint 2023-01 to 2023-12"
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        track = tab.locator("#slider").bounding_box()
        for n, tick in enumerate(tab.locator("#ticks span").all()):
            thumb = track["x"] + 8 + (track["width"] - 16) * n / 11
            assert tick.bounding_box()["x"] == pytest.approx(thumb, abs=1)
        for names, within in (("#ticks span", "#map"), ("#chart text[text-anchor=middle]", "#chart svg")):
            boxes = tab.evaluate(ENDS, names)
            around = tab.locator(within).bounding_box()
            assert len(boxes) > 2 and all(a[1] < b[0] for a, b in itertools.pairwise(boxes))
            assert boxes[0][0] >= around["x"] - 1 and boxes[-1][1] <= around["x"] + around["width"] + 1


def test_fingers_move_zoom_and_ask(page, browser):
    context = browser.new_context(offline=True, viewport={"width": 390, "height": 844}, has_touch=True)
    tab = context.new_page()
    tab.goto(page.as_uri())
    box = tab.locator("#view").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touch = context.new_cdp_session(tab)

    def fingers(kind, *points):
        at = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(points)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})

    def width():
        return float(tab.locator("#view").get_attribute("viewBox").split()[2])

    whole = width()
    mine = tab.locator(".mine").first.bounding_box()
    tab.touchscreen.tap(mine["x"] + mine["width"] / 2, mine["y"] + mine["height"] / 2)
    assert "mean probability" in tab.locator("#tip").inner_text() and tab.locator(".mine.picked").count() == 1
    assert tab.evaluate("scrollY") == 0  # the map stays in view
    fingers("touchStart", *((middle[0] + d, middle[1]) for d in (-30, 30)))
    for spread in (40, 60, 90):
        fingers("touchMove", *((middle[0] + d, middle[1]) for d in (-spread, spread)))
    fingers("touchEnd")
    assert width() == pytest.approx(whole / 3, rel=0.02)
    tab.locator("#whole").click()
    tab.mouse.move(*middle)
    tab.mouse.wheel(0, 300)
    assert until(tab, lambda: tab.evaluate("scrollY") > 0) and width() == whole  # there is no more to see
    context.close()


def test_a_mine_across_180_degrees_has_no_line_in_it(tmp_path):
    drawn = {}
    for grid in grids((179.98, -16.52, -179.98, -16.48), 512):
        lon, lat = grid._degrees(grid.y, grid.x)
        mine = (np.abs(lon % 360 - 180) < 0.006) & (np.abs(lat + 16.5) < 0.006)
        drawn[grid] = {"2023": np.where(grid.owned(), np.where(mine, 92, 4), 255).astype(np.uint8)}
    data = data_of(export_page(painted(tmp_path / "m.zarr", drawn), tmp_path / "m.html"))
    ((row,),) = data["polygons"]
    assert row["d"].count("M") == 1
    assert outline(row["d"]).area * data["metres"] ** 2 / 1e6 == pytest.approx(row["km2"], rel=0.01)


def test_what_was_hardly_seen_is_hatched(tmp_path):
    (grid,) = grids((-63.02, 6.24, -63.0, 6.26), 512)
    percent = np.full(grid.shape, 4, np.uint8)
    percent[400:406, 40:48], percent[440:443, 40:48] = 255, 255  # three quarters and three eighths of an 80-m pixel
    data = data_of(export_page(painted(tmp_path / "m.zarr", {grid: {"2023": percent}}), tmp_path / "m.html"))
    assert np.argwhere(np.asarray(_image(data["pictures"][0]))[..., 3] == 0).tolist() == [[50, 5]]
