"""The command line: parses, makes one library call, prints. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .errors import InputError, MinemapError

INTERRUPTED = 130
# What the system may refuse, and what to do then
FULL = "free some space, or choose another place; what is finished stays"
REFUSED = "choose a place where you may do that"
REMEDIES = {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.ENOTDIR: "a part of that path is a file, choose another"}
REMEDIES[errno.ENOENT] = "check the path"
REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), REFUSED)
GO_ON = ("map", "series", "change", "chips", "train")  # commands that take up what an interrupted one did


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # km² where a locale has no ²
    words = _split_bbox(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    warnings.showwarning = _one_line  # type: ignore[assignment]
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()  # here, where a reader that has gone can still be told from a failure
        return status
    except KeyboardInterrupt:
        anew = getattr(arguments, "overwrite", False) and arguments.command != "chips"  # an unfinished set goes on
        again = " without --overwrite" if anew else ""
        goes_on = f"; the same command{again} goes on from here" if arguments.goes_on else ""
        _to_stderr(f"minemap: interrupted{goes_on}")
        return INTERRUPTED
    except BrokenPipeError:  # who reads our output has had enough, as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if arguments.debug:
            raise
        return _failed(error)


def _failed(error: BaseException) -> int:
    known = error if isinstance(error, MinemapError) else error.__cause__
    if isinstance(known, MinemapError):
        _to_stderr(f"minemap: {known}")
        return known.status
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = f" ({error.filename})" if error.filename else ""
        _to_stderr(f"minemap: {str(error.strerror).lower()}{where}: {REMEDIES[error.errno]}")
        return 1
    text = " ".join(str(error).split())[:300]
    _to_stderr(f"minemap: unexpected {type(error).__name__}: {text} (--debug shows where)")
    return 1


def _to_stderr(text: str) -> None:
    """A line on standard error. Whether anybody listens there must not decide what becomes of the work."""
    with suppress(OSError):  # a pipe that nobody reads, a full disk
        print(text, file=sys.stderr, flush=True)


def _one_line(message: Any, category: type[Warning], *_: Any) -> None:
    if issubclass(category, UserWarning):
        _to_stderr(f"minemap: warning: {message}")


def _split_bbox(words: list[str]) -> list[str]:
    """The numbers after `--bbox`, with commas or blanks between, as words that argparse takes for numbers.

    It takes what starts with "-" for an option, unless it looks as -63.45 does.
    """
    out: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, _, joined = word.partition("=")
        if name != "--bbox":
            out.append(word)
            continue
        out.append(name)
        rest = [joined, *rest] if joined else rest
        while rest and (numbers := _degrees(rest[0])):
            out += numbers
            rest.pop(0)
    return out


def _degrees(word: str) -> list[str]:
    """A word of numbers, apart and without exponents; none where it is something else."""
    try:
        return [f"{Decimal(part):f}" for part in word.replace(",", " ").split()]
    except InvalidOperation:
        return []


class Parser(argparse.ArgumentParser):
    """Errors in one line, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="minemap", description="Maps the footprint of mining from Sentinel-2 or Landsat.")
    top.add_argument("--version", action="version", version=f"minemap {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, about, add, run in _commands():
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        add(command)
        command.add_argument("--debug", action="store_true", help="show where an error came from")
        command.set_defaults(run=run, command=name, goes_on=name in GO_ON)
    return top


Add = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int | None]


def _commands() -> Iterator[tuple[str, str, Add, Run]]:
    from .training import commands as training

    yield "map", "map a place for a date into a Zarr store", _add_map, _map
    yield "series", "map a place year by year; a table and a chart of its areas", _add_series, _series
    yield "change", "what became mine, and what ceased to be, between two dates of a map", _add_change, _change
    yield "sample", "draw a stratified random sample of a map, to be labelled by eye", _add_sample, _sample
    yield "assess", "accuracy and area of a map from a labelled sample", _add_assess, _assess
    yield "info", "what is in a map: zones, dates, extent, model, how much was observed", _add_info, _info
    yield "export", "write a map as a page, a picture, a COG, polygons or a pyramid of levels", _add_export, _export
    yield "models", "the known models; one model's card", _add_models, _models
    yield "chips", "training chips from polygons and STAC", _add_chips, _chips
    yield (
        "train",
        "train a teacher, a student (MineC2FNet), a baseline or a network of change",
        training.add_train_arguments,
        training.run_train,
    )
    yield "evaluate", "a model's scores on labelled chips", training.add_evaluate_arguments, training.run_evaluate
    yield "demo", "make a synthetic scene, map it, write the map, the table and a picture", _add_demo, _demo


# --- map --------------------------------------------------------------------------------------------------------


def _add_map(p: argparse.ArgumentParser) -> None:
    _add_place(p, required=True)
    p.add_argument("--date", required=True, help="a year, a month, a day, or start/end")
    _add_map_options(p)


def _add_place(p: argparse.ArgumentParser, *, required: bool) -> None:
    p.add_argument(
        "--bbox", nargs="+", required=required, metavar="W S E N", help="degrees; W > E: across the antimeridian"
    )


def _add_map_options(p: argparse.ArgumentParser) -> None:
    """What `map` and `series` have in common."""
    p.add_argument("--out", required=True, help="the Zarr store to make, or to go on with")
    _add_scenes(p)
    p.add_argument("--aoi", metavar="FILE", help="clip to the polygons of a vector file")
    p.add_argument("--model", metavar="NAME|PATH", help="a known model or a checkpoint's folder")
    p.add_argument("--precision", choices=("bf16", "fp32"), help="of the network (what the processor has)")
    p.add_argument("--refresh", action="store_true", help="search again; else the scenes first chosen are used")
    p.add_argument("--keep-composite", action="store_true", help="keep the composite at 10 m as well")
    p.add_argument("--extent", choices=("bbox", "zone"), default="bbox", help="zone: any areas merge into it")
    p.add_argument("--cluster", metavar="KIND", help="local, gpu, or a scheduler's address (tcp://HOST:PORT)")
    p.add_argument("--workers", type=int, metavar="N", help="processes of --cluster local or gpu")
    p.add_argument("--chunk", type=int, choices=(512, 1024, 2048), default=2048, help="super-tile, px (2048)")
    p.add_argument("--dry-run", action="store_true", help="say what would be read, computed and written, and stop")
    p.add_argument("--overwrite", action="store_true", help="start anew: all places and years there are deleted")
    _add_output(p)


def _add_scenes(p: argparse.ArgumentParser) -> None:
    """Which scenes, and how they become an image."""
    p.add_argument("--stac", default="earth-search", help="earth-search, planetary-computer, a URL or an item file")
    p.add_argument("--collection", help="sentinel-2-l2a (default; any in an item file) or landsat-c2-l2")
    p.add_argument("--max-cloud", type=float, default=60.0, metavar="PERCENT", help="of an item (60)")
    p.add_argument("--max-scenes", type=int, default=24, metavar="N", help="acquisitions a cell of 20 km or so (24)")
    p.add_argument("--min-clear", type=int, default=3, metavar="N", help="with fewer clear looks: not observed (3)")
    p.add_argument("--months", help="of the year to use, as 6-9, 11-2 or 1,6,7")
    p.add_argument("--exclude", nargs="+", default=(), metavar="ID", help="items to leave out, as those unreadable")
    p.add_argument("--mask-scl", metavar="CLASSES", help="SCL classes that are no clear look (0,1,3,8,9,10)")
    p.add_argument("--no-rescue", action="store_true", help="do not keep stable bright ground that SCL calls cloud")
    p.add_argument("--reader", choices=("stackstac", "odc"), default="stackstac", help="stackstac (default)")


def _add_output(p: argparse.ArgumentParser) -> None:
    p.add_argument("--quiet", action="store_true", help="no progress and no summary")
    p.add_argument("--json", action="store_true", help="one JSON summary on standard output, nothing else there")


def _options(a: argparse.Namespace) -> dict[str, Any]:
    from .planning import Options

    options = {f.name: getattr(a, f.name) for f in fields(Options) if hasattr(a, f.name)}
    if a.mask_scl is not None:
        options["masked"] = _numbers(a.mask_scl.split(",") if a.mask_scl else [], int, "--mask-scl")
    return {**options, "rescue": not a.no_rescue, "exclude": tuple(a.exclude)}


def _numbers(words: list[str], kind: type, name: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(word) for word in words)
    except ValueError:
        raise InputError(f"{name} {' '.join(words)!r} is not a list of numbers") from None


def _map(a: argparse.Namespace) -> int:
    bbox = _numbers(a.bbox, float, "--bbox")
    from .mapping import map_area
    from .planning import plan

    if a.dry_run:
        from .report import estimate

        with _logged(a):
            _say(a, estimate(plan(bbox, a.date, a.out, **_options(a))))
        return 0
    with _progress(a) as progress:
        summary = map_area(
            bbox, a.date, a.out, cluster=a.cluster, workers=a.workers, progress=progress, **_options(a)
        )
    _say(a, summary, _told(summary))
    return 0


def _told(s: dict[str, Any]) -> str:
    return (
        f"{s['out']}: {s['km2_total']:,.2f} km² mapped, {s['km2_mine']:,.2f} km² of mine, "
        f"{s['km2_not_observed']:,.2f} km² not observed, {s['items']} items, {s['seconds']:.0f} s"
    )


def _say(a: argparse.Namespace, values: dict[str, Any], text: str | None = None) -> None:
    if a.json:
        print(json.dumps({k: None if v != v else v for k, v in values.items()}))  # JSON has no NaN
    elif not a.quiet:
        print(text or "\n".join(f"{name:>18}  {value}" for name, value in values.items()))


@contextmanager
def _progress(a: argparse.Namespace, unit: str = "super-tiles") -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, plain lines when piped, nothing with --quiet; on standard error."""
    with _logged(a), nullcontext() if a.quiet else _bar(unit) as progress:
        yield progress


@contextmanager
def _logged(a: argparse.Namespace) -> Iterator[None]:
    """What minemap logs, such as the address of a cluster's dashboard, on standard error; nothing with --quiet."""
    if a.quiet:
        yield
        return
    log, handler = logging.getLogger("minemap"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("minemap: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    if not sys.stderr.isatty():
        last = [-1]

        def line(done: int, total: int) -> None:
            if done != last[0]:
                _to_stderr(f"{done}/{total} {unit}")
                last[0] = done

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (unit, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# --- change -----------------------------------------------------------------------------------------------------


def _add_change(p: argparse.ArgumentParser) -> None:
    p.add_argument("map", metavar="MAP")
    p.add_argument("--before", required=True, metavar="DATE", help="one of the map's periods")
    p.add_argument("--after", required=True, metavar="DATE", help="a later one")
    p.add_argument("--out", required=True, help="the Zarr store to make, or to go on with")
    p.add_argument("--table", metavar="FILE", help="areas of each class by zone, .csv or .parquet")
    p.add_argument("--method", choices=("maps", "minenetcd"), default="maps", help="how to compare (maps)")
    p.add_argument("--model", metavar="NAME|PATH", help="of --method minenetcd: a known one or a checkpoint's folder")
    p.add_argument("--threshold", type=float, help="probability from which a pixel is mine, or has changed (model's)")
    p.add_argument("--cluster", metavar="KIND", help="local, gpu, or a scheduler's address (tcp://HOST:PORT)")
    p.add_argument("--workers", type=int, metavar="N", help="processes of --cluster local or gpu")
    p.add_argument("--overwrite", action="store_true", help="replace what was made with other parameters")
    _add_output(p)


def _change(a: argparse.Namespace) -> None:
    from .changes import change, told

    names = ("before", "after", "out", "table", "method", "model", "threshold", "cluster", "workers", "overwrite")
    with _progress(a) as progress:
        summary = change(a.map, **{name: getattr(a, name) for name in names}, progress=progress)
    _say(a, summary, told(summary))


# --- series -----------------------------------------------------------------------------------------------------


def _add_series(p: argparse.ArgumentParser) -> None:
    _add_place(p, required=False)
    p.add_argument("--years", required=True, help="2018-2024, 2018,2020 or 2019")
    p.add_argument("--table", metavar="FILE", help="areas by site and year, .csv or .parquet (else printed)")
    p.add_argument("--chart", metavar="FILE", help="a picture of the table, .png (beside the table)")
    p.add_argument("--sites", metavar="FILE", help="vector file, a row of the table each; without --bbox, the place")
    p.add_argument("--buffer", type=float, metavar="METRES", help="around each site; points need it")
    p.add_argument("--threshold", type=float, help="probability from which a pixel is mine (the model's)")
    p.add_argument("--consistency", choices=("hmm",), help="areas of years made consistent with each other")
    _add_map_options(p)
    p.set_defaults(extent="zone")


def _series(a: argparse.Namespace) -> None:
    from .annual import plan_years, series
    from .report import estimate

    bbox = _numbers(a.bbox, float, "--bbox") if a.bbox else None
    own = {name: getattr(a, name) for name in ("table", "chart", "sites", "buffer", "threshold", "consistency")}
    if a.dry_run:
        with _logged(a):
            plans = plan_years(bbox, a.years, a.out, **own, **_options(a))
        _say(a, {str(year): estimate(made) for year, made in plans.items()})
        return
    with _progress(a) as progress:
        frame = series(
            bbox, a.years, a.out, cluster=a.cluster, workers=a.workers, progress=progress, **own, **_options(a)
        )
    rows = json.loads(frame.to_json(orient="records"))  # NaN as null
    _say(a, {"out": a.out, "table": a.table, "rows": rows}, a.table or frame.to_string(index=False))


# --- sample and assess ------------------------------------------------------------------------------------------


def _add_sample(p: argparse.ArgumentParser) -> None:
    p.add_argument("map", metavar="MAP")
    p.add_argument("--out", required=True, metavar="FILE", help="points, .geojson; a table (.csv) beside it")
    p.add_argument("--n", type=int, default=500, help="points (500)")
    p.add_argument("--date", help="one of the map's periods (the last)")
    p.add_argument("--threshold", type=float, help="probability from which a pixel is mine (the model's)")
    p.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    _add_output(p)


def _sample(a: argparse.Namespace) -> None:
    from .assessment import sample

    told = sample(a.map, a.out, n=a.n, date=a.date, threshold=a.threshold, seed=a.seed)
    _say(a, told, f"{told['points']} and {told['table']}: {told['n']} points, to be labelled mine or not mine")


def _add_assess(p: argparse.ArgumentParser) -> None:
    p.add_argument("map", metavar="MAP")
    p.add_argument("points", metavar="POINTS", help="the labelled points or table of minemap sample")
    _add_output(p)


def _assess(a: argparse.Namespace) -> None:
    from .assessment import assess, told

    found = assess(a.map, a.points)
    _say(a, found, told(found))


# --- looking at maps and models ---------------------------------------------------------------------------------


def _add_info(p: argparse.ArgumentParser) -> None:
    p.add_argument("map", metavar="MAP")
    _add_output(p)


def _info(a: argparse.Namespace) -> None:
    from .report import describe, told

    about = describe(a.map)
    _say(a, about, told(about))


def _add_export(p: argparse.ArgumentParser) -> None:
    p.add_argument("map", metavar="MAP")
    p.add_argument(
        "out", metavar="OUT", help="ends in .html, .png, .tif, .zarr, .parquet, .geojson, .gpkg or .pmtiles"
    )
    p.add_argument("--date", help="one of the map's periods (the last; all of them in .html and .zarr)")
    p.add_argument("--threshold", type=float, help="probability from which a pixel is mine; a COG then holds classes")
    p.add_argument("--min-area", type=float, default=0.0, metavar="HECTARES", help="leave smaller polygons out")
    p.add_argument("--smooth", action="store_true", help="cut the corners of the pixels' steps off polygons")
    p.add_argument("--zone", help="the zone's group, for .tif and .png where the map has several")
    p.add_argument("--quiet", action="store_true", help="do not name the file")


def _export(a: argparse.Namespace) -> None:
    from .export import export
    from .page import export_page

    shape = {"threshold": a.threshold, "min_area": a.min_area, "smooth": a.smooth}
    if a.out.lower().endswith(".html"):
        if a.zone:
            raise InputError(f"zone {a.zone}: a page shows all zones; leave it out")
        out = export_page(a.map, a.out, date=a.date, **shape)
    else:
        out = export(a.map, a.out, date=a.date, zone=a.zone, **shape)
    if not a.quiet:
        print(out)


def _add_models(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", nargs="?", metavar="NAME|PATH")
    p.add_argument("--json", action="store_true", help="the recipe as JSON")


def _models(a: argparse.Namespace) -> None:
    from .report import card, model_list

    if a.name is None:
        names = model_list()
        print(json.dumps(names) if a.json else "\n".join(f"{n['name']:24} {n['about']}" for n in names))
        return
    about = card(a.name)
    print(json.dumps(about) if a.json else about["text"])


# --- chips ------------------------------------------------------------------------------------------------------


def _add_chips(p: argparse.ArgumentParser) -> None:
    p.add_argument("--polygons", required=True, metavar="FILE", help="outlines of mines, any vector file")
    p.add_argument("--layer", metavar="NAME", help="of a file that has several")
    p.add_argument("--date", required=True, help="a year, a month, a day, or start/end")
    p.add_argument("--out", required=True, help="a name that ends in .zarr or .npz")
    _add_scenes(p)
    p.add_argument("--size", type=int, default=256, metavar="PX", help="side of a chip, a power of 2 from 64 (256)")
    p.add_argument("--min-area", type=float, default=9.8, metavar="KM2", help="of a polygon (9.8); 0: fine outlines")
    p.add_argument("--negatives", type=int, default=0, metavar="N", help="chips nearby without a mine, at most (0)")
    p.add_argument("--val", type=float, default=0.2, metavar="SHARE", help="of the chips that validate (0.2)")
    p.add_argument("--seed", type=int, default=0, help="of the split and of the draw of negatives (0)")
    p.add_argument("--overwrite", action="store_true", help="replace a set of chips")
    _add_output(p)


def _chips(a: argparse.Namespace) -> None:
    from .training.chipping import ChipRule, make_chips

    rule = ChipRule(a.size, a.min_area, a.negatives, a.val, a.seed)
    with _progress(a, "chips") as progress:
        found = make_chips(a.polygons, a.date, a.out, layer=a.layer, rule=rule, progress=progress, **_options(a))
    text = (
        f"{found['out']}: {found['chips']} chips in {found['blocks']} blocks, {found['with_mine']} with mine, "
        f"{found['train']} to train, {found['val']} to validate, {found['unobserved']} places unobserved"
    )
    _say(a, found, text)


# --- demo -------------------------------------------------------------------------------------------------------


def _add_demo(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", default="demo", help="folder for the scene, the map, the table and the picture (demo)")
    p.add_argument("--seed", type=int, default=0, help="of the landscape (0)")
    p.add_argument("--size", type=int, default=1024, help="side of the scene in pixels of 10 m (1024)")
    p.add_argument("--year", type=int, default=2023, help="to make and map (2023)")
    _add_output(p)


def _demo(a: argparse.Namespace) -> None:
    from .showcase import run_demo

    with _progress(a) as progress:
        summary = run_demo(Path(a.out), seed=a.seed, size=a.size, year=a.year, progress=progress)
    _say(a, summary, summary.pop("text"))


if __name__ == "__main__":
    sys.exit(main())
