"""Checkpoints: checkpoints/step-N with the trained weights, the optimizer's state and the options."""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from support.errors import UserError, reading, writing
from support.files import PARTIAL, read_json, read_tensors, replacing, save_json, save_tensors, sha256

STATE, CONFIG = "state.safetensors", "config.json"
TOLD_BY_CONTENT = ("base", "vae", "data", "controlnet")  # options that may change, as what they name may move


def state_tensors(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a training changes, by name and not copied: the modules' weights and the optimizer's state."""
    states = {name: module.state_dict() for name, module in modules.items()}
    states |= {f"optimizer.{i}": state for i, state in optimizer.state_dict()["state"].items()}
    return {f"{part}.{name}": tensor for part, state in states.items() for name, tensor in state.items()}


@torch.no_grad()
def load_state(saved: dict[str, Tensor], modules: dict[str, nn.Module], optimizer: torch.optim.AdamW) -> None:
    """Copy what state_tensors gave into a training of the same names and shapes. Raises ValueError if they differ."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):  # as AdamW begins
        step = torch.zeros((), device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    tensors = state_tensors(modules, optimizer)
    if other := saved.keys() ^ tensors.keys():
        raise ValueError(f"{min(other)} is not in both")
    for name, tensor in tensors.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(f"{name} is {list(saved[name].shape)}, not {list(tensor.shape)}")
        tensor.copy_(saved[name])  # in place: its memory format, which the fused step needs, is kept


def save_checkpoint(
    folder: Path, step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, config: dict, limit: int,
) -> None:  # fmt: skip
    """Write checkpoints/step-N, beside its place first, so that a folder of that name is always complete.

    It holds all that the next steps depend on: the trained weights, the state of optimizer and gradient scaler, the
    step and the options; and the first file's checksum. The order of the data, noise, times and dropped prompts follow
    from seed and step, so no random state is kept. Then all but the newest `limit` go.
    """
    metadata = {"scaler": json.dumps(scaler.state_dict())}  # {} unless it trains in fp16
    with writing(folder):
        with replacing(folder / f"step-{step}") as temporary:
            save_tensors(state_tensors(modules, optimizer), temporary / STATE, metadata)
            save_json({"step": step, "sha256": sha256(temporary / STATE)} | config, temporary / CONFIG)
        found = steps_in(folder)
        for number in sorted(found)[:-limit]:
            remove(found[number])


def load_checkpoint(
    path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Load the state of a checkpoint of the same training."""
    saved, metadata = read_tensors(path / STATE)
    with reading(path / STATE, "checkpoint of this training", "resume from another one"):
        load_state(saved, modules, optimizer)
        scaler.load_state_dict(json.loads(metadata["scaler"]))


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint: its name in one step, so that what a kill leaves of it is no checkpoint."""
    nameless = checkpoint.with_name(f"{PARTIAL}{checkpoint.name}")
    os.replace(checkpoint, nameless)
    shutil.rmtree(nameless)


def forget_later(run: Path, last: int) -> None:
    """Remove what a run's folder has of steps after `last`, which are going to be done again.

    The newest checkpoint goes first: if a kill comes between, the newest that is left still is one that the log leads
    to.
    """
    for folder, suffix in (("checkpoints", ""), ("previews", ".png"), ("snapshots", ".safetensors")):
        for step, path in sorted(steps_in(run / folder, suffix).items(), reverse=True):
            if step > last:
                path.unlink() if suffix else remove(path)


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
    """The folder that --resume-from-checkpoint means; None for "latest" when a run was stopped before its first one."""
    found = steps_in(folder)
    if wanted == "latest" and not found:
        if (folder.parent / CONFIG).is_file():
            return None
        raise UserError(f"{folder} has no checkpoint to resume from: leave --resume-from-checkpoint out")
    path = found[max(found)] if wanted == "latest" else Path(wanted)
    if path.resolve() not in (other.resolve() for other in found.values()):
        raise UserError(f"{path} is no checkpoint of this --output-dir: pass latest, or a folder of {folder}")
    if not is_whole(path):
        others = (found[step] for step in sorted(found, reverse=True) if found[step].name != path.name)
        good = next(filter(is_whole, others), None)
        raise UserError(f"{path} is damaged or renamed: "
                        + (f"resume from {good}" if good else "start another --output-dir"))  # fmt: skip
    return path


def is_whole(path: Path) -> bool:
    """Whether a checkpoint holds what was written as its step."""
    try:
        config = read_json(path / CONFIG)
        return f"step-{config.get('step')}" == path.name and config.get("sha256") == sha256(path / STATE)
    except (UserError, OSError):
        return False


def check_config(path: Path, config: dict) -> dict:
    """A saved config.json. Raises UserError if options that decide the result are no longer those in it."""
    saved = read_json(path)
    may_change = {"max_train_steps", *TOLD_BY_CONTENT}
    if not (saved.get("controlnet") and config["controlnet"]):  # to begin with one, or without, is another training
        may_change.remove("controlnet")
    changed = [name for name in config if saved.get(name, config[name]) != config[name] and name not in may_change]
    if changed:
        options = ", ".join(f"--{name.replace('_', '-')} {saved[name]}" for name in changed)
        raise UserError(f"{path} was made with {options}: resume with the same, or start a new --output-dir")
    return saved


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
