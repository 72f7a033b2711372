"""A training's state on disk: checkpoints/step-N with weights, optimizer and options, and the log up to there."""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from files import UserError, read_log, read_tensors, save_json, save_tensors, write_atomically


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, for a safetensors file."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The reverse of optimizer_tensors."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            if value.shape == parameters[int(i)].shape:  # in the parameter's memory format, as the fused step needs
                value = torch.empty_like(parameters[int(i)]).copy_(value)
            state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(folder: Path, step: int, module: nn.Module, optimizer, config: dict, limit: int) -> None:
    """Write checkpoints/step-N, beside its place first, so that a folder of that name is always complete.

    Then all but the newest `limit` go, and those of later steps: they are of a run that was resumed from before them.
    """
    final, temporary = folder / f"step-{step}", folder / f".step-{step}"
    weights = {f"controlnet.{name}": tensor for name, tensor in module.state_dict().items()}
    save_tensors(weights | optimizer_tensors(optimizer), temporary / "state.safetensors")
    save_json({"step": step} | config, temporary / "config.json")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    found = checkpoints_in(folder)
    newest = sorted(number for number in found if number <= step)[-limit:]
    for number in found.keys() - newest:
        shutil.rmtree(found[number])


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint."""
    paths = folder.glob("step-*")
    return {int(match[1]): path for path in paths if (match := re.fullmatch(r"step-(\d+)", path.name))}


def find_checkpoint(folder: Path, wanted: str) -> Path:
    """The folder that --resume-from-checkpoint means."""
    found = checkpoints_in(folder)
    if wanted == "latest" and not found:
        raise UserError(f"{folder} has no checkpoint to resume from: leave --resume-from-checkpoint out")
    path = found[max(found)] if wanted == "latest" else Path(wanted)
    if not (path / "state.safetensors").is_file() or not (path / "config.json").is_file():
        raise UserError(f"{path} is no checkpoint: expected state.safetensors and config.json in it")
    return path


def resumed_step(path: Path, config: dict) -> int:
    """A checkpoint's step. Raises UserError if options that decide the result have changed since."""
    try:
        saved = json.loads((path / "config.json").read_text())
        step = int(saved["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'config.json'} is broken ({error!r}): resume from another checkpoint") from None
    free = {"max_train_steps"}
    changed = [name for name in config if name not in free and saved.get(name) != config[name]]
    if changed:
        options = ", ".join(f"--{name.replace('_', '-')} {saved.get(name)}" for name in changed)
        raise UserError(f"{path} was made with {options}: resume with the same, or start a new --output-dir")
    return step


def load_checkpoint(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill `module` and `optimizer` from a checkpoint of the same training."""
    tensors, _ = read_tensors(path / "state.safetensors")
    prefix = "controlnet."
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    module.load_state_dict(weights)
    load_optimizer_tensors(optimizer, tensors)


def trim_log(path: Path, last_step: int) -> list[dict]:
    """Drop what a log says of steps after `last_step`, and a line cut short; returns the entries that stay."""
    kept = [entry for entry in read_log(path) if entry["step"] <= last_step]
    text = "".join(json.dumps(entry) + "\n" for entry in kept)
    write_atomically(path, lambda temporary: temporary.write_text(text))
    return kept
