"""Time and memory of the same work here and in diffusers, side by side, and where the time goes.

`python -m tools.bench train | sample | load | tiny` runs both in turn, each in a process of its own, on random weights
of SD 1.5's size (`tiny`: the miniature's). `python -m tools.bench grow` runs this project alone, over batch and picture
sizes. Needs requirements-dev.txt. Peak memory is the process's resident set on a CPU, CUDA's allocations on a GPU.
"""

import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from clip_text import NUM_MERGES, byte_symbols
from controlnet import ControlNet, Denoiser
from sample import generate
from stable_diffusion import SD15, TINY, Preset, StableDiffusion
from support.devices import PRECISIONS, choose_device, place, place_for_sampling
from support.errors import UserError, run_command_line
from support.files import save_tensors
from support.options import ArgumentParser, positive_float, positive_int
from support.options import side as multiple_of_64
from support.run import Batch
from tools import versus_diffusers as theirs
from train import train
from unet import UNet
from weights import official_state_dict

ROOT = Path(__file__).parents[1]
WARM_UP = 1  # steps that are not counted
QUIET = 0.8  # of the time a process runs, at least, when it has the machine to itself


class Timer:
    """A stopwatch for `count` steps; `laps` has the seconds of each one's parts. After its last lap nothing counts.

    `running` has the share of each step's time in which this thread ran. On a CPU it waits for nothing but the
    processor; on a GPU it waits for the card, and the share says nothing.
    """

    def __init__(self, device: torch.device, count: int):
        self.device, self.count, self.laps, self.running = device, count, [], []

    def steps(self) -> Iterator[int]:
        for step in range(1, self.count + 1):
            self.laps.append(defaultdict(float))
            began = self.last = self.now()
            ran = time.thread_time()
            yield step
            self.running.append((time.thread_time() - ran) / (self.now() - began))

    def lap(self, part: str) -> None:
        """Count the time since the last lap, or since the step began, as this part's."""
        before, self.last = self.last, self.now()
        self.laps[-1][part] += self.last - before

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class TimedRun:
    """What train.py's loop needs of a support.run.Run: one process, no folder, and each step timed."""

    def __init__(self, device: torch.device, timer: Timer, compiled: bool):
        self.device, self.timer, self.compiled, self.start = device, timer, compiled, 0
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)

    def steps(self) -> Iterator[int]:
        for step in self.timer.steps():
            yield step
            self.timer.lap("optimizer")

    def distribute(self, model: nn.Module) -> nn.Module:
        model = torch.compile(model) if self.compiled else model
        model.register_forward_pre_hook(lambda *_: self.timer.lap("latents"))
        model.register_forward_hook(lambda *_: self.timer.lap("forward"))
        return model

    def batches(self, cached: Namespace) -> Iterator[Batch]:
        return (cached.batch._replace(number=number) for number in itertools.count())

    def share(self, drawn: Tensor) -> Tensor:
        return drawn.to(self.device, non_blocking=True)

    def accumulating(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def mean(self, value: Tensor) -> float:
        return value.item()

    def log(self, entry: dict) -> None:
        self.history = [entry]

    def due(self, step: int, every: int) -> bool:
        return False

    def due_to_save(self, step: int) -> bool:
        return False

    def check(self, *measured) -> None: ...

    def finished(self, entry: dict) -> dict:
        return entry

    def say(self, *lines: str) -> None: ...


def training(args: Namespace, device: torch.device, timer: Timer) -> None:
    """train.py's own loop on random numbers: it too has encoded all images and prompts before."""
    preset, size, pixels = args.preset, args.batch_size, args.resolution
    unet = UNet(preset.unet).to(device)
    controlnet = ControlNet.from_unet(unet, preset.hint_channels, preset.hint_init)
    denoiser = Denoiser(
        unet, controlnet, precision=PRECISIONS[args.precision], checkpointing=args.gradient_checkpointing
    )  # fmt: skip
    place(denoiser, device)
    optimizer = torch.optim.AdamW(denoiser.trainable_parameters(), lr=preset.learning_rate, fused=True)
    optimizer.register_step_pre_hook(lambda *_: timer.lap("backward"))
    shapes = (size, 3, pixels, pixels), (size, 8, pixels // 8, pixels // 8), (size, 77, preset.unet.context_dim)
    hint, moments, context = (torch.rand(shape, device=device) for shape in shapes)
    cached = Namespace(batch=Batch(0, size, [], hint, moments, context), empty_context=context[0])
    options = Namespace(
        preset=preset, seed=0, gradient_accumulation_steps=1, learning_rate=preset.learning_rate,
        cooldown=0.0, max_train_steps=10**9, proportion_empty_prompts=0.5, validation_steps=0, snapshot_steps=0,
    )  # fmt: skip
    run = TimedRun(device, timer, args.compile)
    train(options, run, denoiser, optimizer, cached, preset.latent_scale, held_out=None)


def sampling(args: Namespace, device: torch.device, timer: Timer) -> None:
    preset = args.preset
    sd = StableDiffusion(
        lambda prompts: theirs.token_ids(len(prompts), preset), preset.text, preset.vae, preset.unet, 1.0
    )
    controlnet = ControlNet.from_unet(sd.unet, preset.hint_channels)
    place_for_sampling(sd, [controlnet], device, args.precision)
    hints = torch.rand(args.batch_size, 3, args.resolution, args.resolution)

    for _ in timer.steps():
        generate(
            sd, [controlnet], [hints], [""] * args.batch_size,
            steps=theirs.SAMPLING_STEPS, guidance_scale=theirs.GUIDANCE_SCALE,
        )  # fmt: skip
        timer.lap("sampling")


def loading(args: Namespace, device: torch.device, timer: Timer) -> None:
    for _ in timer.steps():
        sd = StableDiffusion.load(f"{args.folder}/model.safetensors").to(device)
        timer.lap("load")
        with torch.no_grad():
            sd.unet(*theirs.first_inputs(device))
        timer.lap("first forward")


def write_checkpoint(folder: Path) -> None:
    """A checkpoint of SD 1.5's size with random weights, for `load`, and what each side wants beside it."""
    symbols = byte_symbols().values()
    merges = [f"{a} {b}" for a, b in itertools.islice(itertools.product(symbols, symbols), NUM_MERGES)]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    with torch.device("meta"):
        sd = StableDiffusion(None, SD15.text, SD15.vae, SD15.unet, SD15.latent_scale)
    shapes = {k: v.shape for part in (sd.unet, sd.vae, sd.text_encoder) for k, v in official_state_dict(part).items()}
    save_tensors({k: 0.02 * torch.randn(shape) for k, shape in shapes.items()}, folder / "model.safetensors")
    sizes = {"unet": SD15.unet, "vae": SD15.vae, "text": SD15.text, "latent_scale": SD15.latent_scale}
    theirs.write_config(folder / "config", sizes)


WORK = {  # sizes, our side, diffusers' side
    "train": (SD15, training, theirs.training),
    "tiny": (TINY, training, theirs.training),
    "sample": (SD15, sampling, theirs.sampling),
    "load": (SD15, loading, theirs.loading),
}
SIDES = ("here", "diffusers")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that CUDA had allocated, or the most that the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(args: Namespace) -> dict:
    """One side, in this process: seconds of each step, seconds of the parts in the mean, peak memory in bytes."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    device = choose_device(args.device, tune=args.side == "here")  # as train.py and sample.py do
    if args.memory_cap_gb and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_cap_gb * 2**30 / total))
    torch.manual_seed(0)
    args.preset, *sides = WORK[args.work]
    warm_up = 0 if args.work == "load" else WARM_UP
    timer = Timer(device, warm_up + args.steps)
    sides[SIDES.index(args.side)](args, device, timer)
    steps = timer.laps[warm_up:]
    parts = {part: statistics.mean(step[part] for step in steps) for part in steps[0]}
    seconds, running = [sum(step.values()) for step in steps], statistics.mean(timer.running[warm_up:])
    return {"seconds": seconds, "parts": parts, "running": running, "peak": peak_memory(device)}


def measure_apart(args: Namespace, side: str, **changed) -> dict:
    """measure() in a process of its own, start-up included for `load`. Raises UserError with its last line."""
    options = json.dumps(vars(args) | {"side": side} | changed)
    command = [sys.executable, "-m", "tools.bench", args.work, "--worker", options]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed, out of memory?"])[-1].removeprefix("error: ")
        raise UserError(f"{side} failed: {reason}")
    result = json.loads(done.stdout.splitlines()[-1])
    if args.work == "load":  # what a user waits for, from the first line of the program
        result["seconds"] = [time.perf_counter() - began]
        result["parts"]["start-up and imports"] = result["seconds"][0] - sum(result["parts"].values())
    return result


def count(preset: Preset, batch_size: int, resolution: int, checkpointing: bool = False) -> tuple[int, int]:
    """FLOPs of a locked training step (multiply-adds times two), and the bytes that it keeps for the backward pass
    if all of them were float32. Counted on the meta device, without memory or arithmetic.
    """
    side, kept = resolution // 8, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # the storage itself, so that its address is not given to another one
        return tensor

    def flash(q, k, v):  # as on a GPU and on the CPU; the meta device would keep the N x N matrix
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    with torch.device("meta"):
        unet = UNet(preset.unet).requires_grad_(False)
        controlnet = ControlNet.from_unet(unet, preset.hint_channels)
        controlnet.checkpointing = unet.checkpointing = checkpointing
        z, t = torch.empty(batch_size, 4, side, side), torch.empty(batch_size, dtype=torch.int64)
        context = torch.empty(batch_size, 77, preset.unet.context_dim)
        hint = torch.empty(batch_size, 3, resolution, resolution)
        with FlopCounterMode(display=False) as counter:
            unet(z, t, context, controlnet(z, hint, t, context)).sum().backward()
        with patch.object(F, "scaled_dot_product_attention", flash), saved_tensors_hooks(keep, lambda x: x):
            unet(z, t, context, controlnet(z, hint, t, context))
    parameters = {p.untyped_storage()._cdata for module in (unet, controlnet) for p in module.parameters()}
    return counter.get_total_flops(), sum(s.nbytes() for key, s in kept.items() if key not in parameters)


def matmul_peak(precision: str, device: torch.device) -> float:
    """FLOP/s of a large matrix product: the best that the machine gives."""
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    timer = Timer(device, 5)
    for _ in timer.steps():
        a @ a
        timer.lap("product")
    return 2 * 4096**3 / min(step["product"] for step in timer.laps)


def compare(args: Namespace) -> None:
    """Both sides in turn, `rounds` times, and a table of medians."""
    results: tuple[list[dict], list[dict]] = [], []
    with tempfile.TemporaryDirectory() as folder:
        if args.work == "load":
            write_checkpoint(Path(folder))
        for _ in range(args.rounds):
            for side, precision, rounds in zip(SIDES, (args.precision, args.peer_precision), results):
                rounds.append(measure_apart(args, side, precision=precision, folder=folder))
    seconds = [statistics.median(s for r in rounds for s in r["seconds"]) for rounds in results]
    peaks = [statistics.median(r["peak"] for r in rounds) for rounds in results]
    batch = f"batch {args.batch_size}, {args.resolution}x{args.resolution}, " if args.work != "load" else ""
    print(f"{args.work}: {batch}{args.precision} here, {args.peer_precision} in diffusers, median of "
          f"{args.rounds * args.steps}")  # fmt: skip
    print(f"{'':>24} {'here':>10} {'diffusers':>10}")
    print(f"{'seconds':>24} {seconds[0]:>10.3f} {seconds[1]:>10.3f}")
    print(f"{'peak memory, GB':>24} {peaks[0] / 1e9:>10.2f} {peaks[1] / 1e9:>10.2f}")
    for part in dict.fromkeys(part for rounds in results for r in rounds for part in r["parts"]):
        means = [statistics.mean(r["parts"].get(part, 0) for r in rounds) for rounds in results]
        print(f"{part + ', s':>24} {means[0]:>10.3f} {means[1]:>10.3f}")
    if args.work in ("train", "tiny"):
        flops, _ = count(WORK[args.work][0], args.batch_size, args.resolution, args.gradient_checkpointing)
        best = matmul_peak(args.precision, choose_device(args.device, tune=False))
        reached = flops / seconds[0]
        print(f"a step is {flops / 1e12:.3f} TFLOP (counted): {reached / 1e9:.0f} GFLOP/s here, {reached / best:.0%} "
              f"of this machine's {best / 1e9:.0f} in a matrix product")  # fmt: skip
    refuse_if_busy(args, results)
    print(f"ratio time {seconds[0] / seconds[1]:.2f}, memory {peaks[0] / peaks[1]:.2f}")


def refuse_if_busy(args: Namespace, results: tuple[list[dict], list[dict]]) -> None:
    """Raise UserError when other processes took so much of the machine that a ratio would mean nothing."""
    on_cpu = choose_device(args.device, tune=False).type == "cpu"
    judged = on_cpu and args.work != "load"  # loading waits for the disk too
    running = min(r["running"] for rounds in results for r in rounds) if judged else 1.0
    medians = [[statistics.median(r["seconds"]) for r in rounds] for rounds in results]
    apart = max(max(rounds) / min(rounds) for rounds in medians)
    if running < QUIET or apart > 2:
        raise UserError(f"no ratio: the machine was busy (it ran {running:.0%} of the time, the slowest round took "
                        f"{apart:.1f} times as long as the fastest): try again when nothing else runs")  # fmt: skip


def grow(args: Namespace) -> None:
    """Cost of a training step over batch sizes and resolutions, here alone, beside what is counted."""
    args.work = "train"
    print(f"{'batch':>6} {'pixels':>8} {'TFLOP':>7} {'kept, GB':>9} {'s/step':>8} {'GB':>6} {'GFLOP/s':>8}")
    for resolution, batch_size in itertools.product((256, 384, 512), (1, 2, 4, 8)):
        flops, kept = count(SD15, batch_size, resolution, args.gradient_checkpointing)
        row = f"{batch_size:>6} {resolution:>8} {flops / 1e12:>7.2f} {kept / 1e9:>9.2f}"
        try:
            result = measure_apart(args, "here", batch_size=batch_size, resolution=resolution)
        except UserError as error:
            print(row, error, flush=True)
            continue
        seconds = statistics.median(result["seconds"])
        print(f"{row} {seconds:>8.2f} {result['peak'] / 1e9:>6.1f} {flops / seconds / 1e9:>8.0f}", flush=True)


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.bench", description="Time and memory, here and in diffusers.")
    add = parser.add_argument
    add("work", choices=(*WORK, "grow"))
    add("--resolution", type=multiple_of_64, help="default: 256, tiny 128")
    add("--batch-size", type=positive_int, help="default: 1, tiny 8")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast and a bfloat16 locked part")
    add("--peer-precision", choices=("fp32", "bf16"), help="diffusers' (default: as --precision)")
    add("--device", help="cpu, cuda, … (default: cuda if there is one, else cpu)")
    add("--compile", action="store_true", help="torch.compile on both sides")
    add("--gradient-checkpointing", action="store_true", help="on both sides")
    add("--memory-cap-gb", type=positive_float, help="of a CUDA card's memory, to play a smaller one")
    add("--steps", type=positive_int, default=3, help="timed steps in each process, after one to warm up (default: 3)")
    add("--rounds", type=positive_int, default=2, help="times that both sides take their turn (default: 2)")
    add("--worker", help="(one side, options as JSON; started by this program)")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(Namespace(**json.loads(args.worker)))))
        return
    args.peer_precision = args.peer_precision or args.precision
    args.resolution = args.resolution or (128 if args.work == "tiny" else 256)
    args.batch_size = args.batch_size or (8 if args.work == "tiny" else 1)
    args.steps = 1 if args.work == "load" else args.steps
    (grow if args.work == "grow" else compare)(args)


if __name__ == "__main__":
    run_command_line(main, "a lower --batch-size or --resolution")
