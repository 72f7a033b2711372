"""Time and memory of the same work here and in diffusers, side by side, and where the time goes.

`python -m tools.bench train | tiny | sample` runs both in turn, each in a process of its own, on random weights of SD
1.5's size (`tiny`: the miniature's). Needs requirements-dev.txt. Peak memory is the process's resident set on a CPU,
CUDA's allocations on a GPU.
"""

import os
import re
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median

from support.command import run_command_line

import torch
import torch.nn.functional as F
from torch import nn

from controlnet import ControlNet, Denoiser
from diffusion import NoiseSchedule
from sample import generate
from stable_diffusion import SD15, TINY, StableDiffusion
from support import options
from support.devices import PRECISIONS, choose_device, place, place_for_sampling
from tools import versus_diffusers as theirs
from tools.versus_diffusers import GUIDANCE_SCALE, SAMPLING_STEPS, Work
from vae import sample_latent


def networks(args: Namespace, device: torch.device) -> tuple[StableDiffusion, ControlNet]:
    """A base whose tokenizer gives `args.ids`, and a ControlNet in float32, with random weights."""
    preset = args.preset
    sd = StableDiffusion(lambda _: args.ids, preset.text, preset.vae, preset.unet, preset.latent_scale)
    controlnet = ControlNet.from_unet(sd.requires_grad_(False).to(device).unet, preset.hint_channels, preset.hint_init)
    return sd, controlnet


def training(args: Namespace, device: torch.device) -> Work:
    """A step of train.py, when it meets the pictures for the first time; the miniature knows them from earlier."""
    sd, controlnet = networks(args, device)
    precision, schedule = PRECISIONS[args.precision], NoiseSchedule(device=device)
    model = place(Denoiser(sd.unet, controlnet, precision=precision), device)
    learning = model.trainable_parameters()
    optimizer = torch.optim.AdamW(learning, lr=args.preset.learning_rate, fused=True)
    images, hints = torch.rand(2, args.batch_size, 3, args.resolution, args.resolution).to(device)
    encode = cache(sd.vae.encode) if args.work == "tiny" else sd.vae.encode

    def step(lap: Callable[[str], None]) -> None:
        with torch.no_grad(), torch.autocast(device.type, precision, enabled=args.precision != "fp32"):
            moments, context = encode(images).float(), sd.encode_prompts([""] * len(images))
        lap("encode")
        vae_noise, eps = torch.randn(2, *moments[:, :4].shape, device=device)
        t = torch.randint(schedule.steps, (len(eps),), device=device)
        z0 = sd.latent_scale * sample_latent(moments, vae_noise)
        predicted = model(schedule.add_noise(z0, eps, t), t, context, hints)
        lap("forward")
        F.mse_loss(predicted, eps).backward()  # equation (5)
        nn.utils.get_total_norm([p.grad for p in learning]).item()  # for the log
        lap("backward")
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer")

    return step


def sampling(args: Namespace, device: torch.device) -> Work:
    sd, controlnet = networks(args, device)
    place_for_sampling(sd, device, args.precision)
    controlnet.to(device, sd.unet.conv_out.weight.dtype)
    hints, prompts = torch.rand(args.batch_size, 3, args.resolution, args.resolution), [""] * args.batch_size

    def step(lap: Callable[[str], None]) -> None:
        generate(sd, [controlnet], [hints], prompts, steps=SAMPLING_STEPS, guidance_scale=GUIDANCE_SCALE)
        lap("sampling")

    return step


WORK = {  # sizes, batch, pixels, our side, diffusers' side
    "train": (SD15, 1, 256, training, theirs.training),
    "tiny": (TINY, 8, 128, training, theirs.training),
    "sample": (SD15, 1, 256, sampling, theirs.sampling),
}


def measure(args: Namespace, side: int) -> Namespace:
    """Of one side: seconds of each part in each step, and peak memory in bytes."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    device = choose_device(args.device, tune=side == 0)  # as train.py and sample.py do
    torch.manual_seed(0)
    args.preset = WORK[args.work][0]
    args.ids = torch.full((args.batch_size, 77), args.preset.text.vocab_size - 1)  # the work depends on no word
    work, parts, now = WORK[args.work][3 + side](args, device), defaultdict(list), 0.0

    def lap(part: str) -> None:
        nonlocal now
        if device.type == "cuda":
            torch.cuda.synchronize()
        before, now = now, time.perf_counter()
        parts[part].append(now - before)

    work(lap)  # to warm up
    parts.clear()
    for _ in range(args.steps):
        work(lap)
    if device.type == "cuda":
        return Namespace(parts=parts, peak=torch.cuda.max_memory_allocated())
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return Namespace(parts=parts, peak=int(peak[1]) * 1024)


def report(args: Namespace, results: tuple[list[Namespace], list[Namespace]]) -> None:
    """A table of what the rounds of both sides measured."""
    print(f"{args.work}: batch {args.batch_size}, {args.resolution}x{args.resolution}, {args.precision}")
    print(f"{'':>24} {'here':>10} {'diffusers':>10}")
    seconds = [median(sum(laps) for r in rounds for laps in zip(*r.parts.values())) for rounds in results]
    gigabytes = [median(r.peak for r in rounds) / 1e9 for rounds in results]
    rows = {"seconds, median": seconds, "peak memory, GB": gigabytes}
    for part in results[0][0].parts:
        rows[f"{part}, s, mean"] = [fmean(lap for r in rounds for lap in r.parts[part]) for rounds in results]
    for name, (ours, others) in rows.items():
        print(f"{name:>24} {ours:>10.3f} {others:>10.3f}")
    print(f"ratio time {seconds[0] / seconds[1]:.2f}, memory {gigabytes[0] / gigabytes[1]:.2f}")


def main() -> None:
    parser = options.ArgumentParser(prog="python -m tools.bench", description="Time and memory, here and in diffusers.")
    add = parser.add_argument
    add("work", choices=WORK)
    add("--resolution", type=options.side, help="default: 256, tiny 128")
    add("--batch-size", type=options.positive_int, help="default: 1, tiny 8")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast and a bfloat16 locked part")
    options.add_device(parser)
    add("--steps", type=options.positive_int, default=3, help="timed in each process, after one more (default: 3)")
    add("--rounds", type=options.positive_int, default=2, help="times that both sides take their turn (default: 2)")
    args = parser.parse_args()
    _, batch_size, resolution, *_ = WORK[args.work]
    args.batch_size, args.resolution = args.batch_size or batch_size, args.resolution or resolution
    results: tuple[list[Namespace], list[Namespace]] = [], []
    for side in [0, 1] * args.rounds:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a process of its own
            results[side].append(pool.submit(measure, args, side).result())
    report(args, results)


if __name__ == "__main__":
    run_command_line(main, "a lower --batch-size or --resolution")
