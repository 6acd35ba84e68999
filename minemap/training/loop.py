"""The training loop: one function, straight through, resumable after a kill.

Nothing random is carried from step to step: batches and dropout are drawn from (seed, step), so the saved state
is weights, optimiser and a few counters. A run that was killed goes on from its last epoch and ends with the
same weights, bit for bit (CPU, float32, same number of threads).
"""

from __future__ import annotations

import json
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from minemap import models
from minemap.checkpoint import Checkpoint, Recipe, load_model, save, settle
from minemap.errors import InputError
from minemap.inference import keep_freed_memory
from minemap.models.fill import fill_absent
from minemap.models.minec2fnet import DEFAULT_ENCODER, MineC2FNet
from minemap.models.minenetcd import MineNetCD
from minemap.training import metrics
from minemap.training.batches import make_batch
from minemap.training.chips import IGNORE, Chips, away_from, check_leakage, draw_blocks, load_chips, load_pairs
from minemap.training.coarse import COARSENINGS, coarsen_chips
from minemap.training.config import TrainConfig, as_json
from minemap.training.continual import attention_loss, select_replay
from minemap.training.encoders import check_encoder, load_imagenet
from minemap.training.evaluate import QUICK, predict_chips
from minemap.training.losses import LossWeights, distillation_loss, student_loss

# Surface reflectance of the decided pixels of mines6's training split: mean and standard deviation by band.
MEAN = {"blue": 0.066, "green": 0.099, "red": 0.104, "nir": 0.262, "swir16": 0.208, "swir22": 0.128, "ndvi": 0.5}
STD = {"blue": 0.053, "green": 0.069, "red": 0.097, "nir": 0.089, "swir16": 0.103, "swir22": 0.093, "ndvi": 0.3}
THRESHOLD_RULE = "mapped area equals true area on the held-out blocks of the training split"
T = TypeVar("T")
STATE, LOG, MODEL = "state.pt", "metrics.jsonl", "model"


def train(config: TrainConfig) -> Checkpoint:
    """Train one network and return its best checkpoint, in `out/model`; goes on where a killed run stopped."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"output {out} is a file: give the name of a folder")
    _prepare_torch(config)

    # Data
    sets, holdout = load_sets(config)
    samples = config.epoch_samples or sum(len(s) for s in sets)
    steps = max(1, samples // config.batch)

    # Network, teacher, optimiser
    torch.manual_seed(config.seed)
    recipe = replace(make_recipe(config), resolution=_resolution(sets))
    teacher = _teacher(config, recipe)
    network = _move(start_network(config, recipe, teacher), config)
    replay = load_replay(config, teacher, recipe)
    averaged = _averaged(network, config)
    optimiser = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    out.mkdir(parents=True, exist_ok=True)
    settle(out / MODEL)
    state = {"epoch": 0, "best": -1.0, "best_epoch": 0, "since": 0, "factor": 1.0}
    _resume(out, config, state, network, averaged, optimiser)

    while state["epoch"] < config.epochs and not (config.stop and _age(state) >= config.stop):
        # One epoch
        epoch, losses = int(state["epoch"]), []
        _set_training(network, config)
        numbers = track(range(epoch * steps, (epoch + 1) * steps), f"epoch {epoch}", disable=config.quiet)
        batches = ahead(partial(make_batch, sets, config, recipe, replay=replay), numbers, config.device)
        for step, batch in batches:
            torch.manual_seed(config.seed * 1_000_003 + step)
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * rate(config, state["factor"], step / steps)
            image, target = (t.to(config.device) for t in batch)
            loss = step_loss(network, teacher, image, target, config)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), config.clip)
            optimiser.step()
            if averaged is not None:
                averaged.update_parameters(network)
            losses.append(loss.item())

        # Validation, schedule, log
        judged = network if averaged is None else averaged.module
        chooses = config.keep == "best" or epoch + 1 == config.epochs
        scores = validate(judged, recipe, holdout, config) if chooses else {}
        better = config.keep == "last" or scores.get("miou", float(epoch)) > state["best"]
        _advance(state, config, better=better, score=scores.get("miou", float(epoch)))
        _log(out, {"epoch": epoch, "loss": float(np.mean(losses)), **scores})

        # Checkpoint
        if better:
            save(out / MODEL, judged, recipe)
        _store(out, config, state, network, averaged, optimiser)
    return finish(load_model(out / MODEL), holdout, config)


def ahead(
    make: Callable[[int], T], numbers: Iterable[int], device: str, *, count: int = 3
) -> Iterator[tuple[int, T]]:
    """Each number with what is made for it; for a GPU the next ones are made while it works."""
    if device == "cpu":
        yield from ((number, make(number)) for number in numbers)
        return
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending: deque[tuple[int, Future[T]]] = deque()
        for number in numbers:
            pending.append((number, pool.submit(make, number)))
            if len(pending) > count:
                done, future = pending.popleft()
                yield done, future.result()
        yield from ((number, future.result()) for number, future in pending)


def finish(checkpoint: Checkpoint, holdout: list[Chips], config: TrainConfig) -> Checkpoint:
    """Choose the threshold on the first holdout set, write its scores into the recipe."""
    if not holdout or len(set(np.unique(holdout[0].mask)) - {IGNORE}) < 2:
        if config.holdout:
            text = (
                "no threshold is chosen, 0.5 stays: the chips held out do not hold both mine and other land (holdout)"
            )
            warnings.warn(text, stacklevel=2)
        return checkpoint
    probability = predict_chips(checkpoint.network().to(config.device), checkpoint.recipe, holdout[0])
    threshold = round(metrics.area_unbiased_threshold(probability, holdout[0].mask), 3)
    report = metrics.report(probability, holdout[0].mask, threshold)
    recipe = replace(
        checkpoint.recipe,
        threshold=threshold,
        threshold_rule=THRESHOLD_RULE,
        metrics=checkpoint.recipe.metrics | {"holdout": report},
    )
    return save(checkpoint.path, checkpoint.network(), recipe)


def load_sets(config: TrainConfig) -> tuple[list[Chips], list[Chips]]:
    """Training and holdout rows of every chip file, by block, leakage checked.

    Files may show the same places: what lies near a held-out chip of another file is left out.
    """
    if not config.data:
        raise InputError("no chip files: give at least one with --chips")
    pairs = [_hold_out(path, _rows(path, config, config.rows, config.coarse), config) for path in config.data]
    sets, holdouts = [training for training, _ in pairs], [holdout for _, holdout in pairs]
    for i, j in permutations(range(len(pairs)), 2):
        sets[i] = away_from(sets[i], holdouts[j])
    if not any(len(chips) for chips in sets):
        files, kind = ", ".join(config.data), f"split {config.split!r}, rows {config.rows!r}"
        raise InputError(f"no chip to learn from in {files}, {kind}: take another split (--set split=null: all)")
    return sets, holdouts


def _resolution(sets: list[Chips]) -> float:
    found = sorted({chips.resolution for chips in sets})
    if len(found) > 1:
        raise InputError(f"chips of {found[0]:g} and {found[1]:g} m: a network is trained at one resolution")
    return found[0]


def load_replay(config: TrainConfig, teacher: nn.Module | None, recipe: Recipe) -> list[Chips]:
    """Chips outside the fine blocks that replay draws from, with labels as coarse as the teacher's were."""
    if not config.replay or teacher is None or config.teacher is None:
        return []
    coarse = load_model(config.teacher).recipe.training["coarse"]
    rest = [_rows(path, config, "rest", coarse) for path in config.data]
    return [select_replay(chips, teacher, recipe) for chips in rest]


def _rows(path: str, config: TrainConfig, rows: str, coarse: str) -> Chips:
    load = load_pairs if config.architecture == "minenetcd" else load_chips
    chips = load(path).split(config.split).decided()
    if rows != "all":
        chips = chips.where(draw_blocks(chips, config.fine_share, config.fine_seed) == (rows == "fine"))
    return chips if coarse == "none" else coarsen_chips(chips, COARSENINGS[coarse])


def _hold_out(path: str, chips: Chips, config: TrainConfig) -> tuple[Chips, Chips]:
    if not config.holdout:
        return chips, chips.where(np.zeros(len(chips), bool))
    draw = config.holdout, config.holdout_seed, config.holdout_fold
    held = draw_blocks(chips, *draw)
    if config.architecture == "minenetcd":  # the blocks that a network of single dates with this holdout has not seen
        single = load_chips(path).split(config.split).decided()
        blocks = single.column("block")[draw_blocks(single, *draw)]
        held = np.isin(chips.column("block"), blocks)
    training, holdout = chips.where(~held), chips.where(held)
    check_leakage(training, holdout)
    return training, holdout


def make_recipe(config: TrainConfig) -> Recipe:
    """The recipe of a run; threshold and metrics are filled in afterwards (see training/card.py)."""
    names = (*config.bands, *config.derived)
    return Recipe(
        name=config.name,
        architecture=config.architecture,
        options=network_options(config),
        bands=config.bands,
        derived=config.derived,
        mean=tuple(MEAN[n] for n in names),
        std=tuple(STD[n] for n in names),
        classes=("gain",) if config.architecture == "minenetcd" else ("mine",),
        threshold=0.5,
        training=_history(config),
    )


def _history(config: TrainConfig) -> dict[str, Any]:
    """The configuration, with the names of the data for their paths and the histories of what it builds on."""
    values = {k: v for k, v in as_json(config).items() if k not in ("out", "quiet", "threads")}
    before = {k: load_model(values[k]).recipe.training for k in ("teacher", "start") if values[k]}
    return values | {"data": ["/".join(Path(p).resolve().parts[-2:]) for p in config.data]} | before


def network_options(config: TrainConfig) -> dict[str, Any]:
    """Keyword arguments of the network's constructor."""
    options: dict[str, Any] = {"in_channels": len(config.bands) + len(config.derived)}
    if config.architecture == "minec2fnet":
        options |= {k: getattr(config, k) for k in ("gated_fusion", "cbam", "refinement", "steps", "detail")}
    if config.architecture == "minenetcd":
        options["change_fft"] = config.change_fft
    if (encoder := _encoder(config)) is not None:
        check_encoder(encoder)
        options["encoder_name" if config.architecture in models.BASELINES else "encoder"] = encoder
    return options


def _encoder(config: TrainConfig) -> str | None:
    """The encoder asked for, or that of the network that training goes on from."""
    before = config.start or config.teacher
    if config.encoder is not None or before is None:
        return config.encoder
    options = load_model(before).recipe.options
    return options.get("encoder", options.get("encoder_name"))


def start_network(config: TrainConfig, recipe: Recipe, teacher: nn.Module | None) -> nn.Module:
    """The network as training starts: random, from ImageNet, or from a network before it."""
    network = models.build(config.architecture, **recipe.options)
    if config.imagenet and config.start is None and (teacher is None or config.fresh):
        name = _encoder(config) or models.BASELINES.get(config.architecture, ("", DEFAULT_ENCODER))[1]
        load_imagenet(network.encoder, name, (*recipe.bands, *recipe.derived))
    before = None if config.start is None else load_model(config.start)
    if before is not None:
        _check_input("start", before, recipe)
    if before is not None and isinstance(network, MineNetCD):
        network.start_from(before.network())
    elif before is not None:
        _go_on_from(network, before, config)
    elif isinstance(network, MineC2FNet):
        # Without a teacher, its own encoder as it starts is the frozen one
        network.start_from(teacher or network, fresh=config.fresh or teacher is None)
    elif teacher is not None:
        if config.architecture != "fpn":
            raise InputError(f"a {config.architecture} does not start from a teacher, which is an fpn: leave it out")
        network.load_state_dict(teacher.state_dict())
    return network


def _check_input(role: str, before: Checkpoint, recipe: Recipe) -> None:
    """Raises InputError unless a network before this one takes the same channels, scaled alike."""
    theirs, ours = (", ".join((*r.bands, *r.derived)) for r in (before.recipe, recipe))
    if theirs != ours:
        raise InputError(f"{role} {before.path} sees {theirs}, not {ours}: take one of the same bands in this order")
    if (before.recipe.mean, before.recipe.std) != (recipe.mean, recipe.std):
        raise InputError(f"{role} {before.path} scales its bands otherwise than training does: take another")


def _go_on_from(network: nn.Module, before: Checkpoint, config: TrainConfig) -> None:
    """The weights of the network before; parts that it lacks start as the identity. Raises InputError."""
    if before.recipe.architecture != config.architecture:
        raise InputError(f"start {config.start} is a {before.recipe.architecture}, not a {config.architecture}")
    try:
        left = network.load_state_dict(before.network().state_dict(), strict=False).unexpected_keys
    except RuntimeError as error:  # other shapes
        raise InputError(f"start {config.start} has other layers: leave encoder, bands and derived to it") from error
    if left:
        parts = sorted({key.split(".")[0] for key in left})
        raise InputError(
            f"start {config.start} has parts that this network lacks ({', '.join(parts)}): switch them on"
        )


def _teacher(config: TrainConfig, recipe: Recipe) -> nn.Module | None:
    if config.teacher is None:
        return None
    checkpoint = load_model(config.teacher)
    if checkpoint.recipe.architecture != "fpn":
        raise InputError(f"teacher {config.teacher} is a {checkpoint.recipe.architecture}: it must be an fpn")
    _check_input("teacher", checkpoint, recipe)
    own = checkpoint.recipe.options.get("encoder_name", DEFAULT_ENCODER)
    if config.start is None and config.encoder not in (None, own):
        raise InputError(f"encoder {config.encoder} is not the teacher's: leave it out, and {own} is taken")
    return _move(checkpoint.network(), config)


def _move(network: nn.Module, config: TrainConfig) -> nn.Module:
    return network.to(config.device).to(memory_format=torch.channels_last)


def step_loss(network: nn.Module, teacher: Any, image: Tensor, target: Tensor, config: TrainConfig) -> Tensor:
    """L_student + lambda L_distill of one batch (and, for LwM, the attention's)."""
    image = image.contiguous(memory_format=torch.channels_last)
    image = fill_absent(image) if isinstance(network, MineC2FNet) else image
    features, theirs, attention = None, None, None
    with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bf16"):
        if teacher is not None and config.selection != "none":
            with torch.no_grad():
                features = teacher.encoder(image)
                theirs = teacher.segmentation_head(teacher.decoder(features))
        shared = _holds_teacher(network) and config.start is None  # what goes on has a frozen encoder of its own
        logits = network(image, features) if shared else network(image)
        if teacher is not None and config.attention:
            attention = config.attention * attention_loss(network, teacher, image)
    weights = LossWeights(config.bce, config.dice, config.ssim, config.boundary)
    parts = [student_loss(logits, target, weights, config.smoothing), attention]
    if theirs is not None:
        selection, temperature = config.selection, config.temperature
        distilled = distillation_loss(logits, theirs, target, selection=selection, temperature=temperature)
        parts.append(config.distill * distilled)
    return torch.stack([part for part in parts if part is not None]).sum()


def _set_training(network: nn.Module, config: TrainConfig) -> None:
    network.train()
    # A change network's decoder has no statistics yet that could be kept
    part = network.encoder if isinstance(network, MineNetCD) else network
    for module in part.modules():
        if config.freeze_norm and isinstance(module, nn.BatchNorm2d):
            module.eval()


def _holds_teacher(network: nn.Module) -> bool:
    return isinstance(network, MineC2FNet) and network.teacher_encoder is not None


def rate(config: TrainConfig, factor: float, epoch: float) -> float:
    """Share of the learning rate at a moment (epochs, fractional): linear warm-up, then plateau or cosine."""
    warm = min(1.0, (epoch + 1e-3) / config.warmup) if config.warmup else 1.0
    if config.schedule == "plateau":
        return warm * factor
    progress = max(0.0, epoch - config.warmup) / max(1, config.epochs - config.warmup)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def validate(network: nn.Module, recipe: Recipe, holdout: list[Chips], config: TrainConfig) -> dict[str, float]:
    """Scores of the holdout, in per cent: the first set's as they are, the others' with their number."""
    found: dict[str, float] = {}
    for i, chips in enumerate(holdout):
        if len(chips):
            probability = predict_chips(network, recipe, chips, precision=config.precision, seen=QUICK)
            report = metrics.report(probability, chips.mask, recipe.threshold)
            found |= {key if i == 0 else f"{key}_{i}": value for key, value in report.items()}
    return found


def _age(state: dict[str, Any]) -> int:
    return state["epoch"] - state["best_epoch"] - 1


def _advance(state: dict[str, Any], config: TrainConfig, *, better: bool, score: float) -> None:
    """Count the epoch; halve the rate after `patience` epochs without a better score, none of them a warm-up's."""
    state["since"] = 0 if better or state["epoch"] < config.warmup else state["since"] + 1
    if better:
        state["best"], state["best_epoch"] = score, state["epoch"]
    if state["since"] >= config.patience:
        state["factor"], state["since"] = state["factor"] / 2, 0
    state["epoch"] += 1


def _averaged(network: nn.Module, config: TrainConfig) -> AveragedModel | None:
    if not config.ema:
        return None
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)


def _store(
    out: Path,
    config: TrainConfig,
    state: dict[str, Any],
    network: nn.Module,
    averaged: AveragedModel | None,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Write the state beside its place and rename it, so that a kill leaves the old or the new one."""
    draft = out / f".{STATE}"
    average = None if averaged is None else averaged.state_dict()
    torch.save(
        {
            "config": _identity(config),
            "state": state,
            "network": network.state_dict(),
            "averaged": average,
            "optimiser": optimiser.state_dict(),
        },
        draft,
    )
    draft.replace(out / STATE)


def _resume(
    out: Path,
    config: TrainConfig,
    state: dict[str, Any],
    network: nn.Module,
    averaged: AveragedModel | None,
    optimiser: torch.optim.Optimizer,
) -> None:
    if not (out / STATE).exists():
        return _trim_log(out, 0)
    stored = torch.load(out / STATE, weights_only=True, map_location=config.device)
    if stored["config"] != _identity(config):
        raise InputError(f"{out} holds a run with another configuration: choose another --out or remove it")
    state |= stored["state"]
    network.load_state_dict(stored["network"])
    optimiser.load_state_dict(stored["optimiser"])
    if averaged is not None:
        averaged.load_state_dict(stored["averaged"])
    _trim_log(out, state["epoch"])


def _identity(config: TrainConfig) -> str:
    """What must be equal for a run to go on: all but where and how fast it runs."""
    values = {k: v for k, v in as_json(config).items() if k not in ("out", "threads", "quiet", "device")}
    return json.dumps(values, sort_keys=True)


def _log(out: Path, row: dict[str, float]) -> None:
    with (out / LOG).open("a") as file:
        file.write(json.dumps(row) + "\n")
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(out)) as writer:
            for key, value in row.items():
                writer.add_scalar(key, value, int(row["epoch"]))


def _trim_log(out: Path, epoch: int) -> None:
    """Drop log lines of an epoch that was logged but not stored before the kill."""
    if not (out / LOG).exists():
        return
    lines = (out / LOG).read_text().splitlines()[:epoch]  # a line an epoch; the last may be half written
    draft = out / f".{LOG}"
    draft.write_text("".join(f"{line}\n" for line in lines))
    draft.replace(out / LOG)


def check_device(device: str) -> None:
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise InputError(f"device {device!r} is not here: give cpu, or cuda where torch finds a GPU")


def _prepare_torch(config: TrainConfig) -> None:
    check_device(config.device)
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    keep_freed_memory(2**30, 2**31 - 1)
