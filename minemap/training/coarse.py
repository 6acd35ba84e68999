"""The coarse domain: fine masks made coarse as polygon sets of mines are coarse, with the strength measured.

Outlines are buffered, hulled, simplified; small parts are left out. `python -m minemap.training.coarse GPKG`
fits the strength to real pairs of coarse and validated polygons of the same places (mine_polygons): the
statistics that must agree are area ratio, boundary roughness ratio and IoU of coarse against validated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.features import rasterize, shapes
from shapely import MultiPolygon, box, concave_hull, transform, unary_union
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from minemap.errors import exit_status
from minemap.training.chips import IGNORE, Chips
from minemap.vectors import read_shapes

PIXEL = 10.0  # metres, of the chips
CHIP = 480.0  # metres, side of a small chip


@dataclass(frozen=True)
class Coarsening:
    """How outlines are made coarse; all in metres, areas in square metres."""

    buffer: float = 0.0  # growth of the outline
    closing: float = 0.0  # gaps narrower than twice this are bridged
    hull: float = 1.0  # ratio of the concave hull of each part: 1 no hull, 0 the convex one
    simplify: float = 0.0  # tolerance of the outline's simplification
    smallest: float = 0.0  # parts below this area are left out


# Fitted to the 116 real pairs of mine_polygons (docs/training.md holds the table that the command prints).
FITTED = Coarsening(simplify=40.0, smallest=100_000.0)
# As coarse as the paper describes its set: smooth blobs that merge what lies between ("smooth, simplified blobs").
BLOBS = Coarsening(buffer=20.0, closing=40.0, hull=0.5, simplify=20.0)
COARSENINGS = {"fitted": FITTED, "blobs": BLOBS}


def coarsen(outline: BaseGeometry, how: Coarsening) -> BaseGeometry:
    """One outline in metres, made coarse."""
    grown = outline.buffer(how.closing + how.buffer).buffer(-how.closing)
    parts = [p for p in getattr(grown, "geoms", [grown]) if p.area >= how.smallest]
    hulled = [p.union(concave_hull(p, ratio=1 - how.hull)) if how.hull < 1 else p for p in parts]
    return unary_union([p.simplify(how.simplify) for p in hulled]) if hulled else MultiPolygon()


def coarsen_mask(mask: NDArray[np.uint8], how: Coarsening, pixel: float = PIXEL) -> NDArray[np.uint8]:
    """A mask uint8 (y, x), 1 mine, 0 not, 255 ignore, with its mines made coarse; ignored pixels stay ignored."""
    if not (mask == 1).any():
        return mask
    mines = unary_union([shape(s) for s, v in shapes(mask, mask == 1) if v == 1])
    scaled = _scale(mines, pixel)
    coarse = _scale(coarsen(scaled, how), 1 / pixel)
    burnt = np.zeros(mask.shape, np.uint8)
    if not coarse.is_empty:
        burnt = rasterize([(coarse, 1)], out_shape=mask.shape, dtype="uint8")
    return np.where(mask == IGNORE, np.uint8(IGNORE), burnt)


def _scale(geometry: BaseGeometry, factor: float) -> BaseGeometry:
    return transform(geometry, lambda xy: xy * factor)


def coarsen_chips(chips: Chips, how: Coarsening = BLOBS) -> Chips:
    """The same chips with coarse masks; lengths are metres, whatever the chips' resolution."""
    masks = [coarsen_mask(mask, how, chips.resolution) for mask in chips.mask]
    return replace(chips, mask=np.stack(masks) if masks else chips.mask)


def roughness(geometry: BaseGeometry) -> float:
    """Length of the outline over that of a circle of the same area; 1 is a circle."""
    return geometry.length / (2 * np.sqrt(np.pi * geometry.area)) if geometry.area else float("nan")


def compare(coarse: BaseGeometry, fine: BaseGeometry) -> dict[str, float]:
    """Area ratio, roughness ratio and IoU of one pair."""
    common = coarse.intersection(fine).area
    return {
        "area": coarse.area / fine.area,
        "roughness": roughness(coarse) / roughness(fine),
        "iou": common / (coarse.area + fine.area - common),
    }


def summary(pairs: list[tuple[BaseGeometry, BaseGeometry]]) -> dict[str, float]:
    """Medians over pairs (coarse, fine); `total` is the ratio of the summed areas."""
    rows = [compare(c, f) for c, f in pairs if c.area and f.area]
    medians = {key: float(np.nanmedian([row[key] for row in rows])) for key in ("area", "roughness", "iou")}
    return medians | {"total": sum(c.area for c, _ in pairs) / sum(f.area for _, f in pairs)}


def real_pairs(path: str) -> list[tuple[BaseGeometry, BaseGeometry]]:
    """(coarse, validated) outlines of each tile of mine_polygons, metres, in the tile's own UTM zone."""
    layers = {
        n: read_shapes(path, "file of outlines", n) for n in ("tiles", "polygons_original", "polygons_annotated")
    }
    pairs = []
    for row in range(len(layers["tiles"])):
        one = {name: layer.iloc[[row]] for name, layer in layers.items()}
        crs = one["tiles"].estimate_utm_crs()
        tile, coarse, fine = (one[n].to_crs(crs).geometry.iloc[0].buffer(0) for n in layers)
        pairs.append((coarse.intersection(tile), fine.intersection(tile)))
    return pairs


def fit(pairs: list[tuple[BaseGeometry, BaseGeometry]]) -> tuple[Coarsening, dict[str, float], dict[str, float]]:
    """The coarsening whose statistics on the validated outlines come nearest to those of the coarse ones."""
    wanted = summary(pairs)
    grid = itertools.product((0.0, 10.0, 20.0), (0.0, 10.0, 20.0, 40.0), (0.0, 50_000.0, 100_000.0, 200_000.0))
    tried = []
    for buffer, simplify, smallest in grid:
        how = Coarsening(buffer=buffer, simplify=simplify, smallest=smallest)
        found = summary([(coarsen(fine, how), fine) for _, fine in pairs])
        tried.append((sum(abs(found[k] - wanted[k]) for k in wanted), how, found))
    _, best, found = min(tried, key=lambda t: t[0])
    return best, found, wanted


def cut_off(outlines: list[BaseGeometry], how: Coarsening, side: float = CHIP, cells: int = 5) -> dict[str, float]:
    """What is lost when labels are made coarse chip by chip instead of mine by mine.

    Of each outline (metres) `cells` random squares of `side` metres that hold some of it are looked at: the whole
    outline made coarse and then cut to the square, against the square's part alone made coarse. Returns the ratio of
    the summed areas (alone / whole), the pooled IoU of the two, and how much either adds to the fine area.
    """
    rng, areas = np.random.default_rng(0), np.zeros(5)
    for outline in outlines:
        whole = coarsen(outline, how)
        for square in _squares(outline, side, cells, rng):
            fine, grown = outline.intersection(square), whole.intersection(square)
            alone = coarsen(fine, how).intersection(square)
            common = alone.intersection(grown).area
            areas += (fine.area, grown.area, alone.area, common, alone.area + grown.area - common)
    fine, grown, alone, common, either = areas
    return {
        "alone_over_whole": alone / grown,
        "iou": common / either,
        "whole_over_fine": grown / fine,
        "alone_over_fine": alone / fine,
    }


def _squares(outline: BaseGeometry, side: float, cells: int, rng: np.random.Generator) -> list[BaseGeometry]:
    """Squares of the lattice of `side` that meet the outline, at most `cells` of them, drawn at random."""
    if outline.is_empty:
        return []
    left, bottom, right, top = outline.bounds
    corners = itertools.product(np.arange(left, right, side), np.arange(bottom, top, side))
    met = [square for x, y in corners if outline.intersects(square := box(x, y, x + side, y + side))]
    return [met[i] for i in rng.permutation(len(met))[:cells]]


def main(arguments: list[str] | None = None) -> None:
    """Fit the coarsening to real pairs and print it as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("polygons", help="coarse_and_validated_116_tiles.gpkg")
    pairs = real_pairs(parser.parse_args(arguments).polygons)
    best, found, wanted = fit(pairs)
    outlines = [fine for _, fine in pairs]
    blobs = summary([(coarsen(fine, BLOBS), fine) for fine in outlines])
    result: dict[str, Any] = {"fitted": asdict(best), "statistics": found, "real": wanted, "blobs": blobs}
    result["cut_off"] = {"fitted": cut_off(outlines, best), "blobs": cut_off(outlines, BLOBS)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(exit_status(main))
