"""The same work here and in diffusers, side by side: seconds, memory, ratio, and where the time goes.

`python bench.py train | sample | load | tiny` runs both in turn, each in a process of its own, on random weights of
SD 1.5's size (`tiny`: the miniature's). `python bench.py grow` runs this project alone, over batch and picture sizes.
Needs requirements-dev.txt. Peak memory is the process's resident set on a CPU, CUDA's allocations on a GPU.
"""

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
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from clip_text import NUM_MERGES, byte_symbols
from controlnet import ControlNet
from diffusion import NoiseSchedule, denoising_loss
from files import ArgumentParser, UserError, choose_device, keep_freed_memory, run, save_tensors
from sample import generate
from stable_diffusion import SD15, TINY, StableDiffusion
from unet import UNet
from weights import official_state_dict

WARM_UP = 1  # steps that are not counted
PROMPT = "coral circle with blue background"
SAMPLING_STEPS = 4


class Clock:
    """Adds up the seconds of a step's parts."""

    def __init__(self, device: torch.device):
        self.device, self.parts = device, defaultdict(float)

    @contextmanager
    def __call__(self, part: str):
        began = self.now()
        yield
        self.parts[part] += self.now() - began

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Words:
    """A tokenizer that knows no words: the networks' work does not depend on them."""

    def __init__(self, vocab_size: int):
        self.last = vocab_size - 1

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        return torch.full((len(prompts), 77), self.last)


def preset_of(args: Namespace):
    return TINY if args.work == "tiny" else SD15


# ---------------------------------------------------------------------------------------------------------------
# Here


def our_models(args: Namespace, device: torch.device) -> StableDiffusion:
    preset = preset_of(args)
    words = Words(preset.text.vocab_size)
    return StableDiffusion(words, preset.text, preset.vae, preset.unet, preset.latent_scale).to(device)


def our_training(args: Namespace, device: torch.device):
    """train.py's step: images and prompts are encoded once, before; then VAE and text encoder are let go."""
    preset, bf16 = preset_of(args), args.precision == "bf16"
    sd = our_models(args, device).requires_grad_(False)
    size = (args.batch_size, 3, args.resolution, args.resolution)
    with torch.no_grad():
        moments = torch.cat([sd.vae.encode(torch.rand(1, *size[1:], device=device)) for _ in range(args.batch_size)])
        context = sd.encode_prompts([PROMPT] * args.batch_size)
    sd.vae = sd.text_encoder = None
    controlnet = ControlNet.from_unet(sd.unet, preset.hint_channels)
    if bf16:
        sd.unet.bfloat16()
    if device.type == "cuda" or preset is TINY:
        for module in (sd.unet, controlnet):
            module.to(memory_format=torch.channels_last)
    controlnet.checkpointing = sd.unet.checkpointing = args.gradient_checkpointing
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=1e-5, fused=True)
    hint, schedule = torch.rand(size, device=device), NoiseSchedule()

    def predict(z, t):
        return sd.unet(z, t, context, controlnet(z, hint, t, context))

    predict = torch.compile(predict) if args.compile else predict

    def step(clock: Clock) -> None:
        with clock("latents"):
            z0 = sd.sample_latents(moments, torch.randn_like(moments[:, :4]))
            t = torch.randint(1000, (args.batch_size,), device=device)
            eps = torch.randn_like(z0)
        with clock("forward"), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = denoising_loss(predict, z0, eps, t, schedule)
        with clock("backward"):
            loss.backward()
        with clock("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return step


def our_sampling(args: Namespace, device: torch.device):
    sd = our_models(args, device).requires_grad_(False)
    controlnet = ControlNet.from_unet(sd.unet, preset_of(args).hint_channels).requires_grad_(False)
    if args.precision == "bf16":
        sd.unet.bfloat16(), controlnet.bfloat16()
    hints = torch.rand(args.batch_size, 3, args.resolution, args.resolution)

    def step(clock: Clock) -> None:
        with clock("sampling"):
            generate(sd, [controlnet], [hints], [PROMPT] * args.batch_size, steps=SAMPLING_STEPS, guidance_scale=9.0)

    return step


def our_loading(args: Namespace, device: torch.device):
    def step(clock: Clock) -> None:
        with clock("load"):
            sd = StableDiffusion.load(args.folder / "model.safetensors").to(device)
        with clock("first forward"), torch.no_grad():
            sd.unet(*first_inputs(device))

    return step


def first_inputs(device: torch.device) -> tuple:
    return (
        torch.randn(1, 4, 32, 32, device=device),
        torch.tensor([5], device=device),
        torch.randn(1, 77, 768, device=device),
    )


# ---------------------------------------------------------------------------------------------------------------
# diffusers, as its train_controlnet.py and its pipelines do it


def their_text_config(text):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        intermediate_size=text.mlp_width,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
    )


def their_models(args: Namespace, device: torch.device, dtype=torch.float32) -> dict:
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextModel

    preset = preset_of(args)
    unet, vae, text = preset.unet, preset.vae, preset.text
    models = {
        "unet": UNet2DConditionModel(
            cross_attention_dim=unet.context_dim,
            attention_head_dim=unet.num_heads,
            norm_num_groups=unet.norm_groups,
            block_out_channels=[unet.model_channels * mult for mult in unet.channel_mult],
        ),
        "vae": AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[vae.channels * mult for mult in vae.channel_mult],
            layers_per_block=vae.num_res_blocks,
            norm_num_groups=vae.norm_groups,
        ),
        "text": CLIPTextModel(their_text_config(text)),
    }
    controlnet = ControlNetModel.from_unet(models["unet"], conditioning_embedding_out_channels=preset.hint_channels).to(
        device
    )
    return {name: m.to(device, dtype).requires_grad_(False) for name, m in models.items()} | {"controlnet": controlnet}


def their_training(args: Namespace, device: torch.device):
    """Image and prompt are encoded at each step; the gradient is clipped."""
    from diffusers import DDPMScheduler

    bf16 = args.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    models = their_models(args, device, dtype)
    unet, vae, text, controlnet = (models[name] for name in ("unet", "vae", "text", "controlnet"))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing(), controlnet.enable_gradient_checkpointing()
    if args.compile:
        unet, controlnet = torch.compile(unet), torch.compile(controlnet)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=1e-5)
    size = (args.batch_size, 3, args.resolution, args.resolution)
    images, hints = torch.rand(size, device=device), torch.rand(size, device=device)
    ids = Words(preset_of(args).text.vocab_size)([PROMPT] * args.batch_size).to(device)

    def step(clock: Clock) -> None:
        with clock("encode"), torch.no_grad():
            latents = vae.encode(images.to(dtype)).latent_dist.sample() * 0.18215
            context = text(ids)[0]
            noise = torch.randn_like(latents)
            t = torch.randint(0, 1000, (args.batch_size,), device=device)
            noisy = scheduler.add_noise(latents.float(), noise.float(), t).to(dtype)
        with clock("forward"), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            down, middle = controlnet(noisy, t, context, controlnet_cond=hints.to(dtype), return_dict=False)
            down, middle = [residual.to(dtype) for residual in down], middle.to(dtype)
            predicted = unet(
                noisy, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle,
                return_dict=False,
            )[0]  # fmt: skip
            loss = F.mse_loss(predicted.float(), noise.float())
        with clock("backward"):
            loss.backward()
        with clock("optimizer"):
            torch.nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def their_sampling(args: Namespace, device: torch.device):
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

    models = their_models(args, device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    pipeline = StableDiffusionControlNetPipeline(
        vae=models["vae"], text_encoder=None, tokenizer=None, unet=models["unet"],
        controlnet=models["controlnet"].to(models["unet"].dtype), safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                clip_sample=False, set_alpha_to_one=False),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    hints = torch.rand(args.batch_size, 3, args.resolution, args.resolution)
    words = Words(SD15.text.vocab_size)

    def step(clock: Clock) -> None:
        with clock("sampling"), torch.no_grad():
            prompts, empty = (models["text"](words([PROMPT] * args.batch_size).to(device))[0] for _ in range(2))
            pipeline(
                image=hints, prompt_embeds=prompts, negative_prompt_embeds=empty, guidance_scale=9.0,
                num_inference_steps=SAMPLING_STEPS, output_type="pt",
            )  # fmt: skip

    return step


def their_loading(args: Namespace, device: torch.device):
    def step(clock: Clock) -> None:
        from diffusers import StableDiffusionPipeline

        with clock("load"):
            pipeline = StableDiffusionPipeline.from_single_file(
                str(args.folder / "model.safetensors"), config=str(args.folder / "config"), local_files_only=True
            ).to(device)
        with clock("first forward"), torch.no_grad():
            pipeline.unet(*first_inputs(device))

    return step


def write_checkpoint(folder: Path) -> None:
    """A checkpoint of SD 1.5's size with random weights, for `load`, and what diffusers wants beside it."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    symbols = byte_symbols().values()
    merges = [f"{a} {b}" for a, b in itertools.islice(itertools.product(symbols, symbols), NUM_MERGES)]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    with torch.device("meta"):
        sd = StableDiffusion(None, SD15.text, SD15.vae, SD15.unet, SD15.latent_scale)
    names = {k: v for part in (sd.unet, sd.vae, sd.text_encoder) for k, v in official_state_dict(part).items()}
    save_tensors({name: 0.02 * torch.randn(meta.shape) for name, meta in names.items()}, folder / "model.safetensors")

    config = folder / "config"
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (config / part).mkdir(parents=True)
    with torch.device("meta"):
        UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).save_config(config / "unet")
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
        ).save_config(config / "vae")
    their_text_config(SD15.text).save_pretrained(config / "text_encoder")
    DDIMScheduler(beta_schedule="scaled_linear").save_config(config / "scheduler")
    vocabulary = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (config / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (config / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "safety_checker": [None, None]}
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"]}
    (config / "model_index.json").write_text(json.dumps(index))


# ---------------------------------------------------------------------------------------------------------------
# Measuring

WORK = {
    "train": (our_training, their_training),
    "tiny": (our_training, their_training),
    "sample": (our_sampling, their_sampling),
    "load": (our_loading, their_loading),
}
SIDES = ("here", "diffusers")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that CUDA had allocated, or the most that the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(args: Namespace) -> dict:
    """One side, in this process: seconds of each step, seconds of the parts in the mean, peak memory."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    device = choose_device(args.device)
    if args.memory_cap_gb and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_cap_gb * 2**30 / total))
    if device.type == "cpu" and args.side == "here":
        keep_freed_memory()  # as train.py and sample.py do
    torch.manual_seed(0)
    step = WORK[args.work][SIDES.index(args.side)](args, device)
    for _ in range(WARM_UP if args.work != "load" else 0):
        step(Clock(device))
    seconds, clock = [], Clock(device)
    for _ in range(args.steps):
        began = clock.now()
        step(clock)
        seconds.append(clock.now() - began)
    parts = {part: total / args.steps for part, total in clock.parts.items()}
    return {"seconds": seconds, "parts": parts, "peak": peak_memory(device)}


def measure_apart(args: Namespace, side: str, **changed) -> dict:
    """measure() in a process of its own, start-up included for `load`. Raises UserError with its last line."""
    options = vars(args) | {"side": side} | changed
    began = time.perf_counter()
    command = [sys.executable, __file__, args.work, "--worker", json.dumps(options, default=str)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{side} failed: {(done.stderr.strip().splitlines() or ['killed, out of memory?'])[-1]}")
    result = json.loads(done.stdout.splitlines()[-1])
    if args.work == "load":  # what a user waits for, from the first line of the program
        result["seconds"] = [time.perf_counter() - began]
        result["parts"]["start-up and imports"] = result["seconds"][0] - sum(result["parts"].values())
    return result


def count(args: Namespace, batch_size: int, resolution: int) -> tuple[int, int]:
    """FLOPs of a locked training step (multiply-adds times two), and the bytes that it keeps for the backward pass
    if all of them were float32. Counted on the meta device, without memory or arithmetic.
    """
    preset, side = preset_of(args), resolution // 8
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # the storage itself, so that its address is not given to another one
        return tensor

    def flash(q, k, v):  # as on a GPU and on the CPU; the meta device would keep the N x N matrix
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    with torch.device("meta"):
        unet = UNet(preset.unet).requires_grad_(False)
        controlnet = ControlNet.from_unet(unet, preset.hint_channels)
        controlnet.checkpointing = unet.checkpointing = args.gradient_checkpointing
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
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    clock, best = Clock(device), float("inf")
    for _ in range(5):
        began = clock.now()
        a @ a
        best = min(best, clock.now() - began)
    return 2 * 4096**3 / best


def compare(args: Namespace) -> None:
    """Both sides in turn, `rounds` times, and a table of medians."""
    results: dict[str, list[dict]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        if args.work == "load":
            write_checkpoint(Path(folder))
        for _ in range(args.rounds):
            for side in SIDES:
                precision = args.peer_precision if side == "diffusers" else args.precision
                results[side].append(measure_apart(args, side, precision=precision, folder=folder))
    seconds = {side: statistics.median(s for r in runs for s in r["seconds"]) for side, runs in results.items()}
    peak = {side: statistics.median(r["peak"] for r in runs) for side, runs in results.items()}
    batch = f"batch {args.batch_size}, {args.resolution}x{args.resolution}, " if args.work != "load" else ""
    print(f"{args.work}: {batch}{args.precision} here, {args.peer_precision} in diffusers, median of "
          f"{sum(len(r['seconds']) for r in results['here'])}")  # fmt: skip
    print(f"{'':>24} {'here':>10} {'diffusers':>10}")
    print(f"{'seconds':>24} {seconds['here']:>10.3f} {seconds['diffusers']:>10.3f}")
    print(f"{'peak memory, GB':>24} {peak['here'] / 1e9:>10.2f} {peak['diffusers'] / 1e9:>10.2f}")
    for part in dict.fromkeys(part for runs in results.values() for r in runs for part in r["parts"]):
        means = [statistics.mean(r["parts"].get(part, 0) for r in results[side]) for side in SIDES]
        print(f"{part + ', s':>24} {means[0]:>10.3f} {means[1]:>10.3f}")
    if args.work in ("train", "tiny"):
        flops, _ = count(args, args.batch_size, args.resolution)
        top = matmul_peak(args.precision, choose_device(args.device))
        reached = flops / seconds["here"]
        print(f"a step is {flops / 1e12:.3f} TFLOP (counted): {reached / 1e9:.0f} GFLOP/s here, {reached / top:.0%} of "
              f"this machine's {top / 1e9:.0f} in a matrix product")  # fmt: skip
    ratio = (seconds["here"] / seconds["diffusers"], peak["here"] / peak["diffusers"])
    print("ratio time {:.2f}, memory {:.2f}".format(*ratio))


def grow(args: Namespace) -> None:
    """Cost of a training step over batch sizes and resolutions, here alone, beside what is counted."""
    args.work = "train"
    print(f"{'batch':>6} {'pixels':>8} {'TFLOP':>7} {'kept, GB':>9} {'s/step':>8} {'GB':>6} {'GFLOP/s':>8}")
    for resolution in (256, 384, 512):
        for batch_size in (1, 2, 4, 8):
            flops, kept = count(args, batch_size, resolution)
            row = f"{batch_size:>6} {resolution:>8} {flops / 1e12:>7.2f} {kept / 1e9:>9.2f}"
            try:
                result = measure_apart(args, "here", batch_size=batch_size, resolution=resolution)
            except UserError as error:
                print(row, error, flush=True)
                continue
            seconds = statistics.median(result["seconds"])
            print(f"{row} {seconds:>8.2f} {result['peak'] / 1e9:>6.1f} {flops / seconds / 1e9:>8.0f}", flush=True)


def main() -> None:
    parser = ArgumentParser(description="Time and memory of the same work here and in diffusers.")
    add = parser.add_argument
    add("work", choices=(*WORK, "grow"))
    add("--resolution", type=int, help="default: 256, tiny 128")
    add("--batch-size", type=int, help="default: 1, tiny 8")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast and a bfloat16 locked part")
    add("--peer-precision", choices=("fp32", "bf16"), help="diffusers' (default: as --precision)")
    add("--device", help="cpu, cuda, … (default: cuda if there is one, else cpu)")
    add("--compile", action="store_true", help="torch.compile on both sides")
    add("--gradient-checkpointing", action="store_true", help="on both sides")
    add("--memory-cap-gb", type=float, help="of a CUDA card's memory, to play a smaller one")
    add("--steps", type=int, default=3, help="timed steps in each process, after one to warm up (default: 3)")
    add("--rounds", type=int, default=2, help="times that both sides take their turn (default: 2)")
    add("--worker", help="(one side, options as JSON; started by this program)")
    args = parser.parse_args()
    if args.worker:
        args = Namespace(**json.loads(args.worker))
        args.folder = Path(args.folder) if args.folder else None
        print(json.dumps(measure(args)))
        return
    args.peer_precision = args.peer_precision or args.precision
    args.resolution = args.resolution or (128 if args.work == "tiny" else 256)
    args.batch_size = args.batch_size or (8 if args.work == "tiny" else 1)
    args.steps = 1 if args.work == "load" else args.steps
    args.folder = None
    if args.work == "grow":
        grow(args)
    else:
        compare(args)


if __name__ == "__main__":
    run(main, "a lower --batch-size or --resolution")
