"""Samples and what is estimated from them: the worked example of the paper, and maps whose truth is known."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_areas import BOX, EDGE, store_of

from minemap.assessment import NEAR, STRATA, accuracy, assess, sample
from minemap.contents import computed_tiles
from minemap.errors import InputError
from minemap.grid import grids, pixel_area_km2
from minemap.scenes import parse_period
from minemap.store import Store

# Olofsson et al. 2014, section 5: rows are the map, columns the reference
CLASSES = ("deforestation", "forest gain", "stable forest", "stable non-forest")
MATRIX = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
PIXELS = np.array([200_000, 150_000, 3_200_000, 6_450_000], float)


def example():
    cells = [(i, j) for i in range(4) for j in range(4) for _ in range(MATRIX[i, j])]
    mapped, truth = (np.array(column) for column in zip(*cells, strict=True))
    return accuracy(PIXELS, mapped, mapped, truth, classes=CLASSES, pixels=np.full(4, np.inf))


def test_the_papers_worked_example():
    found = example()
    deforestation = found["deforestation"]
    assert deforestation["area"]["estimate"] == pytest.approx(235_086, abs=1)
    # The paper prints 34,097, but its interval is 1.96 x 34,907: two digits changed places
    assert deforestation["area"]["se"] == pytest.approx(34_907, abs=2)
    hectares = 0.09
    assert deforestation["area"]["estimate"] * hectares == pytest.approx(21_158, abs=1)
    low, high = deforestation["area"]["ci95"]
    assert (high - low) / 2 * hectares == pytest.approx(6_158, abs=1)
    assert deforestation["users"]["estimate"] == pytest.approx(0.88, abs=0.005)
    assert deforestation["producers"]["estimate"] == pytest.approx(0.75, abs=0.005)
    assert found["overall"]["estimate"] == pytest.approx(0.95, abs=0.005)
    assert 1.96 * found["overall"]["se"] == pytest.approx(0.02, abs=0.005)


def test_the_papers_equations_written_out():
    """Equations 5 to 7 and 10 for strata that are the map's classes."""
    found, weights = example(), PIXELS / PIXELS.sum()
    rows = MATRIX.sum(axis=1)
    shares = MATRIX / rows[:, None]
    users = np.diag(shares)
    assert found["overall"]["estimate"] == pytest.approx((weights * users).sum())
    assert found["overall"]["se"] == pytest.approx(np.sqrt((weights**2 * users * (1 - users) / (rows - 1)).sum()))
    totals = (PIXELS[:, None] * shares).sum(axis=0)
    for j, name in enumerate(CLASSES):
        assert found[name]["users"]["estimate"] == pytest.approx(users[j])
        assert found[name]["users"]["se"] == pytest.approx(np.sqrt(users[j] * (1 - users[j]) / (rows[j] - 1)))
        producer = PIXELS[j] * users[j] / totals[j]
        own = PIXELS[j] ** 2 * (1 - producer) ** 2 * users[j] * (1 - users[j]) / (rows[j] - 1)
        others = [i for i in range(4) if i != j]
        rest = sum(PIXELS[i] ** 2 * shares[i, j] * (1 - shares[i, j]) / (rows[i] - 1) for i in others)
        assert found[name]["producers"]["estimate"] == pytest.approx(producer)
        assert found[name]["producers"]["se"] == pytest.approx(np.sqrt(own + producer**2 * rest) / totals[j])
        spread = np.sqrt((weights**2 * shares[:, j] * (1 - shares[:, j]) / (rows - 1)).sum())
        assert found[name]["area"]["estimate"] == pytest.approx(totals[j])
        assert found[name]["area"]["se"] == pytest.approx(spread * PIXELS.sum())


def test_a_sample_of_few_pixels():
    """Of all samples of 3 from 7 pixels, the mean variance is that of the estimates; all 7 have none, nor has one."""
    right = np.array([1, 0, 1, 1, 0, 1, 1])

    def overall(which):
        points = np.zeros(len(which), int)
        return accuracy(np.ones(1), points, points, 1 - right[list(which)], classes=("a", "b"), pixels=np.full(1, 7))[
            "overall"
        ]

    found = [overall(which) for which in combinations(range(7), 3)]
    assert np.mean([f["se"] ** 2 for f in found]) == pytest.approx(np.var([f["estimate"] for f in found]))
    assert overall(range(7)) == {"estimate": right.mean(), "se": 0, "ci95": (right.mean(), right.mean())}
    one = np.zeros(1, int)
    assert accuracy(np.ones(1), one, one, one, classes=("a", "b"), pixels=np.ones(1))["overall"]["se"] == 0


def scene(grid, _):
    """A disc of mine around the middle of BOX, a stripe not observed."""
    x, y = np.meshgrid(grid.x, grid.y)
    values = np.where(np.hypot(x - 500_000, y - 687_800) < 600, 90, 4)
    values[:, grid.x > 501_500] = 255
    return values


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    return store_of(tmp_path_factory.mktemp("assess") / "map.zarr", BOX, (2020, 2021), scene, model)


@pytest.fixture(scope="module")
def drawn(made):
    out = made.with_name("points.geojson")
    return out, sample(made, out, n=200, seed=4)


def positions(points):
    return points["column"].to_numpy() * 10 + 5.0, -points["row"].to_numpy() * 10 - 5.0


def test_a_sample_is_stratified_and_does_not_tell(drawn, made):
    out, told = drawn
    points = pd.read_csv(told["table"])
    assert told["strata"] == {"mine": 60, "near": 40, "far": 100} and len(points) == 200
    assert points["label"].isna().all() and points["date"].unique().tolist() == ["2021-01-01/2021-12-31"]
    features = json.loads(out.read_text())["features"]
    assert [f["properties"]["id"] for f in features] == points["id"].tolist() == list(range(1, 201))
    assert [f["geometry"]["coordinates"][0] for f in features] == points["lon"].tolist()
    x, y = positions(points)
    away = np.hypot(x - 500_000, y - 687_800)
    inside = points.groupby("stratum").agg(lambda s: len(s))["id"].to_dict()
    assert sorted(inside.values()) == [40, 60, 100]
    by = {name: away[points["stratum"] == code] for code in (1, 2, 3) for name in STRATA
          if (points["stratum"] == code).sum() == told["strata"][name]}  # fmt: skip
    assert by["mine"].max() < 600 <= by["near"].min() and by["near"].max() < 600 + NEAR + 10 <= by["far"].min() + 20
    assert x.max() < 501_500 and (points["stratum"].diff() != 0).mean() > 0.4  # nothing unseen; in random order
    grid = grids(BOX, 512)[0]
    values, area = scene(grid, 2020), pixel_area_km2(grid)
    assert told["strata_km2"]["mine"] == pytest.approx(area[values == 90].sum(), abs=1e-5)
    assert sum(told["strata_km2"].values()) == pytest.approx(area[values != 255].sum(), abs=1e-5)


def test_the_same_seed_draws_the_same(drawn, made, tmp_path):
    out, _ = drawn
    sample(made, tmp_path / "again.geojson", n=200, seed=4)
    assert (tmp_path / "again.geojson").read_bytes() == out.read_bytes()
    sample(made, tmp_path / "other.geojson", n=200, seed=5)
    assert (tmp_path / "other.geojson").read_bytes() != out.read_bytes()


def test_within_a_stratum_every_pixel_may_be_drawn(made, tmp_path):
    """Many draws: means of the places of `far` agree with those of the stratum's pixels."""
    found = []
    for seed in range(20):
        points = pd.read_csv(sample(made, tmp_path / "p.geojson", n=100, seed=seed)["table"])
        code = points["stratum"].value_counts().index[0]  # the largest
        found.append(np.stack(positions(points[points["stratum"] == code])))
    grid = grids(BOX, 512)[0]
    x, y = np.meshgrid(grid.x, grid.y)
    far = (np.hypot(x - 500_000, y - 687_800) > 600 + NEAR) & (x < 501_500)
    for drawn_, all_ in zip(np.concatenate(found, axis=1), (x[far], y[far]), strict=True):
        assert abs(drawn_.mean() - all_.mean()) < 4 * all_.std() / np.sqrt(1000)


def labelled(table, truth):
    """A table with labels: `truth` takes easting and northing and gives True for mine."""
    points = pd.read_csv(table)
    points["label"] = np.where(truth(*positions(points)), "mine", "not mine")
    points.to_csv(table, index=False)
    return table


def test_intervals_hold_the_truth(made, tmp_path):
    """The true mine is larger than the map's, one part lies far off; most 95 % intervals of 15 draws hold it."""
    grid = grids(BOX, 512)[0]
    x, y = np.meshgrid(grid.x, grid.y)

    def truth(x, y):
        far_off = (np.abs(x - 498_400) < 600) & (np.abs(y - 686_500) < 600)
        return (np.hypot(x - 500_000, y - 687_800) < 660) & (x > 499_800) | far_off

    seen, area = x < 501_500, pixel_area_km2(grid)
    true, both = area[truth(x, y) & seen].sum(), truth(x, y) & (scene(grid, 2020) == 90)
    users = area[both].sum() / area[scene(grid, 2020) == 90].sum()
    hits = {"area": 0, "users": 0, "producers": 0}
    for seed in range(15):
        table = labelled(sample(made, tmp_path / f"{seed}.geojson", n=400, seed=seed)["table"], truth)
        mine = assess(made, table)["mine"]
        for name, value in (("area", true), ("users", users), ("producers", area[both].sum() / true)):
            low, high = mine[name]["ci95"]
            hits[name] += low <= value <= high
    assert min(hits.values()) >= 12, hits


def test_the_command_line(made, tmp_path, minemap):
    out = tmp_path / "points.geojson"
    done = minemap("sample", made, "--out", out, "--n", 60, "--seed", 3, "--date", 2020, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["n"] == 60
    found = json.loads(out.read_text())
    for feature in found["features"][1:]:
        feature["properties"]["label"] = "not mine"
    out.write_text(json.dumps(found))
    done = minemap("assess", made, out, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["labelled"] == 59 and told["mine"]["users"]["estimate"] == 0
    assert told["mine"]["producers"] is None and told["mine"]["area"]["estimate"] == 0
    words = minemap("assess", made, out)
    assert words.returncode == 0 and "user's accuracy" in words.stdout


@pytest.mark.parametrize("words", [("mine", "not mine"), (1, 0), (True, False), (1.0, 0.0), ("Yes", " no ")])
def test_labels_of_any_kind(made, tmp_path, words):
    out = tmp_path / "points.geojson"
    sample(made, out, n=60, seed=3)
    found = json.loads(out.read_text())
    for n, feature in enumerate(found["features"]):
        feature["properties"]["label"] = words[n % 2] if n else None
    out.write_text(json.dumps(found))
    told = assess(made, out)
    assert told["labelled"] == 59 and told["overall"]["estimate"] == assess_words(made, out, words)


def assess_words(made, out, words):
    """The same labels as words."""
    text = {words[0]: "mine", words[1]: "not mine"}
    found = json.loads(out.read_text())
    for feature in found["features"]:
        label = feature["properties"]["label"]
        feature["properties"]["label"] = "" if label is None else text[label]
    out.write_text(json.dumps(found))
    return assess(made, out)["overall"]["estimate"]


def test_labels_are_not_drawn_over(made, tmp_path):
    out = tmp_path / "points.geojson"
    table = labelled(sample(made, out, n=60)["table"], lambda x, y: x > 0)
    before = Path(table).read_text()
    with pytest.raises(InputError, match=r"points\.csv holds labels: choose another name"):
        sample(made, out, n=90)
    assert Path(table).read_text() == before
    sample(made, tmp_path / "free.geojson", n=60)
    assert sample(made, tmp_path / "free.geojson", n=90)["n"] == 90  # nobody has labelled it
    other = tmp_path / "other.geojson"
    other.write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(InputError, match=r"other\.geojson exists and holds no points of minemap sample"):
        sample(made, other, n=60)


def test_what_cannot_be_assessed(made, tmp_path, model):
    table = sample(made, tmp_path / "p.geojson", n=60)["table"]
    with pytest.raises(InputError, match="stratum mine has 0 labelled points"):
        assess(made, table)
    points = pd.read_csv(table).astype({"label": object})
    points["label"] = "perhaps"
    points.to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(InputError, match="has the label 'perhaps': use mine, not mine"):
        assess(made, tmp_path / "bad.csv")
    other = store_of(tmp_path / "other.zarr", BOX, (2020, 2021), lambda g, _: 90 - scene(g, 0), model)
    with pytest.raises(InputError, match=r"km² in stratum mine, .* when the points were drawn: draw a new sample"):
        assess(other, labelled(table, lambda x, y: x > 0))
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="have no column, date, far_km2, id"):
        assess(made, tmp_path / "no.csv")
    (tmp_path / "long.csv").write_text("x" * 200_000)  # more than the csv module takes as one field
    with pytest.raises(InputError, match=r"long\.csv can't be read: give a file of minemap sample"):
        assess(made, tmp_path / "long.csv")
    with pytest.raises(InputError, match=r"the ending is \.geojson"):
        sample(made, tmp_path / "p.txt")
    for name, value in (("stratum", 9), ("row", "x"), ("seed", None)):
        changed = pd.read_csv(table).astype({name: object})
        changed.loc[3, name] = value
        changed.to_csv(tmp_path / "changed.csv", index=False)
        with pytest.raises(InputError, match=r"were drawn from: draw a new sample|only labels may be changed"):
            assess(made, tmp_path / "changed.csv")
    for name, value in (("seed", "inf"), ("seed", -4), ("threshold", 7), ("date", "then"), ("mine_km2", "much")):
        pd.read_csv(table).assign(**{name: value}).to_csv(tmp_path / "changed.csv", index=False)
        with pytest.raises(InputError, match=r"changed\.csv: only labels may be changed"):
            assess(made, tmp_path / "changed.csv")
    with pytest.raises(InputError, match="seed is -1"):
        sample(made, tmp_path / "q.geojson", seed=-1)
    with pytest.raises(InputError, match="is a folder: give the name of a file"):
        (tmp_path / "folder.geojson").mkdir()
        sample(made, tmp_path / "folder.geojson")
    with pytest.raises(InputError, match="no period 2019"):
        sample(made, tmp_path / "q.geojson", date="2019")
    with pytest.raises(InputError, match="at least 6 points"):
        sample(made, tmp_path / "q.geojson", n=3)


def test_two_zones_and_a_small_stratum(tmp_path, model):
    """A mine of 16 pixels gives its 16; the rest goes to the other strata; points lie in both zones."""

    def paint(grid, _):
        x, y = np.meshgrid(grid.x, grid.y)
        return np.where((np.abs(x - 833_000) < 16) & (np.abs(y - 334_000) < 16), 90, 4)

    path = store_of(tmp_path / "map.zarr", EDGE, (2020,), paint, model)
    told = sample(path, tmp_path / "p.geojson", n=100)
    assert told["strata"]["mine"] == 16 and told["n"] == 100
    assert pd.read_csv(told["table"])["zone"].nunique() == len(Store(path).groups()) == 2


@pytest.mark.parametrize("n", [6, 17, 43])
def test_as_many_points_as_asked(made, tmp_path, n):
    told = sample(made, tmp_path / "p.geojson", n=n)
    assert told["n"] == n == len(pd.read_csv(told["table"])) and min(told["strata"].values()) >= 2
    assert assess(made, labelled(told["table"], lambda x, y: x > 0))["labelled"] == n


def test_a_stratum_of_one_pixel(tmp_path, model):
    """It is drawn and labelled whole, and has no variance."""

    def paint(grid, _):
        x, y = np.meshgrid(grid.x, grid.y)
        return np.where((x == 499_995) & (y == 687_805), 90, 4)

    path = store_of(tmp_path / "map.zarr", BOX, (2020,), paint, model)
    told = sample(path, tmp_path / "p.geojson", n=40)
    assert told["strata"]["mine"] == 1 and told["n"] == 40
    table = labelled(told["table"], lambda x, y: (x == 499_995) & (y == 687_805))
    mine = assess(path, table)["mine"]
    assert mine["area"]["estimate"] == pytest.approx(1e-4, rel=2e-3) and mine["area"]["se"] < 1e-12
    points = pd.read_csv(table)
    points[points["label"] != "mine"].to_csv(table, index=False)
    with pytest.raises(InputError, match="stratum mine has 0 labelled points: label at least 1"):
        assess(path, table)


def test_nothing_observed_is_no_sample(tmp_path, model):
    path = store_of(tmp_path / "map.zarr", BOX, (2020,), lambda grid, _: np.full(grid.shape, 255), model)
    with pytest.raises(InputError, match="has nothing observed in 2020-01-01/2020-12-31: choose another date"):
        sample(path, tmp_path / "p.geojson")
    assert not list(tmp_path.glob("p.*"))


def test_a_map_that_has_grown_since_is_refused(tmp_path, model):
    """The new super-tile could not be drawn, so the sample tells nothing of it."""
    path = store_of(tmp_path / "map.zarr", BOX, (2020,), scene, model)
    store, period = Store(path), parse_period("2020")
    new = computed_tiles(store)[2]  # south of the mine
    record = store.record(new, period)
    store.record_path(new, period).unlink()
    table = labelled(sample(path, tmp_path / "p.geojson", n=60)["table"], lambda x, y: x > 500_000)
    assert assess(path, table)["labelled"] == 60
    store.write_record(new, period, record)
    with pytest.raises(InputError, match=r"km² in stratum far, .* when the points were drawn: draw a new sample"):
        assess(path, table)
    store.write_tile(new, 0, {"probability": np.full(new.shape, 255, np.uint8)})
    assert assess(path, table)["labelled"] == 60
    one = np.full(new.shape, 255, np.uint8)
    one[0, 0] = 0  # far from the mine: one pixel more
    store.write_tile(new, 0, {"probability": one})
    with pytest.raises(InputError, match="draw a new sample"):
        assess(path, table)


@pytest.mark.parametrize(("separator", "decimal"), [(",", "."), (";", "."), (";", ",")])
def test_a_table_saved_by_a_spreadsheet(made, tmp_path, separator, decimal):
    table = labelled(sample(made, tmp_path / "p.geojson", n=60)["table"], lambda x, y: x > 500_000)
    saved = tmp_path / "saved.csv"
    pd.read_csv(table).to_csv(saved, index=False, sep=separator, decimal=decimal, encoding="utf-8-sig")
    assert assess(made, saved) == assess(made, table)
