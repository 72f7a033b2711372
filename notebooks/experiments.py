"""The trainings that the notebooks read: `python notebooks/experiments.py`, or with the names of some of TABLE.

Each differs from train.py's default in one thing. A run is kept in runs/NAME-SEED and its log copied to docs/logs; one
that is complete is not run again, one that was stopped goes on, and what was scored stays. Delete runs/ when the base
or the defaults have changed.
"""

import math
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.command import run_command_line

import scores

import ablations
import data
import train
from controlnet import ControlNet
from convergence import HeldOut
from stable_diffusion import SD15, TINY, StableDiffusion
from support.files import read_log, write_log

STEPS, RATE = TINY.max_train_steps, TINY.learning_rate
EQUAL = STEPS // 2  # steps after which trainings are compared: until then the rate is constant in all of them


def hints_changed(change: Callable[[Callable[[int], Tensor], int], Tensor]) -> AbstractContextManager:
    """Training pairs, but not held-out ones, get the hint that `change` makes of (index -> hint, index)."""

    def open_pairs(*options):
        pairs, held_out = data.open_pairs(*options)
        pairs.hint = partial(change, pairs.hint)
        return pairs, held_out

    return patch.object(train, "open_pairs", open_pairs)


def features_scaled(factor: float) -> AbstractContextManager:
    """What enters u, the hint encoder's zero convolution, is `factor` times as large. Files do not keep the factor."""
    from_unet = ControlNet.from_unet

    def scaled(*options):
        controlnet = from_unet(*options)
        controlnet.hint_encoder[-2].register_forward_hook(lambda silu, inputs, features: factor * features)
        return controlnet

    return patch.object(ControlNet, "from_unet", scaled)


def gaussian_as_default(*convs: nn.Conv2d) -> None:
    """Gaussian weights of the standard deviation of PyTorch's own, uniform ones, 1/√(3 fan_in); ablations has 0.02."""
    for conv in convs:
        nn.init.kaiming_normal_(conv.weight, a=math.sqrt(5))


SD15_SCALE = property(lambda sd: SD15.latent_scale, lambda sd, scale: None)  # whatever the base's file says


class Training(NamedTuple):
    """Trainings that differ in their seed alone."""

    options: str = ""
    seeds: int = 3
    steps: int = EQUAL
    change: Callable[[], AbstractContextManager] = nullcontext


ALWAYS = "--validation-hints 32 --validation-steps 0 --snapshot-steps 0 --cooldown 0 --num-workers 0"
TABLE = {
    "seeds": {"seed": Training(f"--snapshot-steps 1 --cooldown {TINY.cooldown}", 5, STEPS)},  # the default
    "steps": {"steps-double": Training(f"--cooldown {TINY.cooldown}", 3, 2 * STEPS)},
    "rate": {
        "rate-double": Training(f"--learning-rate {2 * RATE:g}"),
        "rate-half": Training(f"--learning-rate {RATE / 2:g}", steps=2 * EQUAL),
    },
    "features": {f"features-{factor:g}": Training(change=partial(features_scaled, factor)) for factor in (0.25, 4)},
    "ablation": {
        "gaussian": Training("--connection gaussian"),
        "gaussian-default": Training(
            "--connection gaussian", change=partial(patch.object, ablations, "gaussian_weights", gaussian_as_default)
        ),
        "lite": Training("--copy lite", steps=3 * EQUAL),
    },
    "batch": {f"batch-{n}": Training(f"--train-batch-size {n}", 3, 32 // n * EQUAL) for n in (8, 16)},
    "pairs": {  # beside seed, which has 1,000
        "pairs-30": Training(
            f"--snapshot-steps 40 --cooldown {TINY.cooldown}", 3, STEPS, partial(patch.dict, data.DRAWN_PAIRS, drawn=30)
        )
    },
    "failures": {
        "early": Training(seeds=1, steps=STEPS // 8),  # the only one that needs nothing but time
        "shuffled": Training(seeds=1, change=partial(hints_changed, lambda hint, i: hint(i ^ 1))),
        "inverted": Training(seeds=1, change=partial(hints_changed, lambda hint, i: 1 - hint(i))),
        "black": Training(seeds=1, change=partial(hints_changed, lambda hint, i: 0 * hint(i))),
        "rate-low": Training(f"--learning-rate {RATE / 20:g}", seeds=1),
        "rate-high": Training(f"--learning-rate {20 * RATE:g}", seeds=1),
        "wrong-base": Training(  # one whose latents are scaled otherwise
            seeds=1, change=partial(patch.object, StableDiffusion, "latent_scale", SD15_SCALE, create=True)
        ),
        "prompts-kept": Training("--proportion-empty-prompts 0", seeds=1),
    },
    "palette": {},  # of the ControlNets that ship
    "fill50k": {},
}


@torch.no_grad()
def factors(controlnet: ControlNet, hints: Tensor) -> dict[str, float]:
    """Root mean squares of what the hint's way to the output is made of, to first order a product.

    s: the features that enter u, what varies of them over the picture. u and v: the weights of the hint encoder's zero
    convolution and of the 13 output zero convolutions (their median).
    """

    def rms(x: Tensor) -> float:
        return x.square().mean().sqrt().item()

    *encoder, u = controlnet.hint_encoder
    features = nn.Sequential(*encoder)(hints)
    v = median(rms(conv.weight) for conv in (*controlnet.zero_convs, controlnet.middle_zero_conv))
    return {"s": rms(features - features.mean((2, 3), keepdim=True)), "u": rms(u.weight), "v": v}


def run(name: str, training: Training, seed: int) -> None:
    """Train as far as it is not yet done, logging `factors` with each hint sensitivity, and copy the log."""
    folder, measure = scores.RUNS / f"{name}-{seed}", HeldOut.response
    options = f"--seed {seed} --max-train-steps {training.steps} {ALWAYS} {training.options}".split()
    if (folder / "config.json").exists():
        options += ["--resume-from-checkpoint", "latest"]
    command = ["train.py", "--output-dir", str(folder), *options]

    def measured(held_out, denoiser):
        return measure(held_out, denoiser) | factors(denoiser.controlnet, held_out.own)

    if len(read_log(folder / "log.jsonl")) < training.steps:
        with training.change(), patch.object(HeldOut, "response", measured), patch.object(sys, "argv", command):
            train.main()
    if len(read_log(folder / "log.jsonl")) < training.steps:
        sys.exit(f"stopped: the same command goes on with {folder}")
    shutil.copy(folder / "log.jsonl", scores.LOGS / f"{folder.name}.jsonl")


def score(group: str, arms: list[scores.Arm]) -> list[dict]:
    """What docs/logs/scores-GROUP.jsonl holds; nothing where the logs say all."""
    seed = [("seed", i, EQUAL) for i in range(3)]
    match group:
        case "seeds":
            return scores.score_seeds(len(arms), STEPS)
        case "steps":
            return [
                {"run": name, "seed": i, "fresh": scores.score_fresh(scores.load_arm(name, i, None), i)}
                for name, i, _ in arms
            ]
        case "ablation":
            return scores.score_ablation(seed + arms)
        case "failures":
            return scores.score_failures([seed[0], *arms])
        case "palette":
            return scores.score_palette()
        case "fill50k":
            return scores.score_fill50k()
        case "pairs":
            for name, i, _ in arms:
                scores.follow(name, i, range(0, STEPS + 1, 40))
    return []


def main() -> None:
    groups = sys.argv[1:] or list(TABLE)
    if unknown := set(groups) - set(TABLE):
        sys.exit(f"no {', '.join(sorted(unknown))} in the table: {', '.join(TABLE)}")
    for group in groups:
        ends = [(name, i, None) for name, training in TABLE[group].items() for i in range(training.seeds)]
        for name, seed, _ in ends:
            run(name, TABLE[group][name], seed)
        if rows := score(group, ends):
            write_log(scores.LOGS / f"scores-{group}.jsonl", rows)


if __name__ == "__main__":
    run_command_line(main)
