"""Chips and batches: what is read is what is stored, nothing leaks, nothing invented counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED

from minemap.errors import InputError
from minemap.inference import native_precision
from minemap.sentinel2 import BANDS
from minemap.training import batches
from minemap.training.batches import make_batch, place
from minemap.training.chips import IGNORE, Chips, away_from, check_leakage, draw_blocks, keep_bands, load_chips
from minemap.training.config import TOA_OFFSET, TrainConfig, make_config
from minemap.training.loop import make_recipe


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Ten places, two dates, four bands in an order of their own, two places a block."""
    rng = np.random.default_rng(0)
    image = rng.integers(1, 4000, (10, 2, 4, 12, 12)).astype(np.int16)
    image[3, 1] = 0
    mask = rng.integers(0, 2, (10, 2, 12, 12)).astype(np.uint8)
    mask[3, 1] = IGNORE
    bands = np.array(["red", "green", "blue", "nir"])
    np.savez(tmp_path / "chips.npz", image=image, mask=mask, bands=bands)
    rows = [f"p{i},b{i // 2},{'val' if i > 7 else 'train'}" for i in range(10)]
    (tmp_path / "chips.csv").write_text("\n".join(["id,block,split", *rows]) + "\n")
    return tmp_path / "chips.npz"


def test_reading_keeps_values_order_and_absence(file: Path) -> None:
    chips = load_chips(file)
    stored = np.load(file)
    assert chips.image.shape == (20, 6, 12, 12)
    assert np.allclose(chips.image[8, BANDS.index("blue")], stored["image"][4, 0, 2] / 10_000)
    assert np.isnan(chips.image[:, BANDS.index("swir16")]).all()
    assert np.isnan(chips.image[7]).all()
    assert len(chips.decided()) == 19
    assert chips.column("id")[8:10].tolist() == ["p4", "p4"]
    assert chips.column("date")[8:10].tolist() == ["0", "1"]
    assert len(chips.split("val")) == 4


def test_no_table_and_no_date_axis_are_fine(tmp_path: Path) -> None:
    arrays = {"image": np.ones((3, 3, 8, 8), np.uint16), "mask": np.zeros((3, 8, 8), np.uint8)}
    np.savez(tmp_path / "chips.npz", bands=np.array(BANDS[:3]), **arrays)
    chips = load_chips(tmp_path / "chips.npz")
    assert len(chips) == 3
    with pytest.raises(InputError, match="no column 'block'"):
        chips.column("block")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bands": np.array(["red", "green", "purple"])}, "not among"),
        ({"mask": np.zeros((2, 8, 8), np.uint8)}, "do not belong together"),
        ({"image": np.ones((8, 8), np.uint16)}, "do not belong together"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, change: dict, match: str) -> None:
    arrays = {"image": np.ones((3, 3, 8, 8), np.uint16), "mask": np.zeros((3, 8, 8), np.uint8)}
    np.savez(tmp_path / "chips.npz", **({"bands": np.array(BANDS[:3])} | arrays | change))
    with pytest.raises(InputError, match=match):
        load_chips(tmp_path / "chips.npz")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "chips.npz").write_bytes(b"nonsense")
    for name in ("chips.npz", "absent.npz"):
        with pytest.raises(InputError, match="cannot be read as chips"):
            load_chips(tmp_path / name)


def test_a_table_of_another_length_is_refused(file: Path) -> None:
    file.with_name("chips.csv").write_text("id,block\np0,b0\n")
    with pytest.raises(InputError, match="1 rows for 10"):
        load_chips(file)


def test_blocks_are_drawn_whole_and_near_their_share(file: Path) -> None:
    chips = load_chips(file)
    for seed in range(5):
        drawn = draw_blocks(chips, 0.4, seed)
        assert drawn.sum() == 8
        check_leakage(chips.where(drawn), chips.where(~drawn))
    with pytest.raises(InputError, match="two splits"):
        check_leakage(chips, chips.where(drawn))


@pytest.mark.parametrize(
    ("image", "bands", "message"),
    [
        (np.ones((1, 6, 8, 8), np.int16), BANDS[:3], "image has 6 bands, and bands names 3"),
        (np.ones((1, 3, 8, 8), np.int16), BANDS, "image has 3 bands, and bands names 6"),
        (np.full((1, 6, 8, 8), 0.2, np.float32), BANDS, "image is float32: store reflectance"),
    ],
)
def test_an_image_that_its_bands_do_not_name(image: np.ndarray, bands: tuple, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "chips.npz", image=image, mask=np.zeros((1, 8, 8), np.uint8), bands=np.array(bands))
    with pytest.raises(InputError, match=message):
        load_chips(tmp_path / "chips.npz")


def test_an_empty_file_is_no_chips(tmp_path: Path) -> None:
    (tmp_path / "chips.npz").touch()
    with pytest.raises(InputError, match="cannot be read as chips"):
        load_chips(tmp_path / "chips.npz")


def test_keep_bands(file: Path) -> None:
    chips = keep_bands(load_chips(file), ("red",))
    assert np.isnan(chips.image[0]).all(axis=(1, 2)).tolist() == [b != "red" for b in BANDS]


def test_placing_keeps_the_chip_and_marks_the_rest() -> None:
    image = np.arange(6 * 48 * 48, dtype=np.float32).reshape(6, 48, 48)
    mask = np.ones((48, 48), np.uint8)
    for seed in range(5):
        window = place(image, mask, 160, np.random.default_rng(seed))
        y, x = np.argwhere(window.inside)[0]
        assert np.array_equal(window.image[:, y : y + 48, x : x + 48], image)
        assert window.inside.sum() == (window.mask == 1).sum() == 48 * 48
        assert (window.mask[~window.inside] == IGNORE).all()


def test_cutting_from_a_larger_chip() -> None:
    image = np.random.default_rng(0).random((6, 90, 80), np.float32)
    window = place(image, np.zeros((90, 80), np.uint8), 64, np.random.default_rng(1))
    assert window.image.shape == (6, 64, 64)
    assert window.inside.all()
    assert any(np.array_equal(window.image, image[:, y : y + 64, x : x + 64]) for y in range(27) for x in range(17))


def _chips(value: float, bands: int = 6, size: int = 48) -> Chips:
    image = np.full((8, 6, size, size), value, np.float32)
    image[:, bands:] = np.nan
    columns = {"sample": np.arange(8).astype(str), "date": np.full(8, "0")}
    return Chips(image, np.tile(np.eye(size, dtype=np.uint8), (8, 1, 1)), columns)


def _batch(sets: list[Chips], step: int = 0, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    config = make_config({"out": "", "batch": 16, **changes})
    return make_batch(sets, config, make_recipe(config), step)


def test_a_step_alone_decides_its_batch() -> None:
    sets = [_chips(0.2), _chips(0.1, bands=3, size=256)]
    options = {"sizes": [64, 160], "drop_infrared": 0.3, "toa": 0.5}
    for step in range(6):
        first, again = _batch(sets, step, **options), _batch(sets, step, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert first[0].shape[-2:] == first[1].shape[-2:]
        assert set(first[1].unique().tolist()) <= {0, 1, IGNORE}
        assert torch.isfinite(first[0]).all()
    assert not torch.equal(_batch(sets, 0, **options)[0], _batch(sets, 1, **options)[0])


def test_absent_pixels_are_zero_and_never_counted() -> None:
    x, y = _batch([_chips(0.9)], absent=1.0, holes=1.0)
    absent = (x == 0).all(dim=1, keepdim=True)
    assert absent.any()
    assert (y[absent] == IGNORE).all()


def test_dropped_bands_are_zero() -> None:
    x, _ = _batch([_chips(0.9)], drop_infrared=1.0, absent=0.0, holes=0.0)
    assert (x[:, 3:] == 0).all()
    assert (x[:, :3] != 0).any()


def test_atmosphere_goes_towards_the_other_source() -> None:
    config = TrainConfig(out="", toa=1.0)
    given, kept = np.ones((2, 6), bool), np.ones((2, 6), bool)
    given[1, 3:] = False
    kept[:, 3:] = False
    offset = batches._atmosphere(given, kept, config, np.random.default_rng(0))
    assert (offset[0, :3] > 0).all()
    assert (offset[1, :3] < 0).all()
    assert np.allclose(offset[0] / offset[0, 0], np.array(TOA_OFFSET) / TOA_OFFSET[0])
    assert not batches._atmosphere(given[:1], given[:1], config, np.random.default_rng(0)).any()


def test_affine_moves_image_and_mask_together() -> None:
    yy, xx = np.mgrid[:48, :48]
    square = ((abs(yy - 24) < 12) & (abs(xx - 20) < 9)).astype(np.uint8)
    image = np.repeat(square[None, None].astype(np.float32), 6, axis=1)
    columns = {"sample": np.array(["0"]), "date": np.array(["0"])}
    chips = Chips(image, square[None], columns)
    x, y = _batch([chips], affine=1.0, absent=0.0, holes=0.0, jitter=0.0)
    bright = x[:, :1] > x.amin() / 2 + x.amax() / 2
    counted = y != IGNORE
    assert ((y == 1) == bright)[counted].float().mean() > 0.98


@pytest.mark.parametrize("size", [64, 160])
def test_large_chips_are_drawn_beside_small_ones(size: int) -> None:
    """By their numbers in windows below `scene`, by `crops` in larger ones."""
    sets, plain = [_chips(0.1), _chips(0.6, size=256)], {"affine": 0.0, "absent": 0.0, "holes": 0.0, "jitter": 0.0}
    drawn = torch.cat([_batch(sets, step, sizes=[size], batch=32, **plain)[0] for step in range(6)])
    bright = (drawn.mean(dim=(1, 2, 3)) > drawn.mean()).float().mean()
    assert 0.25 < float(bright) < 0.75


def test_small_chips_side_by_side_have_no_common_outline() -> None:
    """All mine in each cell, and where two cells meet nothing is known."""
    chips = _chips(0.2, size=64)
    ones = Chips(chips.image, np.ones_like(chips.mask), chips.columns)
    options = {"sizes": [128], "scatter": 1.0, "scatter_cell": 32, "batch": 4}
    _, y = _batch([ones], affine=0.0, absent=0.0, holes=0.0, **options)
    lines = torch.zeros(128, 128, dtype=torch.bool)
    lines[::32], lines[:, ::32] = True, True
    assert (y[:, 0, lines] == IGNORE).all()
    cells = y[:, 0].unfold(1, 32, 32).unfold(2, 32, 32)[..., 1:, 1:].flatten(3)
    assert ((cells == 1).all(dim=3) | (cells == IGNORE).all(dim=3)).all() and (cells == 1).any()


def test_what_a_warp_takes_from_absent_pixels_is_not_counted() -> None:
    """Bilinear sampling spreads what is absent by a ring."""
    chips = _chips(0.2)
    image = chips.image.copy()
    image[:, :, 20:28, 20:28] = np.nan
    holed = Chips(image, np.zeros_like(chips.mask), chips.columns)
    x, y = _batch([holed], affine=1.0, absent=0.0, holes=0.0, jitter=0.0)
    absent = (x == 0).all(dim=1, keepdim=True)
    assert absent.any() and (y[absent] == IGNORE).all()


def test_a_set_without_rows_is_not_drawn_from() -> None:
    nothing = {"sample": np.zeros(0, str), "date": np.zeros(0, str)}
    empty = Chips(np.zeros((0, 6, 448, 448), np.float32), np.zeros((0, 448, 448), np.uint8), nothing)
    for sets in ([_chips(0.2), empty], [empty, _chips(0.2)]):
        x, _ = _batch(sets, sizes=(256,), scene=128)
        assert x.shape[2:] == (256, 256)


def test_places_of_boxes_count_too() -> None:
    """Files that say where a chip's corners lie are kept apart as those that say where its middle lies."""
    at = {"lon": np.array(["-60.0", "-60.03", "-61"]), "lat": np.array(["-3"] * 3)}
    boxes = {"west": np.array(["-60.01"]), "east": np.array(["-59.99"]), "south": np.array(["-3.01"])}
    boxes |= {"north": np.array(["-2.99"])}
    three, one = (
        Chips(np.zeros((n, 6, 48, 48)), np.zeros((n, 48, 48), np.uint8), c) for n, c in ((3, at), (1, boxes))
    )
    assert away_from(three, one).column("lon").tolist() == ["-61"]
    assert len(away_from(one, three)) == 0 and len(away_from(one, three.where(np.array([False, False, True])))) == 1


def test_a_table_is_no_file_of_chips(tmp_path: Path) -> None:
    (tmp_path / "chips.csv").write_text("id,lon,lat\n1,2,3\n")
    with pytest.raises(InputError, match=r"chips\.csv cannot be read as chips, a \.npz or \.zarr: File is not a zip"):
        load_chips(tmp_path / "chips.csv")


@pytest.mark.parametrize(
    ("option", "value", "others"),
    [
        ("epochs", 0, {}),
        ("batch", 1, {}),
        ("holdout", 1.0, {}),
        ("sizes", [], {}),
        ("sizes", [72], {}),
        ("scatter_cell", 40, {"sizes": [128]}),
        ("replay", 0.5, {}),
        ("schedule", "plateau", {"keep": "last"}),
        ("bands", ["red", "thermal"], {}),
        ("precision", "fp16", {}),
        ("attention", 1.0, {"architecture": "minec2fnet"}),
    ],
)
def test_impossible_options(option: str, value: object, others: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"training option {option}=.*: "):
        make_config({"out": "", **others, option: value})


def test_precision_is_what_the_device_multiplies_unless_told() -> None:
    assert make_config({"out": ""}).precision == native_precision()
    assert make_config({"out": "", "device": "cuda"}).precision == "bf16"
    assert make_config({"out": "", "precision": "fp32", "device": "cuda"}).precision == "fp32"


@pytest.mark.parametrize(("name", "size", "images"), [("mines6", 48, 988), ("mines_rgb", 448, 50)])
def test_the_real_chips(name: str, size: int, images: int) -> None:
    path = SHARED / name / "chips.npz"
    if not path.exists():
        pytest.skip("requires shared data")
    chips = load_chips(path)
    assert chips.image.shape == (images, 6, size, size)
    check_leakage(chips.split("train"), chips.split("val"))
    observed = chips.decided().image[:, :3]
    assert np.nanmin(observed) > 0
    assert np.nanmax(observed) < 2
