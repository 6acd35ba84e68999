"""The loop: it learns, it resumes bit for bit, the teacher stays what it was, every variant runs."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minemap.checkpoint import Checkpoint, load_model, save
from minemap.errors import InputError
from minemap.sentinel2 import BANDS
from minemap.training import commands, continual, metrics
from minemap.training.chips import load_chips
from minemap.training.config import TrainConfig, make_config, read_values
from minemap.training.evaluate import MARGIN, QUICK, evaluate, padding, predict_chips, predict_mosaics
from minemap.training.loop import STATE, ahead, finish, load_sets, make_recipe, rate, start_network, train

TINY = {"epochs": 2, "batch": 4, "sizes": [32], "precision": "fp32", "threads": 1, "learning_rate": 1e-3}
TINY |= {"encoder": "tu-lcnet_050"}  # the default is several times as slow


@pytest.fixture(scope="module")
def chips(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve places of 24 px whose bright patches are the mines, a block each."""
    folder = tmp_path_factory.mktemp("chips")
    rng = np.random.default_rng(0)
    mask = np.kron(rng.integers(0, 2, (12, 3, 3)), np.ones((8, 8), int))
    image = 500 + 2500 * mask[:, None] + rng.integers(0, 300, (12, 6, 24, 24))
    np.savez(folder / "chips.npz", image=image.astype(np.int16), mask=mask.astype(np.uint8), bands=np.array(BANDS))
    rows = [f"p{i},b{i},train,{'odd' if i % 2 else 'even'}" for i in range(12)]
    (folder / "chips.csv").write_text("\n".join(["id,block,split,kind", *rows]) + "\n")
    return str(folder / "chips.npz")


@pytest.fixture(scope="module")
def teacher(chips: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("teacher")
    return str(train(make_config({**TINY, "out": str(out), "data": [chips], "architecture": "fpn"})).path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", 0),
        ("seed", -1),
        ("learning_rate", float("nan")),
        ("temperature", 0.0),
        ("scatter_cell", -5),
        ("warmup", -3),
        ("holes", 7.0),
        ("ema", 1.5),
        ("fine_share", 2.0),
        ("holdout_fold", 5),
        ("dice", -1.0),
        ("blend", 2.0),
        ("replay", 1.5),
        ("attention", -1.0),
    ],
)
def test_values_out_of_range(key: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"training option {key}=.*: (it is|with holdout|give)"):
        make_config({"out": "x", key: value})


def _config(chips: str, out: Path, **changes: object) -> TrainConfig:
    return make_config({**TINY, "out": str(out), "data": [chips], **changes})


def test_it_learns(chips: str, tmp_path: Path) -> None:
    seen = {"sizes": [QUICK], "affine": 0.0}  # windows as those that it is judged in
    config = _config(chips, tmp_path, architecture="fpn", epochs=8, epoch_samples=40, schedule="cosine", **seen)
    checkpoint = train(config)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    some = load_chips(chips)
    probability = predict_chips(checkpoint.network(), checkpoint.recipe, some, seen=QUICK)  # as it was trained
    assert metrics.report(probability, some.mask, 0.5)["accuracy"] > 70  # half the pixels are mine
    assert checkpoint.recipe.metrics["holdout"]["images"] == 2
    assert 0 < checkpoint.recipe.threshold < 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_come_in_their_order(device: str) -> None:
    started = []

    def make(number: int) -> int:
        started.append(number)
        return -number

    batches = ahead(make, range(9), device, count=3)
    assert next(batches) == (0, 0)
    assert len(started) == 1 if device == "cpu" else len(started) <= 4  # no more than are needed soon
    assert list(batches) == [(n, -n) for n in range(1, 9)]


def test_what_does_not_fit_together_is_refused(chips: str, teacher: str, tmp_path: Path) -> None:
    student = {"start": teacher, "selection": "none"}
    with pytest.raises(InputError, match="is a fpn, not a minec2fnet"):
        train(_config(chips, tmp_path / "a", **student))
    with pytest.raises(InputError, match="parts that this network lacks"):
        train(_config(chips, tmp_path / "b", start="south-america-2026", selection="none", encoder=None))
    with pytest.raises(InputError, match="has other layers"):
        train(_config(chips, tmp_path / "b", start="south-america-2026", selection="none"))
    turned = {"bands": ["red", "green", "blue", "nir", "swir16", "swir22"], "architecture": "fpn"}
    for role in ("start", "teacher"):
        with pytest.raises(InputError, match=f"{role} .* sees blue, green, .* not red, green"):
            train(_config(chips, tmp_path / "b", **turned, **{role: teacher}))
    own = load_model(teacher)
    other = save(tmp_path / "other", own.network(), replace(own.recipe, mean=(0.1,) * 6))
    with pytest.raises(InputError, match="scales its bands otherwise"):
        train(_config(chips, tmp_path / "b", architecture="fpn", start=str(other.path)))
    with pytest.raises(InputError, match="a unet does not start from a teacher"):
        train(_config(chips, tmp_path / "c", architecture="unet", teacher=teacher, selection="none"))
    with pytest.raises(InputError, match=r"no chip to learn from in .*split 'test'"):
        train(_config(chips, tmp_path / "d", split="test"))
    with pytest.raises(InputError, match="derived"):
        _config(chips, tmp_path, bands=["blue", "green", "red"], derived=["ndvi"])


def test_no_threshold_from_chips_of_one_class(chips: str, tmp_path: Path) -> None:
    config = _config(chips, tmp_path, architecture="fpn")
    before, (held,) = load_model("demo-2026"), load_sets(config)[1]
    with pytest.warns(UserWarning, match="no threshold is chosen"):
        assert finish(before, [replace(held, mask=np.zeros_like(held.mask))], config) is before


def test_a_line_of_the_log_that_was_cut_off_is_dropped(chips: str, tmp_path: Path) -> None:
    config = _config(chips, tmp_path, architecture="fpn", epochs=1, epoch_samples=4, holdout=0.0, schedule="cosine")
    train(config)
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + '{"epoch": 1, "lo')
    train(config)
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_student_keeps_its_teacher_bit_for_bit(chips: str, teacher: str, tmp_path: Path) -> None:
    train(_config(chips, tmp_path, teacher=teacher, ema=0.5))
    state = torch.load(tmp_path / STATE, weights_only=True)
    for key, value in load_model(teacher).network().encoder.state_dict().items():
        assert torch.equal(state["network"][f"teacher_encoder.{key}"], value)
        assert torch.equal(state["averaged"][f"module.teacher_encoder.{key}"], value)


@pytest.mark.parametrize("selection", ["none", "standard", "image", "pixel", "hybrid"])
def test_every_selection_runs(chips: str, teacher: str, tmp_path: Path, selection: str) -> None:
    train(_config(chips, tmp_path, teacher=teacher, selection=selection, epochs=1, epoch_samples=4))


@pytest.mark.parametrize("name", sorted(commands.BASELINES))
def test_every_baseline_runs(chips: str, teacher: str, tmp_path: Path, name: str) -> None:
    needs = name in commands.NEED_TEACHER
    options = {"epochs": 1, "epoch_samples": 4, "rows": "fine", "fine_share": 0.5}
    checkpoint = train(
        _config(chips, tmp_path, teacher=teacher if needs else None, **{**commands.BASELINES[name], **options})
    )
    assert checkpoint.network()(torch.zeros(1, 6, 64, 64)).shape == (1, 1, 64, 64)


def test_ndvi_and_few_bands_train(chips: str, tmp_path: Path) -> None:
    options = {"bands": ["blue", "green", "red", "nir"], "derived": ["ndvi"], "architecture": "fpn", "epochs": 1}
    checkpoint = train(_config(chips, tmp_path, **options))
    assert checkpoint.recipe.options["in_channels"] == 5
    assert evaluate(checkpoint, load_chips(chips))["images"] == 12


def test_a_network_is_of_its_chips_resolution(chips: str, tmp_path: Path) -> None:
    with np.load(chips) as file:
        np.savez(tmp_path / "chips.npz", **file, parameters=np.array('{"resolution": 30.0}'))
    (tmp_path / "chips.csv").write_bytes(Path(chips).with_suffix(".csv").read_bytes())
    coarser, options = str(tmp_path / "chips.npz"), {"architecture": "fpn", "epochs": 1, "epoch_samples": 4}
    assert train(_config(coarser, tmp_path / "out", **options)).recipe.resolution == 30
    with pytest.raises(InputError, match="10 and 30 m"):
        train(_config(chips, tmp_path / "both", **options, data=[chips, coarser]))


RUN = "import sys, json; from minemap.training.config import make_config; from minemap.training.loop import train; "
RUN += "train(make_config(json.loads(sys.argv[1])))"


def test_killed_and_resumed_equals_never_killed(chips: str, teacher: str, tmp_path: Path) -> None:
    options = {"epochs": 3, "warmup": 1, "ema": 0.9, "blend": 0.5, "jitter": 0.2, "teacher": teacher}
    whole = train(_config(chips, tmp_path / "whole", **options))
    values = {**TINY, **options, "out": str(tmp_path / "killed"), "data": [chips]}
    command = [sys.executable, "-c", RUN, json.dumps(values)]
    process = subprocess.Popen(command)
    log = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 1):
        time.sleep(0.02)
    time.sleep(np.random.default_rng().uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was not done yet
    subprocess.run(command, check=True)
    assert log.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    killed = load_model(tmp_path / "killed" / "model")
    ours, theirs = (load_file(c.path / "weights.safetensors") for c in (killed, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    states = [torch.load(tmp_path / run / STATE, weights_only=True)["network"] for run in ("killed", "whole")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_another_configuration_is_refused(chips: str, tmp_path: Path) -> None:
    config = _config(chips, tmp_path, architecture="fpn", epochs=1, epoch_samples=4)
    train(config)
    with pytest.raises(InputError, match="another configuration"):
        train(replace(config, seed=1))


def test_few_fine_rows_and_the_rest_are_apart(chips: str) -> None:
    options = {"data": (chips,), "fine_share": 0.5, "holdout": 0.0, "out": ""}
    fine, rest = (load_sets(TrainConfig(rows=r, **options))[0][0] for r in ("fine", "rest"))
    assert len(fine) == len(rest) == 6
    assert not set(fine.column("id")) & set(rest.column("id"))


def test_places_held_out_of_one_file_are_not_learned_from_in_another(tmp_path: Path) -> None:
    """Two years of the same places, of which the second lacks one: the draws of their blocks differ."""
    files = []
    for year, places in (("2021", range(12)), ("2023", range(1, 12))):
        (tmp_path / year).mkdir()
        n = len(places)
        image, mask = np.full((n, 6, 24, 24), 900, np.int16), np.zeros((n, 24, 24), np.uint8)
        np.savez(tmp_path / year / "chips.npz", image=image, mask=mask, bands=np.array(BANDS))
        rows = [f"p{i},b{i},train,{-60 + i / 5},3" for i in places]
        (tmp_path / year / "chips.csv").write_text("\n".join(["id,block,split,lon,lat", *rows]) + "\n")
        files.append(str(tmp_path / year / "chips.npz"))
    sets, held = load_sets(TrainConfig(data=tuple(files), holdout=0.4, out=""))
    learned, kept = ({name for s in some for name in s.column("id")} for some in (sets, held))
    assert kept and learned and not learned & kept
    assert set(held[0].column("id")) != set(held[1].column("id"))  # else this shows nothing


def test_coarse_labels_are_used(chips: str) -> None:
    options = {"data": (chips,), "holdout": 0.0, "out": ""}
    fine, coarse = (load_sets(TrainConfig(coarse=c, **options))[0][0] for c in ("none", "blobs"))
    assert (coarse.mask == 1).sum() > (fine.mask == 1).sum()


def test_rate_warms_up_then_follows_its_schedule() -> None:
    config = TrainConfig(out="", warmup=5, epochs=25, schedule="cosine")
    assert rate(config, 1.0, 2.5) == pytest.approx(0.5, abs=1e-3)
    assert rate(config, 1.0, 15) == pytest.approx(0.5)
    assert rate(config, 1.0, 25) == pytest.approx(0.0)
    assert rate(replace(config, schedule="plateau"), 0.25, 20) == 0.25


def test_prediction_puts_pixels_back_where_they_were(chips: str) -> None:
    """A network that returns its first channel must give the chip's own blue band back."""
    config = TrainConfig(out="")
    recipe, some = make_recipe(config), load_chips(chips)
    blue = torch.nn.Conv2d(6, 1, 1, bias=False)
    blue.weight.data = torch.eye(6)[:1, :, None, None]
    answer = predict_chips(blue, recipe, some)
    expected = 1 / (1 + np.exp(-recipe.normalise(torch.from_numpy(some.image))[:, 0].numpy()))
    assert np.allclose(answer, expected, atol=1e-5)
    assert np.allclose(predict_mosaics(blue, recipe, some, side=3), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "seen", "total"),
    [(48, 96, 96), (448, 96, 512), (24, 96, 96), (50, 96, 128), (48, 320, 320), (448, 320, 512)],
)
def test_padding(size: int, seen: int, total: int) -> None:
    before, after = padding(size, 32, seen)
    assert before + size + after == total
    assert min(before, after) >= MARGIN


def test_attention_map_against_autograd_by_hand(teacher: str) -> None:
    torch.manual_seed(0)
    network, image = load_model(teacher).network().double(), torch.randn(1, 6, 64, 64, dtype=torch.float64)
    heat = continual.attention_map(network, image, differentiable=False)
    deepest = network.encoder(image)[-1]
    others = network.encoder(image)[:-1]
    total = lambda f: float(network.segmentation_head(network.decoder([*others, f])).sum())  # noqa: E731
    weights = torch.zeros(deepest.shape[1], dtype=torch.float64)
    for c in range(0, deepest.shape[1], 128):  # central differences on a few channels
        step = torch.zeros_like(deepest)
        step[0, c] = 1e-5
        weights[c] = (total(deepest + step) - total(deepest - step)) / 2e-5 / deepest[0, 0].numel()
    image.requires_grad_(False)
    leaf = deepest.detach().requires_grad_()
    network.segmentation_head(network.decoder([*others, leaf])).sum().backward()
    exact = leaf.grad.mean((2, 3))[0]
    assert torch.allclose(weights[::128], exact[::128], rtol=0.1, atol=1e-2)
    expected = (exact[None, :, None, None] * deepest).sum(1).relu().flatten(1)
    assert torch.allclose(heat.double(), expected / (expected.norm() + 1e-6), atol=1e-4)


def _arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands.add_train_arguments(parser)
    return parser.parse_args(words)


def test_train_arguments(tmp_path: Path) -> None:
    words = ["--chips", "a.npz", "b.npz", "--out", "o"]
    student = commands.train_config(
        _arguments("student", *words, "--teacher", "t", "--set", "epochs=3", "bands=red,nir")
    )
    assert (student.architecture, student.epochs, student.bands) == ("minec2fnet", 3, ("red", "nir"))
    assert student.data == ("a.npz", "b.npz")
    alone = commands.train_config(_arguments("student", *words, "--set", "gated_fusion=false", "selection=none"))
    assert alone.teacher is None
    teacher = commands.train_config(_arguments("teacher", *words))
    assert (teacher.architecture, teacher.coarse, teacher.dice) == ("fpn", "blobs", 0.0)
    (tmp_path / "c.json").write_text('{"batch": 5}')
    assert commands.train_config(_arguments("baseline", *words, "--config", str(tmp_path / "c.json"))).batch == 5


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["student"], "needs --teacher"),
        (["student", "--set", "gated_fusion=false"], "needs --teacher"),
        (["baseline", "--name", "lwf"], "needs --teacher"),
        (["teacher", "--set", "epochs"], "KEY=VALUE"),
        (["teacher", "--set", "data=b.npz"], "use --chips instead"),
        (["teacher", "--set", "surprise=1"], "no training option 'surprise': choose among"),
        (["teacher", "--set", "schedule=steps"], "schedule=.*: give cosine, or plateau"),
        (["teacher", "--config", "absent.json"], "cannot be read"),
    ],
)
def test_impossible_arguments(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        commands.train_config(_arguments(words[0], "--chips", "a.npz", "--out", "o", *words[1:]))


def test_a_file_of_options_comes_between_the_kind_and_the_words(tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text(json.dumps({"coarse": "none", "epochs": 3, "batch": 4, "teacher": "there"}))
    words = ["--config", str(tmp_path / "o.json"), "--set", "epochs=5", "--set", "sizes=64,128"]
    config = commands.train_config(_arguments("teacher", "--chips", "a", "--chips", "b", "--out", "o", *words))
    assert (config.coarse, config.epochs, config.batch, config.teacher) == ("none", 5, 4, "there")
    assert config.architecture == "fpn" and config.sizes == (64, 128) and config.data == ("a", "b")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="holds no object of training options"):
        commands.train_config(
            _arguments("teacher", "--chips", "a", "--out", "o", "--config", str(tmp_path / "list.json"))
        )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("epochs=abc", "epochs='abc' is no int"),
        ("epochs=1.5", "epochs=1.5 is no int"),
        ("learning_rate=true", "learning_rate=True is no float"),
        ("teacher=3", "teacher=3 is no str"),
        ("sizes=64,x", "sizes=.* is no tuple"),
        ("derived=evi", "derived=.*: known are ndvi"),
    ],
)
def test_values_of_another_kind(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        commands.train_config(_arguments("teacher", "--chips", "a", "--out", "o", "--set", text))


def test_what_cannot_be_trained_leaves_nothing(chips: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file: give the name of a folder"):
        train(_config(chips, tmp_path / "file", architecture="fpn"))
    with pytest.raises(InputError, match="device 'tpu' is not here"):
        train(_config(chips, tmp_path / "run", architecture="fpn", device="tpu"))
    with pytest.raises(InputError, match=r"nowhere\.npz"):
        train(_config(str(tmp_path / "nowhere.npz"), tmp_path / "run", architecture="fpn"))
    assert not (tmp_path / "run").exists()


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"surprise": 1}')
    with pytest.raises(InputError, match="surprise"):
        make_config(read_values(tmp_path / "c.json") | {"out": "o"})


def test_a_kill_while_the_model_is_replaced_costs_nothing(chips: str, tmp_path: Path) -> None:
    config = _config(chips, tmp_path, architecture="fpn", epochs=1, epoch_samples=4)
    before = train(config).sha256
    (tmp_path / "model").rename(tmp_path / ".model-abc-old")  # as between the two renames of a save
    (tmp_path / ".model-abc").mkdir()
    assert train(config).sha256 == before
    assert not list(tmp_path.glob(".model-*"))


def test_evaluate_reads_a_file_of_chips_alone(
    chips: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Image, mask and bands are enough: no table of columns beside them."""
    (tmp_path / "chips.npz").write_bytes(Path(chips).read_bytes())
    parser = argparse.ArgumentParser()
    commands.add_evaluate_arguments(parser)
    commands.run_evaluate(parser.parse_args(["--chips", str(tmp_path / "chips.npz"), "--model", teacher, "--json"]))
    told = capsys.readouterr()
    assert json.loads(told.out)["images"] == 12 and not told.err


def test_evaluate_command_prints_json(chips: str, teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    commands.add_evaluate_arguments(parser)
    args = ["--chips", chips, "--model", teacher]
    commands.run_evaluate(parser.parse_args([*args, "--json", "--by", "kind"]))
    found = json.loads(capsys.readouterr().out)
    assert {"accuracy", "mf1", "miou", "mine_iou"} <= set(found)
    assert set(found["by"]) == {"odd", "even"}
    commands.run_evaluate(parser.parse_args([*args, "--bands", "red,green,blue"]))
    assert "miou" in capsys.readouterr().out
    recalls = []
    for threshold in ("0.01", "0.99"):
        commands.run_evaluate(parser.parse_args([*args, "--threshold", threshold, "--json"]))
        recalls.append(json.loads(capsys.readouterr().out)["recall"])
    assert recalls[0] > recalls[1]
    with pytest.raises(InputError, match="between 0 and 1"):
        commands.run_evaluate(parser.parse_args([*args, "--threshold", "7"]))


def test_commands_import_no_torch() -> None:
    code = "import sys, minemap.training.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_start_network_from_its_teacher(teacher: str) -> None:
    config = TrainConfig(out="", architecture="minec2fnet", teacher=teacher)
    source = load_model(teacher).network()
    student = start_network(config, make_recipe(config), source).eval()
    x = torch.randn(1, 6, 64, 64)
    with torch.no_grad():
        assert torch.allclose(student(x), source(x), atol=1e-5)


def test_what_goes_on_from_a_network_has_its_encoder(chips: str, tmp_path: Path) -> None:
    options = {"architecture": "fpn", "encoder": "resnet18", "epochs": 1, "epoch_samples": 4}
    small = str(train(_config(chips, tmp_path / "teacher", **options)).path)
    follows = {"encoder": None, "epochs": 1, "epoch_samples": 4}
    student = train(_config(chips, tmp_path / "student", teacher=small, **follows))
    assert student.recipe.options["encoder"] == "resnet18"
    tuned = train(_config(chips, tmp_path / "tuned", architecture="fpn", start=small, **follows))
    assert tuned.recipe.options["encoder_name"] == "resnet18"


def test_a_student_goes_on_without_its_teacher(chips: str, teacher: str, tmp_path: Path) -> None:
    """It holds the frozen encoder itself, which stays as it was."""
    student = train(_config(chips, tmp_path / "student", teacher=teacher, epochs=1))
    words = ["--chips", chips, "--out", str(tmp_path / "more"), "--set", f"start={student.path}", "selection=none"]
    options = [f"{key}={json.dumps(value)}" for key, value in TINY.items() if key != "encoder"]
    more = train(commands.train_config(_arguments("student", *words, *options)))
    ours, before = (c.network().state_dict() for c in (more, student))
    frozen = [key for key in ours if key.startswith("teacher_encoder.")]
    assert frozen and all(torch.equal(ours[key], before[key]) for key in frozen)
    assert any(not torch.equal(ours[key], before[key]) for key in ours.keys() - set(frozen))


def _ends_as(checkpoint: Checkpoint, run: Path) -> bool:
    """Whether a checkpoint holds the weights with which a run ended."""
    stored = torch.load(run / STATE, weights_only=True)["network"]
    kept = checkpoint.network().state_dict()
    return all(torch.equal(value.half(), stored[key].half()) for key, value in kept.items())


def test_the_epoch_that_is_kept(chips: str, tmp_path: Path) -> None:
    options = {"architecture": "fpn", "epoch_samples": 4, "patience": 9}
    best = train(_config(chips, tmp_path / "best", epochs=4, **options))
    rows = [json.loads(line) for line in (tmp_path / "best" / "metrics.jsonl").read_text().splitlines()]
    epochs = 1 + int(np.argmax([row["miou"] for row in rows]))
    train(_config(chips, tmp_path / "short", epochs=epochs, **options))  # the same, ended there
    assert _ends_as(best, tmp_path / "short")
    last = train(_config(chips, tmp_path / "last", epochs=4, keep="last", schedule="cosine", **options))
    assert _ends_as(last, tmp_path / "last")


def test_a_plateau_halves_the_rate_and_ends_the_run(chips: str, tmp_path: Path) -> None:
    options = {"architecture": "fpn", "epoch_samples": 4, "epochs": 30}
    train(_config(chips, tmp_path, learning_rate=0.0, warmup=0, patience=2, stop=5, ema=0.99999, **options))
    state = torch.load(tmp_path / STATE, weights_only=True)["state"]
    assert state["best_epoch"] == 0 and state["epoch"] == 6  # five epochs without a better one
    assert state["factor"] == 0.25  # after two of them, and two more
    train(_config(chips, tmp_path / "w", learning_rate=0.0, warmup=3, patience=2, stop=5, ema=0.99999, **options))
    assert torch.load(tmp_path / "w" / STATE, weights_only=True)["state"]["factor"] == 0.5  # those after the warm-up


def test_a_run_leaves_no_drafts(chips: str, tmp_path: Path) -> None:
    train(_config(chips, tmp_path, architecture="fpn", epochs=1, epoch_samples=4))
    assert not list(tmp_path.glob(".*"))
