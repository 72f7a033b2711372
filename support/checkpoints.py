"""Checkpoints: checkpoints/step-N with the trained weights, the optimizer's state and the options."""

import json
import re
import shutil
import tempfile
from pathlib import Path

from support.errors import UserError, reading, writing

import torch
from torch import Tensor, nn

from support.files import clear, read_json, read_tensors, replacing, save_json, save_tensors, sha256

STATE, CONFIG = "state.safetensors", "config.json"
ASIDE = ".aside-"  # begins the name of folders with checkpoints later than the step that a run was resumed from


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, for a safetensors file."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The reverse of optimizer_tensors, for Adam. Raises KeyError or RuntimeError when it is not for these weights."""
    state: dict[int, dict[str, Tensor]] = {}
    if any(name.startswith("optimizer.") for name in tensors):  # else no step was done yet
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            moments = (tensors[f"optimizer.{i}.{key}"].view(p.shape) for key in ("exp_avg", "exp_avg_sq"))
            # In the parameter's memory format, as the fused step needs.
            exp_avg, exp_avg_sq = (torch.empty_like(p).copy_(moment) for moment in moments)
            state[i] = {"step": tensors[f"optimizer.{i}.step"].view(()), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def state_tensors(trained: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a checkpoint: the trained weights and the optimizer's state."""
    parts = {part: module.state_dict() for part, module in trained.items()}
    weights = {f"trained.{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    return weights | optimizer_tensors(optimizer)


def save_checkpoint(
    folder: Path, step: int, trained: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, config: dict, limit: int,
) -> None:  # fmt: skip
    """Write checkpoints/step-N, beside its place first, so that a folder of that name is always complete.

    It holds all that the next steps depend on: the trained weights, the state of optimizer and gradient scaler, the
    step and the options; and the first file's checksum.
    The order of the data, noise, times and dropped prompts follow from seed and step, so no random state is kept.
    Then all but the newest `limit` go, and so does what was set aside. Raises UserError, as save_tensors does.
    """
    metadata = {"scaler": json.dumps(scaler.state_dict())}  # {} unless it trains in fp16
    with writing(folder):
        with replacing(folder / f"step-{step}") as temporary:
            save_tensors(state_tensors(trained, optimizer), temporary / STATE, metadata)
            save_json({"step": step, "sha256": sha256(temporary / STATE)} | config, temporary / CONFIG)
        found = steps_in(folder)
        for number in sorted(found)[:-limit]:
            shutil.rmtree(found[number])
        clear(folder, ASIDE)


def set_aside(folder: Path, last_step: int) -> list[int]:
    """Put checkpoints of later steps where nothing looks for them, until the next one is written; returns the steps.

    The newest goes first: if a kill comes between, the newest that is left still is the one that the log leads to.
    """
    later = {step: path for step, path in steps_in(folder).items() if step > last_step}
    for step in sorted(later, reverse=True):
        later[step].rename(Path(tempfile.mkdtemp(prefix=ASIDE, dir=folder)) / later[step].name)
    return sorted(later)


def steps_in(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Step -> the checkpoint step-N in a folder, or the file step-N with the suffix."""
    paths = folder.glob(f"step-*{suffix}")
    return {
        int(match[1]): path for path in paths if (match := re.fullmatch(rf"step-(\d+){re.escape(suffix)}", path.name))
    }


def find_snapshots(run: Path) -> tuple[dict, dict[int, Path]]:
    """The options of a training, and its snapshots by step. Raises UserError if there are none that can be shown."""
    config, paths = read_json(run / CONFIG), steps_in(run / "snapshots", ".safetensors")
    if not paths:
        raise UserError(f"{run / 'snapshots'} has no snapshots: train with --snapshot-steps 10")
    return config, dict(sorted(paths.items()))


def find_checkpoint(folder: Path, wanted: str) -> Path | None:
    """The folder that --resume-from-checkpoint means; None for "latest" when a run was stopped before its first one.

    Raises UserError when there is no such checkpoint, no run, or when it is not what was saved: then with the newest
    one that is.
    """
    found = steps_in(folder)
    if wanted == "latest" and not found:
        if (folder.parent / CONFIG).is_file():
            return None
        raise UserError(f"{folder} has no checkpoint to resume from: leave --resume-from-checkpoint out")
    path = found[max(found)] if wanted == "latest" else Path(wanted)
    if path.resolve().parent != folder.resolve():
        if (path / STATE).is_file():
            raise UserError(f"{path} is another run's, not in {folder}: pass --output-dir {path.parent.parent}")
        raise UserError(f"{path} is no checkpoint: pass latest, or a folder of {folder}, with {STATE} in it")
    if is_damaged(path):
        others = (found[step] for step in sorted(found, reverse=True) if found[step].name != path.name)
        good = next((other for other in others if not is_damaged(other)), None)
        remedy = f"resume from {good}" if good else "start another --output-dir"
        raise UserError(f"{path} is damaged or renamed: {remedy}")
    return path


def is_damaged(path: Path) -> bool:
    """Whether a checkpoint holds anything else than what was written as its step."""
    try:
        config = read_json(path / CONFIG)
        return f"step-{config.get('step')}" != path.name or config.get("sha256") != sha256(path / STATE)
    except (UserError, OSError):
        return True


def check_config(path: Path, config: dict, processes: int) -> int:
    """The step that a config.json is of, 0 without one. Raises UserError if options that decide the result changed."""
    saved = read_json(path)
    changed = [k for k, value in config.items() if k in saved and k != "max_train_steps" and saved[k] != value]
    if changed:
        if "train_batch_size" in changed and processes > 1:
            saved["train_batch_size"] = f"{saved['train_batch_size']} over all processes"
        options = ", ".join(as_typed(f"--{name.replace('_', '-')}", saved[name]) for name in changed)
        raise UserError(f"{path} was made with {options}: resume with the same, or start a new --output-dir")
    return saved.get("step", 0)


def as_typed(option: str, value) -> str:
    if value is True:
        return option
    return f"{option} {value}" if value not in (None, False) else f"no {option}"


def load_checkpoint(
    path: Path, trained: dict[str, nn.Module], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Load the state of a checkpoint of the same training. Raises UserError when it does not fit."""
    tensors, metadata = read_tensors(path / STATE)
    with reading(path / STATE, "checkpoint of this training", "resume from another one"):
        for part, module in trained.items():
            prefix = f"trained.{part}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        load_optimizer_tensors(optimizer, tensors)
        scaler.load_state_dict(json.loads(metadata.get("scaler", "{}")))
        if unknown := tensors.keys() - state_tensors(trained, optimizer):
            raise ValueError(f"{min(unknown)} is not of this training")


def is_checkpoint(path: Path) -> bool:
    return (path / STATE).is_file()


def read_trained(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The ControlNet in a checkpoint, under our names, with no metadata. Raises UserError."""
    own = "trained.controlnet."
    return {k.removeprefix(own): tensor for k, tensor in read_tensors(path / STATE)[0].items() if k.startswith(own)}, {}


def read_decoder(path: Path) -> dict[str, Tensor]:
    """The UNet's decoder in a checkpoint, or in its file, under our names; empty unless it was trained."""
    path = path / STATE if path.is_dir() else path
    if path.name != STATE or not path.is_file():
        return {}
    tensors, others = read_tensors(path)[0], ("trained.controlnet.", "optimizer.")
    return {name.removeprefix("trained."): tensor for name, tensor in tensors.items() if not name.startswith(others)}
