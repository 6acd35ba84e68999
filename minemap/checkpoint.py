"""Checkpoints: weights as safetensors, a readable recipe beside them, and checksums over both.

A checkpoint is a folder of three files, `weights.safetensors`, `recipe.json` and `SHA256SUMS` (readable by
`sha256sum --check`). Nothing is ever unpickled, and nothing is used before both checksums agree: safetensors
has no checksum of its own. The constants that training and mapping share live in the recipe.

torch is imported inside functions only, so that `minemap --help` and `--dry-run` stay fast.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minemap.errors import CheckpointError, InputError
from minemap.sentinel2 import BANDS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEFAULT_MODEL = "south-america-2026"
DEFAULT_CHANGE_MODEL = "change-2026"
WEIGHTS, RECIPE, SUMS = "weights.safetensors", "recipe.json", "SHA256SUMS"
BUNDLED = Path(__file__).parent / "weights"
# Indices that a network may take after its bands: name -> (plus, minus), the index is (p - m) / (p + m).
DERIVED = {"ndvi": ("nir", "red")}


@dataclass(frozen=True)
class Recipe:
    """What a network was trained on and how it must be fed: the carbon copy that mapping reads."""

    name: str
    architecture: str  # a name that minemap.models.build knows
    options: dict[str, Any]  # keyword arguments of the network's constructor
    bands: tuple[str, ...]  # bands that are read, in the network's order
    mean: tuple[float, ...]  # per band, then per derived index; unit of reflectance (0-1)
    std: tuple[float, ...]
    threshold: float  # probability from which a pixel counts as mine, 0-1
    threshold_rule: str = "not chosen"
    derived: tuple[str, ...] = ()  # indices computed from the bands, appended after them
    window: int = 256  # from one window to the next, pixels
    halo: int = 32  # half of what two windows share, pixels
    stride: int = 32  # the network's stride: heights and widths are multiples of it
    resolution: float = 10.0  # metres per pixel
    composite: dict[str, Any] = field(default_factory=lambda: {"method": "median"})
    classes: tuple[str, ...] = ("mine",)
    training: dict[str, Any] = field(default_factory=dict)  # data, configuration, seed, ImageNet or not
    metrics: dict[str, Any] = field(default_factory=dict)
    area_model: dict[str, Any] | None = None  # errors of areas (uncertainty.AreaModel), None: not measured

    def __post_init__(self) -> None:
        for name in ("bands", "mean", "std", "derived", "classes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        problems = [message for holds, message in self._checks() if not holds]
        if problems:
            raise CheckpointError(f"recipe of {self.name!r} is not valid: {problems[0]}")

    def _checks(self) -> list[tuple[bool, str]]:
        channels = len(self.bands) + len(self.derived)
        return [
            (bool(self.bands) and set(self.bands) <= set(BANDS), f"bands {self.bands}, known: {BANDS}"),
            (len(set(self.bands)) == len(self.bands), f"bands {self.bands} repeat one"),
            (set(self.derived) <= set(DERIVED), f"derived {self.derived}, known: {tuple(DERIVED)}"),
            (
                all(set(DERIVED.get(name, ())) <= set(self.bands) for name in self.derived),
                f"derived {self.derived} wants bands that are not among {self.bands}",
            ),
            (len(self.mean) == len(self.std) == channels, f"mean and std need {channels} values each"),
            (all(s > 0 for s in self.std), f"std {self.std} must be above 0"),
            (0 <= self.threshold <= 1, f"threshold {self.threshold} must lie in 0-1"),
            (self.stride > 0, f"stride {self.stride} must be above 0"),
            (self.window % max(self.stride, 1) == 0, f"window {self.window} is no multiple of the stride"),
            (self.window % 2 == 0, f"window {self.window} is odd"),
            (self.halo >= 0 and 2 * self.halo % max(self.stride, 1) == 0, f"halo {self.halo} is off-stride"),
            (2 * self.halo <= self.window, f"halo {self.halo} is over half of the window, {self.window}"),
            (self.resolution > 0, f"resolution {self.resolution} must be above 0"),
        ]

    @property
    def dates(self) -> int:
        """Dates that the network looks at together: one for a map, two for change."""
        return 2 if self.architecture == "minenetcd" else 1

    def normalise(self, reflectance: Tensor) -> Tensor:
        """Scale reflectance to what the network takes, on the tensor's own device.

        `reflectance`: float32 (..., band, y, x), bands in the recipe's order, NaN = absent (a missing band is
        a band of NaN). Returns float32 (..., band + derived, y, x), (x - mean) / std, 0 where absent.
        """
        import torch

        indices = [index(reflectance, name, self.bands) for name in self.derived]
        channels = torch.cat([reflectance, *indices], dim=-3) if indices else reflectance
        mean, std = (reflectance.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (channels - mean).div_(std).nan_to_num_(0, 0, 0)


def index(reflectance: Tensor, name: str, bands: tuple[str, ...]) -> Tensor:
    """A derived index as a band of its own, float32 (..., 1, y, x), NaN where it is not defined."""
    plus, minus = (reflectance[..., [bands.index(b)], :, :] for b in DERIVED[name])
    total = plus + minus
    return ((plus - minus) / total).masked_fill_(total <= 0, math.nan)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its recipe, where it is, and one hash that identifies it.

    Holds no weights, so it is cheap to send to workers; `network()` reads and verifies them there.
    """

    recipe: Recipe
    path: Path
    sha256: str

    def network(self) -> torch.nn.Module:
        """The network in evaluation mode, float32, gradients off, on the CPU."""
        content = verify(self.path)
        if _identity(content) != self.sha256:
            raise CheckpointError(f"{self.path} holds another model than when it was loaded: load it again")
        network = _build(self.recipe)
        _load_weights(network, content[WEIGHTS], self.path)
        return network.eval().requires_grad_(False)


def load_model(name_or_path: str | Path | Checkpoint | None = None) -> Checkpoint:
    """A bundled model by name, or a checkpoint by its folder or by a file inside it; None is the default."""
    if isinstance(name_or_path, Checkpoint):
        return name_or_path
    if not isinstance(name_or_path, str | Path | None):
        raise InputError(f"model is a {type(name_or_path).__name__}: give a name, a path or a Checkpoint")
    folder = _find(DEFAULT_MODEL if name_or_path is None else name_or_path)
    content = verify(folder)
    return Checkpoint(_recipe(content[RECIPE], folder / RECIPE), folder, _identity(content))


def load_same(path: Path, sha256: str) -> Checkpoint:
    """The model of that hash, at `path` or among the bundled ones: on a worker minemap may be installed elsewhere.

    Raises CheckpointError where it is not there, or is another one.
    """
    folder = path if path.is_dir() else BUNDLED / path.name
    if not folder.is_dir():
        raise CheckpointError(f"{path} is not there: put the model on a file system that all workers share")
    found = load_model(folder)
    if found.sha256 != sha256:
        raise CheckpointError(f"{folder} holds another model here than where the run was started")
    return found


def available() -> list[str]:
    """Names of the bundled models."""
    return sorted(p.parent.name for p in BUNDLED.glob(f"*/{SUMS}"))


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if str(name_or_path) in available():
        return BUNDLED / str(name_or_path)
    if path.is_dir():
        return path.resolve()
    if path.is_file() and path.name in (WEIGHTS, RECIPE, SUMS):
        return path.parent.resolve()
    known = ", ".join(available()) or "none"
    raise CheckpointError(f"no model {str(name_or_path)!r}: give a folder with a checkpoint or one of: {known}")


def verify(folder: Path) -> dict[str, bytes]:
    """What a checkpoint's files hold, by name, once the checksum file is byte for byte what they have."""
    content = {name: _read(folder / name) for name in (WEIGHTS, RECIPE)}
    stored = _read(folder / SUMS)
    lines = {name: _line(name, data) for name, data in content.items()}
    for name, line in lines.items():
        if line.encode() not in stored.splitlines(keepends=True):
            raise CheckpointError(f"{folder / name} does not match {SUMS}: the model is damaged, fetch it again")
    expected = "".join(lines.values())
    if stored != expected.encode():
        raise CheckpointError(f"{folder / SUMS} is not a checksum file of this model: fetch the model again")
    return {**content, SUMS: stored}


def checksums(folder: Path) -> str:
    """What a checkpoint's checksum file must hold: one line a file, as `sha256sum` writes them."""
    return "".join(_line(name, _read(folder / name)) for name in (WEIGHTS, RECIPE))


def _identity(content: dict[str, bytes]) -> str:
    """One hash for the whole checkpoint: the sha256 of its checksum file."""
    return hashlib.sha256(content[SUMS]).hexdigest()


def _line(name: str, data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}  {name}\n"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): not a complete checkpoint") from error


def _recipe(data: bytes, path: Path) -> Recipe:
    """The recipe in a JSON file, which holds `data`."""
    try:
        values = json.loads(data.decode())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): not a checkpoint's recipe") from error
    known = {f.name for f in fields(Recipe)}
    if not isinstance(values, dict) or not set(values) <= known:
        raise CheckpointError(f"{path} is no recipe: keys must be among {', '.join(sorted(known))}")
    try:
        return Recipe(**values)
    except TypeError as error:
        raise CheckpointError(f"{path} is no recipe: {error}") from error


def save(folder: str | Path, network: torch.nn.Module, recipe: Recipe) -> Checkpoint:
    """Write a checkpoint folder and return it, loaded; an older one there is replaced.

    Kernels are stored as float16 (relative error at most 2^-11 for weights above 6e-5), everything with fewer
    than two dimensions (norms, biases) as float32. Written beside its place first, then renamed.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    save_file({k: _compact(v) for k, v in network.state_dict().items()}, draft / WEIGHTS)
    (draft / RECIPE).write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    (draft / SUMS).write_text(checksums(draft))
    _replace(draft, folder)
    return load_model(folder)


def _replace(draft: Path, folder: Path) -> None:
    for kept in folder.glob("*.md"):  # the card
        shutil.copy2(kept, draft)
    draft.chmod(0o755)  # mkdtemp gives it to its owner only, safetensors the file
    (draft / WEIGHTS).chmod(0o644)
    old = draft.with_name(f"{draft.name}-old")
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def settle(folder: Path) -> None:
    """Clear up after a `save` that was killed: the checkpoint that it had moved aside comes back, drafts go."""
    for old in folder.parent.glob(f".{folder.name}-*-old"):
        if not folder.exists():
            old.rename(folder)
    for left in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    kernel = tensor.is_floating_point() and tensor.dim() > 1
    return tensor.detach().cpu().to(torch.float16 if kernel else tensor.dtype).contiguous()


def _build(recipe: Recipe) -> torch.nn.Module:
    from minemap import models

    try:
        return models.build(recipe.architecture, **recipe.options)
    except (TypeError, ValueError, KeyError, InputError) as error:
        raise CheckpointError(f"recipe of {recipe.name!r} describes no network we can build: {error}") from error


def _load_weights(network: torch.nn.Module, data: bytes, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        network.load_state_dict(load(data))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path} does not fit the network of its recipe: {reason}") from error
