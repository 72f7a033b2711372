"""Inside the first steps of a training: `python notebooks/mechanism.py` writes four logs in docs/logs for each seed.

The training is train.py's, of the miniature's preset: same weights, batches, noise and arithmetic. Its learning rate
falls only after these steps. After each of them, before its gradients are dropped, `Mechanism` looks at the factors on
the hint's way to the output:

    hint -> the rest of the hint encoder -> u, its zero convolution -> the copy -> v, the 13 output zero convolutions

mechanism-SEED.jsonl has what it saw. Sizes do not say what a factor does. So after the training `exchanges` puts
networks together from the snapshots of two steps: exchange-SEED.jsonl has how far the hint moves their predictions.

held-SEED.jsonl is of another training, which leaves the hint encoder before u as it was initialised; large-SEED.jsonl
is of one that leaves it so too, but first makes its last layer 40 times as large.

What has all its steps is not trained again. A seed takes twelve minutes of one core of an AMD EPYC with AVX-512
(2026-11-27).
"""

import argparse
import dataclasses
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from controlnet import ControlNet, Denoiser
from convergence import HeldOut
from support.errors import run_command_line
from support.log import read_log, write_log
from support.run import WHAT_A_RUN_LEAVES, Run
from train import parse_arguments, prepare, train
from weights import load_controlnet

STEPS, LOCKED_STEPS, SEEDS = 108, 160, range(5)
LOCKED = {"held": 1, "large": 40}  # the features grow 27- to 75-fold in the trainings that are not locked
EXCHANGED, SNAPSHOTS = ((10, 40), (40, 60)), 10  # the rise and what follows it, up to the jump; steps between snapshots
PARTS = ("encoder", "u", "copy", "v")
SHUFFLES = 20
FIELDS = ("step", "loss", "lr", "hint_sensitivity", "hint_gap", "heldout_loss")  # of train.py's log


class Mechanism:
    """Measures a ControlNet whenever the optimizer has made a step; `entries` has a dict for each step.

    u_weight, u_bias, v0 to v12: root mean square of the weights of u (its bias apart) and of each v, after the step.
    features, condition: what enters u and what leaves it, on the given hints, after the step. Root mean square of
    what varies over the picture: each channel's mean over the picture is taken off.
    Cosines of gradients, as one vector for all weights and biases of u, of v, and of the rest of the hint encoder
    (u, v, encoder): turn_* is between this step's gradient and the one before; halves_* between those of the two
    halves of the step's batch, which share their signal but not their noise. Left out where a gradient is exactly 0.
    """

    def __init__(self, controlnet: ControlNet, hints: Tensor):
        *encoder, self.u = controlnet.hint_encoder
        self.v = [*controlnet.zero_convs, controlnet.middle_zero_conv]
        self.encoder, self.hints = nn.Sequential(*encoder), hints
        self.groups = {"u": [self.u], "v": self.v, "encoder": [layer for layer in encoder if hasattr(layer, "weight")]}
        self.halves, self.before, self.entries = {}, {}, []
        for conv in (conv for convs in self.groups.values() for conv in convs):
            conv.register_forward_hook(self.await_gradient)

    def await_gradient(self, conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self.split_gradient, conv, inputs[0].detach()))

    def split_gradient(self, conv: nn.Conv2d, inputs: Tensor, gradient: Tensor) -> None:
        """The gradients of a convolution's weight and bias, from each half of the batch."""
        self.halves[conv] = [
            torch.cat([conv2d_weight(x, conv.weight.shape, g, conv.stride, conv.padding).flatten(), g.sum((0, 2, 3))])
            for x, g in zip(inputs.chunk(2), gradient.chunk(2))
        ]

    @torch.no_grad()
    def measure(self, *_) -> None:
        entry = {"u_weight": rms(self.u.weight), "u_bias": rms(self.u.bias)}
        entry |= {f"v{i}": rms(conv.weight) for i, conv in enumerate(self.v)}
        features = self.encoder(self.hints)
        entry |= {"features": variation(features), "condition": variation(self.u(features))}
        for name, convs in self.groups.items():
            gradient = torch.cat([p.grad.flatten() for conv in convs for p in (conv.weight, conv.bias)])
            halves = [torch.cat(parts) for parts in zip(*(self.halves[conv] for conv in convs))]
            entry |= cosine(f"turn_{name}", gradient, self.before.get(name, torch.zeros_like(gradient)))
            entry |= cosine(f"halves_{name}", *halves)
            self.before[name] = gradient
        self.entries.append(entry)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def variation(features: Tensor) -> float:
    return rms(features - features.mean((2, 3), keepdim=True))


def cosine(name: str, a: Tensor, b: Tensor) -> dict[str, float]:
    a, b = a.double(), b.double()  # early gradients are so small that their squares are 0 in float32
    norms = (a.norm() * b.norm()).item()
    return {name: (a @ b).item() / norms} if norms > 0 else {}


def part_of(name: str, controlnet: ControlNet) -> str:
    """The factor that a tensor of the state dict belongs to."""
    if name.startswith("hint_encoder."):
        return "u" if name.startswith(f"hint_encoder.{len(controlnet.hint_encoder) - 1}.") else "encoder"
    return "v" if name.startswith(("zero_convs.", "middle_zero_conv.")) else "copy"


@torch.no_grad()
def exchanges(denoiser: Denoiser, held_out: HeldOut, before: dict[str, Tensor], after: dict[str, Tensor]) -> dict:
    """What the parts did between two states of `denoiser.controlnet`, which is left in a mixture of them.

    before, after: hint sensitivity of the two. only_*: with this part alone from `after`. all_but_*: with all others
    from there. features_before, features_after: the hint features (see Mechanism). features_only: with one layer of the
    hint encoder from `after`, for each before u. features_shuffled: with what each layer's weight, or bias, has gained
    added to it in a random order, for each of 20 orders. moved: root mean square of what a layer's weight has gained.
    """
    controlnet = denoiser.controlnet
    *encoder, _ = controlnet.hint_encoder

    def sensitivity(*parts: str) -> float:
        controlnet.load_state_dict(before | {n: x for n, x in after.items() if part_of(n, controlnet) in parts})
        return held_out.response(denoiser)["hint_sensitivity"]

    def features(changed: dict[str, Tensor]) -> float:
        controlnet.load_state_dict(before | changed)
        return variation(nn.Sequential(*encoder)(held_out.own))

    entry = {"before": sensitivity(), "after": sensitivity(*PARTS)}
    entry |= {f"only_{part}": sensitivity(part) for part in PARTS}
    entry |= {f"all_but_{part}": sensitivity(*(other for other in PARTS if other != part)) for part in PARTS}

    layers = [f"hint_encoder.{i}." for i, layer in enumerate(encoder) if hasattr(layer, "weight")]
    added = {n: after[n] - before[n] for n in before if part_of(n, controlnet) == "encoder"}
    generator = torch.Generator().manual_seed(0)

    def shuffled(x: Tensor) -> Tensor:
        return x.flatten()[torch.randperm(x.numel(), generator=generator)].view_as(x)

    return entry | {
        "features_before": features({}),
        "features_after": features({n: after[n] for n in added}),
        "features_only": [features({n: after[n] for n in added if n.startswith(layer)}) for layer in layers],
        "features_shuffled": [
            features({n: before[n] + shuffled(x) for n, x in added.items()}) for _ in range(SHUFFLES)
        ],
        "moved": [rms(added[f"{layer}weight"]) for layer in layers],
    }


def options(name: str, steps: int, seed: int) -> tuple[argparse.Namespace, Path]:
    """train.py's options for a run that starts over in runs/NAME-SEED, and that folder."""
    folder = ROOT / "runs" / f"{name}-{seed}"
    for path in (folder / left for left in WHAT_A_RUN_LEAVES):  # by one that was stopped; what is encoded stays
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    sys.argv = ["train.py", "--output-dir", str(folder), "--max-train-steps", str(steps), "--seed", str(seed),
                "--validation-steps", "0", "--snapshot-steps", str(SNAPSHOTS), "--cooldown", "0"]  # fmt: skip
    return parse_arguments(), folder


def measured_training(seed: int, steps: int) -> tuple[list[dict], list[dict]]:
    """train.py's training of one seed, `steps` long: what was measured at each step, and the exchanges after it."""
    args, folder = options("mechanism", steps, seed)
    with Run(args) as run:
        args, denoiser, optimizer, cached, latent_scale, held_out = prepare(args, run)
        args.preset = dataclasses.replace(args.preset, response_steps=1)  # hint sensitivity and gap at each step
        mechanism = Mechanism(denoiser.controlnet, held_out.own)
        optimizer.register_step_post_hook(mechanism.measure)
        train(args, run, denoiser, optimizer, cached, latent_scale, held_out)
    entries = [{name: entry[name] for name in FIELDS} | m for entry, m in zip(run.history, mechanism.entries)]
    done = [(a, b) for a, b in EXCHANGED if b <= len(entries)]
    exchanged = [
        {"step": b, "from": a} | exchanges(denoiser, held_out, *snapshots(folder, denoiser, a, b)) for a, b in done
    ]
    return [rounded(entry) for entry in entries], [rounded(entry) for entry in exchanged]


def locked_training(name: str, seed: int, steps: int) -> list[dict]:
    """The same training, but that the hint encoder before u is LOCKED[name] times as large in its last layer and stays.

    Returns what train.py logs of it.
    """
    args, _ = options(name, steps, seed)
    with Run(args) as run:
        args, denoiser, *others = prepare(args, run)
        layers = [layer for layer in list(denoiser.controlnet.hint_encoder)[:-1] if hasattr(layer, "weight")]
        for layer in layers:
            layer.requires_grad_(False)
        for parameter in layers[-1].parameters():
            parameter *= LOCKED[name]
        train(args, run, denoiser, *others)
    return [rounded({name: entry[name] for name in FIELDS if name in entry}) for entry in run.history]


def snapshots(folder: Path, denoiser: Denoiser, *steps: int) -> list[dict[str, Tensor]]:
    files = (folder / "snapshots" / f"step-{step}.safetensors" for step in steps)
    return [load_controlnet(file, denoiser.unet).state_dict() for file in files]


def rounded(entry: dict) -> dict:
    def to_four_digits(value):
        if isinstance(value, list):
            return [to_four_digits(x) for x in value]
        return value if isinstance(value, int) else float(f"{value:.4g}")

    return {name: to_four_digits(value) for name, value in entry.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Log the factors on the hint's way in the first steps of trainings.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default: {STEPS})")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2 3 4")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "logs", help="folder (default: docs/logs)")
    args = parser.parse_args()
    for seed in args.seeds:
        paths = {name: args.output / f"{name}-{seed}.jsonl" for name in ("mechanism", "exchange", *LOCKED)}
        if len(read_log(paths["mechanism"])) < args.steps:
            entries, exchanged = measured_training(seed, args.steps)
            stop_if_stopped(entries, args.steps)
            write_log(paths["exchange"], exchanged)
            write_log(paths["mechanism"], entries)
        for name in LOCKED:
            if len(read_log(paths[name])) < LOCKED_STEPS:
                entries = locked_training(name, seed, LOCKED_STEPS)
                stop_if_stopped(entries, LOCKED_STEPS)
                write_log(paths[name], entries)


def stop_if_stopped(entries: list[dict], steps: int) -> None:
    if len(entries) < steps:
        sys.exit("stopped: run it again, and this training starts over")


if __name__ == "__main__":
    run_command_line(main)
