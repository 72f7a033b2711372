"""Checkpoints: checkpoints/step-N with the trained weights, the optimizer's state and the options."""

import json
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from support.errors import UserError
from support.files import move, read_json, read_tensors, save_json, save_tensors


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


def save_checkpoint(
    folder: Path, step: int, trained: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, config: dict, limit: int,
) -> None:  # fmt: skip
    """Write checkpoints/step-N, beside its place first, so that a folder of that name is always complete.

    It holds all that the next steps depend on: the trained weights, the state of optimizer and gradient scaler, the
    step and the options.
    The order of the data, noise, times and dropped prompts follow from seed and step, so no random state is kept.
    Then all but the newest `limit` go, and so do those of later steps, left by a run that was resumed before them.
    """
    final, temporary = folder / f"step-{step}", folder / ".partial"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while it wrote
    parts = {part: module.state_dict() for part, module in trained.items()}
    weights = {f"trained.{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    metadata = {"scaler": json.dumps(scaler.state_dict())}  # {} unless it trains in fp16
    save_tensors(weights | optimizer_tensors(optimizer), temporary / "state.safetensors", metadata)
    save_json({"step": step} | config, temporary / "config.json")
    shutil.rmtree(final, ignore_errors=True)
    move(temporary, final)
    found = steps_in(folder)
    newest = sorted(number for number in found if number <= step)[-limit:]
    for number in found.keys() - newest:
        shutil.rmtree(found[number])


def steps_in(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Step -> the checkpoint step-N in a folder, or the file step-N with the suffix."""
    paths = folder.glob(f"step-*{suffix}")
    return {
        int(match[1]): path for path in paths if (match := re.fullmatch(rf"step-(\d+){re.escape(suffix)}", path.name))
    }


def find_checkpoint(folder: Path, wanted: str) -> Path | None:
    """The folder that --resume-from-checkpoint means; None for "latest" when a run was stopped before its first one.

    Raises UserError when there is no such checkpoint, or no run.
    """
    found = steps_in(folder)
    if wanted == "latest" and not found:
        if (folder.parent / "config.json").is_file():
            return None
        raise UserError(f"{folder} has no checkpoint to resume from: leave --resume-from-checkpoint out")
    path = found[max(found)] if wanted == "latest" else Path(wanted)
    if not (path / "state.safetensors").is_file() or not (path / "config.json").is_file():
        raise UserError(f"{path} is no checkpoint: expected state.safetensors and config.json in it")
    return path


def check_config(path: Path, config: dict) -> int:
    """The step that a config.json is of, 0 without one. Raises UserError if options that decide the result changed."""
    saved = read_json(path)
    changed = [k for k, value in config.items() if k in saved and k != "max_train_steps" and saved[k] != value]
    if changed:
        options = ", ".join(f"--{name.replace('_', '-')} {saved.get(name)}" for name in changed)
        raise UserError(f"{path} was made with {options}: resume with the same, or start a new --output-dir")
    if not isinstance(saved.get("step", 0), int):
        raise UserError(f"{path} is broken (step {saved['step']!r}): resume from another checkpoint")
    return saved.get("step", 0)


def load_checkpoint(
    path: Path, trained: dict[str, nn.Module], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Load the state of a checkpoint of the same training. Raises UserError when it does not fit."""
    tensors, metadata = read_tensors(path / "state.safetensors")
    try:
        for part, module in trained.items():
            prefix = f"trained.{part}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        load_optimizer_tensors(optimizer, tensors)
        scaler.load_state_dict(json.loads(metadata.get("scaler", "{}")))
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise UserError(f"{path / 'state.safetensors'} does not fit ({reason}): resume from another one") from None
