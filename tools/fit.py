"""How a part of the miniature is trained: on scenes that are drawn, in a loop that can be stopped."""

import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from data import SHAPES, draw_scene
from support.checkpoints import load_state, state_tensors
from support.files import read_tensors, save_tensors
from support.pictures import to_picture

SEED = 0
TRAIN, UNSEEN = 1, 2  # streams of scenes
CHECKPOINT_EVERY = 200


class Plan(NamedTuple):
    """How a network is trained."""

    steps: int
    batch: int
    learning_rate: float  # at its peak
    constant: float = 0.5  # share of the steps after which the learning rate falls to 0
    seed: int = SEED  # of the first step
    # Of pretrain.learn_to_paint: the parts of Stable Diffusion that learn, and the range of a time's weight (1 / SNR),
    # one for each of as many equal parts of the steps.
    learning: tuple[str, ...] = ("unet",)
    weights: tuple[tuple[float, float], ...] = ((0.3, 4),)


def draw_batch(stream: int, indices: range | list[int], size: int) -> tuple[Tensor, list[str]]:
    """Scenes of one stream: images [B, 3, size, size] in [-1, 1], and their captions."""
    scenes = [draw_scene(np.random.default_rng([SEED, stream, size, i]), size, SHAPES) for i in indices]
    images = torch.from_numpy(np.stack([np.asarray(target) for _, target, _ in scenes]))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1, [caption for _, _, caption in scenes]


def running_average(average: Tensor, value: Tensor, count: Tensor) -> Tensor:
    """The average over about the last 500 steps; over fewer at the start, so that the first weights fade soon."""
    return torch.lerp(value, average, min(0.998, ((1 + count) / (10 + count)).item()))


def fit(stage: str, folder: Path, module: nn.Module, loss_fn, show, plan: Plan) -> nn.Module:
    """Train `module` as planned; returns it with the running average of its weights, which is what ships.

    loss_fn(step, generator) -> (loss, values for the log). All randomness of a step comes from its generator, so that
    a resumed run goes on as if it had not stopped. show(averaged module, step) is called at each checkpoint.
    """
    path, start = folder / f"{stage}.safetensors", 0
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = AveragedModel(module, avg_fn=running_average)
    modules = {"average": average, "module": module}
    if path.exists():
        tensors, metadata = read_tensors(path)
        start = int(metadata["step"])
        load_state(tensors, modules, optimizer)
        print(f"{stage}: going on at step {start}")

    began, bar = time.monotonic(), tqdm(range(start, plan.steps), initial=start, total=plan.steps, desc=stage)
    with open(folder / f"{stage}.jsonl", "a") as log:
        for step in bar:
            rate = min(1.0, (step + 1) / 50) * min(1.0, (1 - step / plan.steps) / (1 - plan.constant))
            optimizer.param_groups[0]["lr"] = rate * plan.learning_rate
            loss, values = loss_fn(step, torch.Generator().manual_seed(plan.seed + step))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(module)
            if step % 20 == 0:
                entry = {"step": step, "loss": loss.item()} | {k: float(v) for k, v in values.items()}
                log.write(json.dumps(entry | {"seconds": round(time.monotonic() - began, 1)}) + "\n")
                log.flush()
                bar.set_postfix({k: f"{v:.4f}" for k, v in entry.items() if k != "step"})
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == plan.steps:
                tensors = {name: tensor.clone() for name, tensor in state_tensors(modules, optimizer).items()}
                save_tensors(tensors, path, {"step": str(step + 1)})
                show(average.module, step + 1)
    return average.module


def grid(*rows: Tensor) -> Image.Image:
    """Rows of images [N, 3, H, W] in [-1, 1] as one picture."""
    return to_picture(torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1))


def load_trained(path: Path, module: nn.Module, inside: str = "") -> None:
    """Load an earlier stage's averaged weights into `module`: all of them, or those whose names begin with `inside`."""
    tensors, prefix = read_tensors(path)[0], f"average.module.{inside}"
    module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
