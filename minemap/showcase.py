"""`minemap demo`: makes the synthetic scene, maps it as a user would, and compares the map with the truth."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .demo import Demo, DemoConfig, make_demo
from .errors import InputError
from .export import classes, export
from .mapping import map_area
from .page import export_page
from .scenes import parse_period
from .store import Store, open_map

MODEL = "demo-2026"


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    size: int = 1024,
    year: int = 2023,
    model: str = MODEL,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scene, map, table (`areas.csv`), picture (`map.png`) and page (`map.html`) in the folder `out`.

    Returns a summary with the IoU.
    """
    path = out / "map.zarr"
    if path.exists() and Path(Store(path).attributes()["stac"]).parts[-2:] != ("scene", "items.json"):
        raise InputError(f"{path} is a map, and not the demo's: choose another --out")
    scene = make_demo(out / "scene", DemoConfig(seed=seed, size=size, years=(year,)))
    summary = map_area(
        scene.bbox,
        str(year),
        path,
        stac=scene.items,
        model=model,
        overwrite=True,
        keep_composite=True,
        progress=progress,
    )
    picture, page = export(path, out / "map.png"), export_page(path, out / "map.html", smooth=True)
    score = compare(path, scene, year)
    row = {
        "site": "demo",
        "year": year,
        "mapped_area_km2": summary["km2_mine"],
        "observed_fraction": round(summary["km2_observed"] / summary["km2_total"], 4),
        **score,
    }
    table = out / "areas.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        writer.writeheader()
        writer.writerow(row)
    lines = [f"map      {path}", f"table    {table}", f"picture  {picture}", f"page     {page}"]
    text = "\n".join(["  ".join(f"{k} {v}" for k, v in row.items()), *lines])
    return {**summary, **score, "table": str(table), "picture": str(picture), "page": str(page), "text": text}


def compare(path: Path, scene: Demo, year: int) -> dict[str, float]:
    """Mine area of the truth (km², observed pixels) and IoU of the map with it."""
    import rasterio

    store = Store(path)
    with rasterio.open(scene.truth[year]) as source:
        truth, transform = source.read(1), source.transform
    data = open_map(path, f"utm{scene.epsg}").sel(time=str(parse_period(str(year)).start))
    x = transform.c + (np.arange(truth.shape[1]) + 0.5) * transform.a
    y = transform.f + (np.arange(truth.shape[0]) + 0.5) * transform.e
    percent = data["probability"].reindex(y=y, x=x, method="nearest", tolerance=1).values
    stored = np.nan_to_num(percent, nan=255).astype(np.uint8)
    mine = classes(stored, store.attributes()["recipe"]["threshold"])
    seen = mine != 255
    both = ((mine == 1) & (truth == 1) & seen).sum()
    either = (((mine == 1) | (truth == 1)) & seen).sum()
    area = transform.a**2 / 1e6
    return {
        "truth_km2": round(float((truth[seen] == 1).sum() * area), 4),
        "iou": round(float(both / max(either, 1)), 4),
    }
