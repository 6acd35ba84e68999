"""What is told to a person: a map's contents, a model's card, the cost of a run before it starts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .changes import CLASSES, compared
from .checkpoint import DEFAULT_MODEL, Checkpoint, available, load_model
from .cluster import TASK_THREADS
from .compositing import STRIP_BYTES
from .grid import WINDOW
from .inference import cores
from .scenes import MARGIN, Period, parse_period
from .store import Store, open_map

if TYPE_CHECKING:
    from .planning import Plan

# Rough rates, measured on two cores of an AVX512-BF16 server; they serve the estimate and nothing else.
READ_SECONDS = 2.0e-7  # CPU, a pixel and acquisition: six bands and SCL decoded and composited
NETWORK_SECONDS = {"bf16": 0.18, "fp32": 0.35}  # CPU, 256 x 256 px of the map, of which each is in several windows
BYTES_READ = 7.3  # a pixel of 10 m and acquisition: six bands and SCL of a usual product, compressed
BYTES_WRITTEN = 0.35  # a pixel of the map, compressed
# Within a twentieth of the peaks that `python -m benchmarks memory memory-default` found with many super-tiles
WORKER_BYTES = 1.7e9  # libraries, weights, two streams of the network, GDAL's cache
PIXEL_BYTES = 72  # a pixel of a super-tile and its margin: six bands as float32, three times
LOOK_BYTES = 3  # a pixel and look held at a time
SAID = ("never mine", "mine at both", "gain", "loss", "not observed")  # of changes.CLASSES


def describe(path: str | Path) -> dict[str, Any]:
    """Zones with their periods, extent and what was found there, the model, and the parameters of a map.

    Areas are km² on the ellipsoid of what the zone owns and the area of interest holds, whole windows of it. A map
    of change has "map" for "stac", and one period a zone, "BEFORE to AFTER", with the area of each class.
    """
    store = Store.opened(path)
    about = store.attributes()
    names = ("minemap", "model", "model_sha256", "stac", "map", "parameters")
    return {
        "path": str(path),
        "kind": store.kind,
        **{name: about[name] for name in names if name in about},
        "zones": [_zone(store, group) for group in store.groups()],
    }


def _zone(store: Store, group: str) -> dict[str, Any]:
    data = open_map(store.path, group)
    grid = store.grid(group)
    periods = _changes(store, group) if store.kind == "change" else _periods(store, group)
    bounds = tuple(data.rio.bounds()) if data.sizes["y"] else ()
    return {"zone": group, "epsg": grid.epsg, "bounds": bounds, "resolution": grid.resolution, "periods": periods}


def _changes(store: Store, group: str) -> list[dict[str, Any]]:
    made = store.attributes()["parameters"]
    before, after = parse_period(made["before"]), parse_period(made["after"])
    about = {"period": f"{before} to {after}"}
    if not store.meta.is_dir():  # a copy without its ledger
        return [about]
    records = store.records(group, compared(before, after))
    areas = {name: round(sum(record[name] for record in records), 4) for name in CLASSES}
    return [{**about, "super_tiles": len(records), **areas}]


def _periods(store: Store, group: str) -> list[dict[str, Any]]:
    return [_period(store, group, p) for p in sorted(store.periods(group), key=str)]


def _period(store: Store, group: str, period: Period) -> dict[str, Any]:
    if not store.meta.is_dir():  # a copy without its ledger
        return {"period": str(period)}
    records = store.records(group, period)
    pixel = (store.grid(group).resolution / 1000) ** 2
    wanted, observed, mine = (sum(_km2(r, of, pixel) for r in records) for of in ("wanted", "observed", "mine"))
    return {
        "period": str(period),
        "super_tiles": len(records),
        "km2_computed": round(wanted, 2),
        "observed_fraction": round(observed / wanted, 4) if wanted else 0.0,
        "km2_mine": round(mine, 4),
        "items": len({item for r in records for item in r["items"]}),
    }


def _km2(record: dict[str, Any], of: str, pixel: float) -> float:
    """An area of a record; records of maps that were made before there were areas in them have counts of pixels."""
    if (found := record.get(f"{of}_km2")) is not None:
        return found
    return pixel * (_windows(record) * WINDOW**2 if of == "wanted" else record[f"{of}_px"])


def told(about: dict[str, Any]) -> str:
    """`describe` as text."""
    source = f"from {about['stac']}" if about["kind"] == "map" else f"change of {about['map']}"
    lines = [f"{about['path']}: model {about['model']} ({about['model_sha256'][:12]}), {source}"]
    for zone in about["zones"]:
        extent = " ".join(f"{n:.0f}" for n in zone["bounds"]) or "nothing yet"
        lines.append(f"  {zone['zone']}  EPSG:{zone['epsg']}, {zone['resolution']:g} m, extent {extent}")
        lines += [f"    {period['period']}: {_told(period)}" for period in zone["periods"]]
    return "\n".join(lines)


def _told(period: dict[str, Any]) -> str:
    if "super_tiles" not in period:
        return "how much is done is not known, the .meta folder beside the map is missing"
    if "gain_km2" in period:
        areas = ", ".join(f"{period[name]:,.2f} km² {said}" for name, said in zip(CLASSES, SAID, strict=True))
        return f"{period['super_tiles']} super-tiles: {areas}"
    return (
        f"{period['super_tiles']} super-tiles, {period['km2_computed']:,.1f} km² computed, "
        f"{period['observed_fraction']:.1%} observed, {period['km2_mine']:,.2f} km² of mine, {period['items']} items"
    )


def model_list() -> list[dict[str, str]]:
    """Name and one line about each bundled model."""
    return [{"name": name, "about": _line(load_model(name))} for name in available()]


def _line(model: Checkpoint) -> str:
    about = model.recipe.training.get("about", "")
    mark = "default; " if model.recipe.name == DEFAULT_MODEL else ""
    return f"{mark}{about or model.recipe.architecture}"


def card(name: str) -> dict[str, Any]:
    """A model's recipe, its hash, and `text`: its card."""
    model = load_model(name)
    written = model.path / "README.md"
    facts = [
        f"{model.recipe.name}  ({model.path})",
        f"sha256     {model.sha256}",
        f"network    {model.recipe.architecture}, bands {' '.join(model.recipe.bands)}",
        f"threshold  {model.recipe.threshold:.2f} ({model.recipe.threshold_rule})",
    ]
    text = "\n".join(facts) + ("\n\n" + written.read_text(encoding="utf-8") if written.exists() else "")
    return {**asdict(model.recipe), "sha256": model.sha256, "text": text}


def estimate(plan: Plan) -> dict[str, Any]:
    """What a run would cost, without the super-tiles that are done: a guide, not a promise.

    Rates are those of the map's own finished super-tiles, else of two server cores and local files.
    """
    cells = _acquisitions(plan)
    looks, layers = sum(map(len, cells)) / len(cells), max(sum(map(len, cell)) for cell in cells)
    left = [w for w in plan.work if w not in plan.finished]
    pixels = sum(w.inner.height * w.inner.width for w in left)
    largest = max((w.inner.height + 2 * MARGIN) * (w.inner.width + 2 * MARGIN) for w in left) if left else 0
    tile_bytes = largest * PIXEL_BYTES + min(largest * layers * LOOK_BYTES, STRIP_BYTES)
    seconds, told = _seconds(plan, pixels, looks)
    return {
        "super_tiles": len(plan.work),
        "super_tiles_done": len(plan.finished),
        "zones": [grid.group for grid in plan.grids],
        "cells_chosen_now": len(plan.cells),
        "cells_frozen_before": plan.frozen,
        "items": len({name for cell in cells for ids in cell for name in ids}),
        "acquisitions_per_cell": round(looks, 1),
        "bytes_to_read": int(pixels * looks * BYTES_READ),
        "worker_memory_bytes": int(WORKER_BYTES + min(TASK_THREADS, len(left)) * tile_bytes),
        "seconds": round(seconds),
        "seconds_from": told,
        "bytes_written": int(pixels * BYTES_WRITTEN),
        "model": plan.checkpoint.recipe.name,
        "precision": plan.settings.precision,
    }


def _seconds(plan: Plan, pixels: int, looks: float) -> tuple[float, str]:
    """How long this machine needs for `pixels`, and where that is known from."""
    records = [r for r in plan.finished.values() if r.get("at_once") and r["seconds"]]
    if records:
        done = sum(_windows(r) * WINDOW**2 * r["at_once"] for r in records)
        return pixels * sum(r["seconds"] for r in records) / done, f"{len(records)} finished super-tiles"
    network = pixels / WINDOW**2 * NETWORK_SECONDS[plan.settings.precision]
    return (pixels * looks * READ_SECONDS + network) / cores(), "rates of a server's cores"


def _windows(record: dict[str, Any]) -> int:
    top, bottom, left, right = record["windows"]
    return (bottom - top) * (right - left)


def _acquisitions(plan: Plan) -> list[list[list[str]]]:
    """The item ids of each acquisition of each cell, chosen now or frozen before."""
    before = {(w.tile.group, w.tile.cell) for w in plan.work} - plan.cells.keys()
    frozen = [plan.store.read_cell(*cell, plan.period) or [] for cell in before] if plan.store else []
    return [[[i["id"] for i in a.items] for a in cell] for cell in plan.cells.values()] + frozen
