"""A training's state on disk: checkpoints/step-N with weights, optimizer and options, and the log up to there."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from files import (
    UserError,
    append_line,
    move,
    read_json,
    read_log,
    read_tensors,
    save_json,
    save_tensors,
    write_atomically,
)
from metrics import growth_step, jump_step


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


def save_checkpoint(folder: Path, step: int, trained: nn.Module, optimizer, config: dict, limit: int) -> None:
    """Write checkpoints/step-N, beside its place first, so that a folder of that name is always complete.

    It holds all that the next steps depend on: the trained weights, the optimizer's state, the step and the options.
    Order of the data, noise, times and dropped prompts follow from seed and step, so no random state is kept.
    Then all but the newest `limit` go, and those of later steps: they are of a run that was resumed from before them.
    """
    final, temporary = folder / f"step-{step}", folder / ".partial"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while it wrote
    weights = {f"trained.{name}": tensor for name, tensor in trained.state_dict().items()}
    save_tensors(weights | optimizer_tensors(optimizer), temporary / "state.safetensors")
    save_json({"step": step} | config, temporary / "config.json")
    shutil.rmtree(final, ignore_errors=True)
    move(temporary, final)
    found = checkpoints_in(folder)
    newest = sorted(number for number in found if number <= step)[-limit:]
    for number in found.keys() - newest:
        shutil.rmtree(found[number])


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint."""
    paths = folder.glob("step-*")
    return {int(match[1]): path for path in paths if (match := re.fullmatch(r"step-(\d+)", path.name))}


def find_checkpoint(folder: Path, wanted: str) -> Path | None:
    """The folder that --resume-from-checkpoint means; None for "latest" when a run was stopped before its first one.

    Raises UserError when there is no such checkpoint, or no run.
    """
    found = checkpoints_in(folder)
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
    changed = [name for name in config if name != "max_train_steps" and saved.get(name) != config[name]]
    if changed:
        options = ", ".join(f"--{name.replace('_', '-')} {saved.get(name)}" for name in changed)
        raise UserError(f"{path} was made with {options}: resume with the same, or start a new --output-dir")
    if not isinstance(saved.get("step", 0), int):
        raise UserError(f"{path} is broken (step {saved['step']!r}): resume from another checkpoint")
    return saved.get("step", 0)


def load_checkpoint(path: Path, trained: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill `trained` and `optimizer` from a checkpoint of the same training. Raises UserError when it does not fit."""
    tensors, _ = read_tensors(path / "state.safetensors")
    prefix = "trained."
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    try:
        trained.load_state_dict(weights)
        load_optimizer_tensors(optimizer, tensors)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise UserError(f"{path / 'state.safetensors'} does not fit ({reason}): resume from another one") from None


def trim_log(path: Path, last_step: int) -> list[dict]:
    """Drop what a log says of steps after `last_step`, and a line cut short; returns the entries that stay."""
    kept = [entry for entry in read_log(path) if entry["step"] <= last_step]
    text = "".join(json.dumps(entry) + "\n" for entry in kept)
    write_atomically(path, lambda temporary: temporary.write_text(text))
    return kept


class Log:
    """A run's log.jsonl, one object a line, and if asked for TensorBoard's files beside it. `history` are the entries.

    Raises UserError when the folder can't be written.
    """

    def __init__(self, folder: Path, last_step: int, tensorboard: bool):
        self.history = trim_log(folder / "log.jsonl", last_step)
        self.began = time.time() - (self.history[-1]["seconds"] if self.history else 0)
        self.writer = None
        try:
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(folder / "tensorboard", purge_step=last_step + 1)
            self.file = open(folder / "log.jsonl", "a")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"can't write to {folder} ({error}): choose another --output-dir") from None

    def write(self, entries: list[dict], preview: Image.Image | None) -> None:
        """Add finished steps, and the preview of the last of them."""
        for entry in entries:
            self.history.append(entry | {"seconds": round(time.time() - self.began, 2)})
            append_line(self.file, json.dumps(self.history[-1]))
            if self.writer:
                for name, value in entry.items():
                    self.writer.add_scalar(name, value, entry["step"])
        if self.writer and preview:
            self.writer.add_image("preview", np.asarray(preview), entries[-1]["step"], dataformats="HWC")

    def news(self) -> list[str]:
        """What the last entry tells the user."""
        entry = self.history[-1]
        lines = []
        if growth_step(self.history) == entry["step"]:
            lines.append(f"the hint begins to count, its sensitivity is {entry['hint_sensitivity']:.1e} and growing; "
                         "the samples do not show it yet")  # fmt: skip
        if jump_step(self.history) == entry["step"]:
            lines.append(f"the jump has come: with another pair's hint the held-out loss is "
                         f"{entry['hint_gap'] / entry['heldout_loss']:.0%} higher")  # fmt: skip
        if "iou" in entry:
            lines.append(f"IoU {entry['iou']:.2f} of samples and hints (the base: {entry['base_iou']:.2f})")
        return [f"step {entry['step']}: {line}" for line in lines]

    def close(self) -> None:
        self.file.close()
        if self.writer:
            self.writer.close()
