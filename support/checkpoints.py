"""Checkpoints: checkpoints/step-N with the trained weights, the optimizer's state and the options."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from support.errors import UserError, reading, writing
from support.files import PARTIAL, read_json, read_tensors, replacing, save_json, save_tensors, sha256

STATE, CONFIG = "state.safetensors", "config.json"
TOLD_BY_CONTENT = ("base", "vae", "data", "controlnet")  # options that may change, as what they name may move
GO_BACK = "delete its folder, and the same command goes on from the checkpoint before it, or from the start"


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
        for path in list(steps_in(folder).values())[:-limit]:
            # Its name goes in one step, so that what a kill leaves of it is no checkpoint.
            shutil.rmtree(path.rename(path.with_name(f"{PARTIAL}{path.name}")))


def load_checkpoint(
    path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Load the state of a checkpoint of the same training."""
    with reading(path / STATE, "checkpoint of this training", GO_BACK):
        if not is_checkpoint(path) or sha256(path / STATE) != read_json(path / CONFIG)["sha256"]:
            raise ValueError("not what was written there")
        saved, metadata = read_tensors(path / STATE)
        load_state(saved, modules, optimizer)
        scaler.load_state_dict(json.loads(metadata["scaler"]))


def forget_later(run: Path, last: int) -> None:
    """Remove a run's previews and snapshots of steps after `last`, which are going to be done again."""
    for folder, suffix in (("previews", ".png"), ("snapshots", ".safetensors")):
        for step, path in steps_in(run / folder, suffix).items():
            if step > last:
                path.unlink()


def steps_in(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Step -> the checkpoint step-N in a folder, or the file step-N with the suffix, in the order of steps."""
    named = {path.name[len("step-") :].removesuffix(suffix): path for path in folder.glob(f"step-*{suffix}")}
    return dict(sorted((int(step), path) for step, path in named.items() if step.isdecimal()))


def newest(run: Path) -> Path | None:
    """The newest checkpoint in a run's folder; None if it was stopped before its first one."""
    found = steps_in(run / "checkpoints")
    if not found and not (run / CONFIG).is_file():
        raise UserError(f"{run} has no checkpoint to resume from: leave --resume-from-checkpoint out")
    return found[max(found)] if found else None


def check_config(path: Path, config: dict) -> dict:
    """A saved config.json. Raises UserError if options that decide the result are no longer those in it."""
    saved, may_change = read_json(path, GO_BACK), ("max_train_steps", *TOLD_BY_CONTENT)
    if changed := [name for name in config if name not in may_change and saved.get(name, config[name]) != config[name]]:
        options = ", ".join(f"--{name.replace('_', '-')} {saved[name]}" for name in changed)
        raise UserError(f"{path} was made with {options}: resume with the same, or start a new --output-dir")
    return saved


def is_checkpoint(path: Path) -> bool:
    return (path / STATE).is_file()


def read_trained(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The ControlNet in a checkpoint, and the UNet's decoder, empty unless it was trained; under our names."""
    saved, own = read_tensors(path / STATE)[0].items(), "controlnet."
    trained = {name.removeprefix("trained."): tensor for name, tensor in saved if name.startswith("trained.")}
    controlnet = {name.removeprefix(own): tensor for name, tensor in trained.items() if name.startswith(own)}
    return controlnet, {name: tensor for name, tensor in trained.items() if not name.startswith(own)}
