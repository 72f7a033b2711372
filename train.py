"""Train a ControlNet: load a base, lock it, copy its encoder, and minimise equation (5). One flat loop.

`python train.py` runs on the miniature that ships here, with nothing to download; `python train.py --base sd15` is
the paper's experiment on fill50k, on one 24 GB card.
"""

import contextlib
import hashlib
import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoints import Log, check_config, checkpoints_in, find_checkpoint, load_checkpoint, save_checkpoint
from clip_text import MAX_LENGTH
from controlnet import ControlNet, zero_weights
from data import (
    DrawnImages,
    PairedImages,
    Pairs,
    Selected,
    cache_latents,
    check_resolution,
    fetch_fill50k,
    generator_for,
)
from diffusion import NoiseSchedule, denoising_loss
from files import ArgumentParser, UserError, choose_device, keep_freed_memory, run, save_json
from pictures import plot_convergence
from stable_diffusion import SD15, TINY, Preset, StableDiffusion
from unet import UNet
from validation import Response, Validation
from weights import official_layout, save_controlnet

DRAWN_PAIRS = 2000  # for --data drawn
DRAWN_HELD_OUT = 2**32 - 1  # seed of the drawn pairs that are never trained on


def parse_arguments():
    def both(field: str) -> str:
        return f"(default: tiny {getattr(TINY, field)}, sd15 {getattr(SD15, field)})"

    parser = ArgumentParser(description="Train a ControlNet on pairs of hint and picture.")
    add = parser.add_argument
    add("--base", default="tiny", help="tiny (ships here), sd15 (fetched once), a file, or owner/repo:file")
    add("--data", help=f"drawn, fill50k (fetched once), or a folder in fill50k's layout {both('data')}")
    add("--output-dir", type=Path, default=Path("runs/controlnet"), help="default: runs/controlnet")
    add("--max-train-steps", type=int, help=f"optimizer steps {both('max_train_steps')}")
    add("--train-batch-size", type=int, help=both("train_batch_size"))
    add("--gradient-accumulation-steps", type=int, default=1, help="batches for each optimizer step (default: 1)")
    add("--learning-rate", type=float, help=both("learning_rate"))
    add("--proportion-empty-prompts", type=float, default=0.5, help="prompts replaced by '' (default: 0.5)")
    add("--resolution", type=int, help=f"pixels a side, a multiple of 64 {both('resolution')}")
    add("--seed", type=int, default=0)
    add("--mixed-precision", choices=("no", "bf16"), help=both("mixed_precision"))
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    add("--compile", action="store_true", help="torch.compile: minutes at the start, then faster on a GPU")
    add("--checkpointing-steps", type=int, default=500, help="default: 500, and always at the end")
    add("--checkpoints-total-limit", type=int, default=2, help="keep the newest so many (default: 2)")
    add("--resume-from-checkpoint", help="a checkpoint folder, or latest")
    add("--validation-steps", type=int, help=f"steps between previews, 0 for none {both('validation_steps')}")
    add("--validation-hints", type=int, default=8, help="held-out hints that are sampled and scored (default: 8)")
    add("--num-workers", type=int, default=0 if os.cpu_count() <= 4 else 4, help="processes that load pictures")
    add("--hint-init", choices=("default", "he"), help=f"of the hint encoder {both('hint_init')}")
    add("--connection", choices=("zero", "gaussian"), default="zero", help="gaussian: the ablation of Fig. 8b")
    add("--copy", choices=("full", "lite"), default="full", help="lite: the ablation of Fig. 8c")
    add("--only-mid-control", action="store_true", help="connect the middle block alone: for a condition that says "
        "what rather than exactly where, or as a first, faster stage")  # fmt: skip
    add("--unlock-decoder", action="store_true", help="train the UNet's decoder too: for pictures unlike all that the "
        "base knows, with many pairs and a learning rate of about a fifth; the base's own style is lost")  # fmt: skip
    add("--report-to", choices=("jsonl", "tensorboard"), default="jsonl", help="tensorboard: beside log.jsonl")
    add("--device", help="cpu, cuda, cuda:1, mps, … (default: cuda if there is one, else cpu)")
    args = parser.parse_args()
    for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps",
                 "checkpoints_total_limit", "learning_rate", "validation_hints"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0")
    for name in ("validation_steps", "num_workers", "seed"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 0 or more")
    if not 0 <= args.proportion_empty_prompts <= 1:
        raise UserError(f"--proportion-empty-prompts {args.proportion_empty_prompts}: must be from 0 to 1")
    check_resolution(args.resolution)
    if args.report_to == "tensorboard" and find_spec("tensorboard") is None:
        raise UserError("--report-to tensorboard: not installed; pip install tensorboard, or leave it out")
    return args


def open_pairs(source: str, resolution: int, seed: int, held_out: int) -> tuple[Pairs, Pairs]:
    """The pairs to train on, and about `held_out` others that are never trained on."""
    if source == "drawn":
        return DrawnImages(DRAWN_PAIRS, resolution, seed), DrawnImages(held_out, resolution, DRAWN_HELD_OUT)
    pairs = PairedImages(fetch_fill50k() if source == "fill50k" else source, resolution)
    first_held_out = len(pairs) - min(held_out, len(pairs) // 10)
    if first_held_out == len(pairs):
        print(f"{source} has only {len(pairs)} pairs: none is held out, the previews show training pairs")
        return pairs, Selected(pairs, range(min(held_out, len(pairs))))
    return Selected(pairs, range(first_held_out)), Selected(pairs, range(first_held_out, len(pairs)))


def warn_if_cut(sd: StableDiffusion, pairs: Pairs) -> None:
    """Say how many prompts do not fit into the text encoder."""
    room = MAX_LENGTH - 2  # without start and end
    cut = [i for i, prompt in enumerate(pairs.prompts) if len(sd.tokenizer.encode(prompt)) > room]
    if cut:
        print(f"warning: {len(cut)} prompts have more than {room} tokens and are cut, the first is that of "
              f"{pairs.name(cut[0])}", file=sys.stderr)  # fmt: skip


def index_batches(
    count: int, batch_size: int, seed: int, first: int, share: slice = slice(None)
) -> Iterator[list[int]]:
    """Batches of indices from number `first` on, without end: all pairs in a new order, again and again.

    Of each batch only the `share` of this process is given.
    """

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        return torch.randperm(count, generator=generator_for(seed, 1, epoch)).tolist()

    position = first * batch_size
    while True:
        yield [order(i // count)[i % count] for i in range(position, position + batch_size)[share]]
        position += batch_size


def check_finite(steps: list[tuple[dict, Tensor, list[str]]], checkpoints: Path) -> None:
    """Read the losses of some steps, (log entry, norm of the gradient, names of the pairs) of each.

    Raises UserError for the first that is not finite. Nothing has been saved since.
    """
    for entry, norm, names in steps:
        entry["loss"] = entry["loss"].item()
        if not math.isfinite(entry["loss"] + norm.item()):
            good = max(checkpoints_in(checkpoints).items(), default=(0, "none yet"))[1]
            raise UserError(
                f"step {entry['step']}: loss {entry['loss']}, gradient norm {norm.item()}, with {', '.join(names)}; "
                f"last good checkpoint: {good}; look at these pairs, lower --learning-rate or take --mixed-precision no"
            )


class Denoiser(nn.Module):
    """ε_θ(z_t, t, c_t, c_f): the locked UNet and its ControlNet as one, to be compiled or spread over GPUs."""

    def __init__(self, unet: UNet, controlnet: ControlNet, bf16: bool):
        super().__init__()
        self.unet, self.controlnet, self.bf16 = unet, controlnet, bf16

    def forward(self, z: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> Tensor:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            return self.unet(z, t, context, self.controlnet(z, hint, t, context))


def main() -> None:
    os.environ.setdefault("MKL_CBWR", "AUTO")  # on a CPU: sums in one order, so that runs are equal bit for bit
    args = parse_arguments()
    output = args.output_dir
    if not args.resume_from_checkpoint and any(
        (output / name).exists() for name in ("config.json", "log.jsonl", "checkpoints", "controlnet.safetensors")
    ):
        raise UserError(
            f"{output} holds a run already: add --resume-from-checkpoint latest, or choose another --output-dir"
        )
    # Under torchrun there are `world` processes, each with its own device and its share of every batch; the first one
    # does all that is done once: fetching, encoding, logging, previews, checkpoints.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    sd = StableDiffusion.load(args.base)
    preset: Preset = sd.preset
    for name, value in vars(args).items():
        if value is None and hasattr(preset, name):
            setattr(args, name, getattr(preset, name))
    place_only = {"output_dir", "resume_from_checkpoint", "num_workers", "checkpointing_steps", "validation_steps",
                  "validation_hints", "checkpoints_total_limit", "gradient_checkpointing", "report_to",
                  "device", "compile"}  # fmt: skip
    config = {name: value for name, value in vars(args).items() if name not in place_only}
    config["train_batch_size"] *= world  # of all processes: the result does not depend on their number
    checkpoint, start = None, 0
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(output / "checkpoints", args.resume_from_checkpoint)
        start = check_config((checkpoint or output) / "config.json", config)
        if start > args.max_train_steps:
            raise UserError(f"{checkpoint} is beyond --max-train-steps {args.max_train_steps}: ask for more steps")
        if rank == 0:
            print(
                f"resuming from {checkpoint}" if checkpoint else f"{output} has no checkpoint yet: starting at step 0"
            )

    sd.to(device).requires_grad_(False)  # locked: from here on only the copy learns
    if rank > 0:
        distributed.barrier()  # until the first process has fetched and encoded
    pairs, held_out = open_pairs(args.data, args.resolution, args.seed, args.validation_hints)
    if rank == 0:
        warn_if_cut(sd, pairs)
    cache_key = {name: config[name] for name in ("base", "data", "resolution", "seed")}
    cache_key["pairs"] = hashlib.sha256(json.dumps([pairs.prompts, pairs.stamp()]).encode()).hexdigest()
    cache_key["encoders"] = [sd.vae.to_moments.weight.sum().item(), sd.text_encoder.norm_out.weight.sum().item()]
    cached = cache_latents(sd, pairs, output / "cache", cache_key, args.train_batch_size, args.num_workers)
    if rank == 0 and world > 1:
        distributed.barrier()

    torch.manual_seed(args.seed)  # for the hint encoder's weights
    controlnet = ControlNet.from_unet(sd.unet, preset.hint_channels, args.hint_init, args.connection, args.copy)
    controlnet.checkpointing = sd.unet.checkpointing = args.gradient_checkpointing
    trained = nn.ModuleDict({"controlnet": controlnet})
    if args.unlock_decoder:  # the released code's sd_locked = False
        parts = ("decoder", "norm_out", "conv_out")
        trained.update({name: getattr(sd.unet, name).requires_grad_(True) for name in parts})
    if args.only_mid_control:
        # The other twelve connections stay zero convolutions, and the residuals zeros. The released code leaves the
        # skip connections alone instead: the same sum, but a file that needs to be told so.
        for conv in controlnet.zero_convs:
            zero_weights(conv).requires_grad_(False)
    bf16 = args.mixed_precision == "bf16"
    for name, part in sd.unet.named_children():
        if bf16 and name not in trained:
            part.bfloat16()  # the locked part only: trainable weights and optimizer state stay float32
    # A part that was not converted still lies in the mapped file, which would be counted whole beside the rest.
    for parameter in sd.unet.parameters():
        parameter.data = parameter.data.clone()
    if device.type == "cuda" or preset is TINY:  # on a CPU, AdamW loses more on SD 1.5's wide weights than this gains
        for module in (sd.unet, controlnet):
            module.to(memory_format=torch.channels_last)
    learning = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.learning_rate, fused=True)

    validation = (
        Validation(sd, held_out, args.seed, output / "previews") if rank == 0 and args.validation_steps else None
    )
    response = Response(sd, held_out, args.seed) if rank == 0 and len(held_out) > 1 else None
    if validation is None:
        sd.vae = sd.text_encoder = None  # all is encoded and nothing will be sampled
    if checkpoint:  # not earlier: the base's decoder may have been trained since, and step 0 is without
        load_checkpoint(checkpoint, trained, optimizer)
    denoiser = predict = Denoiser(sd.unet, controlnet, bf16)
    if args.compile:
        predict = torch.compile(predict)
    if world > 1:
        predict = DistributedDataParallel(predict)

    def save(step: int) -> None:
        save_checkpoint(output / "checkpoints", step, trained, optimizer, config, args.checkpoints_total_limit)
        metadata = {"base": args.base, "steps": str(step), "config": json.dumps(config), "license": preset.license}
        others = {}
        if args.unlock_decoder:
            metadata["unlock_decoder"] = "true"  # sample.py then puts these into the base
            official = official_layout(sd.unet)
            others = {official[name]: tensor for name, tensor in trained.state_dict().items() if name in official}
        save_controlnet(controlnet, output / "controlnet.safetensors", metadata=metadata, others=others)

    if rank == 0:
        save_json(config, output / "config.json")
        log = Log(output, start, args.report_to == "tensorboard")
        if start == args.max_train_steps:
            save(start)  # it may have been stopped between the two files

    stop = []  # the signal that asked for it: the step in hand is finished and saved

    def ask_to_stop(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)

    size, batches_a_step = args.train_batch_size, args.gradient_accumulation_steps
    share = slice(rank * size, (rank + 1) * size)  # of a batch of all processes
    order = index_batches(len(cached), size * world, args.seed, start * batches_a_step, share)
    loader = DataLoader(cached, batch_sampler=order, num_workers=args.num_workers, pin_memory=device.type == "cuda")
    batches, schedule = iter(loader), NoiseSchedule()
    read_every = 10 if device.type == "cuda" else 1  # steps: reading a number makes the GPU wait for it
    pending = []  # steps whose loss has not been read yet
    shown = {"lr": f"{args.learning_rate:.0e}"}
    bar = tqdm(range(start, args.max_train_steps), initial=start, total=args.max_train_steps, desc="training",
               disable=rank > 0)  # fmt: skip
    for step in bar:
        step_loss = torch.zeros((), device=device)
        names = []
        for i in range(batches_a_step):
            generator = generator_for(args.seed, 0, step * batches_a_step + i)
            batch = next(batches)
            moments, context, hint = batch["moments"].float(), batch["context"], batch["hint"]
            # Drawn for the batch of all processes, on the CPU, so that neither their number nor the device matters.
            latent_shape = (size * world, 4, *moments.shape[2:])
            noise, eps = (torch.randn(latent_shape, generator=generator)[share] for _ in range(2))
            t = torch.randint(schedule.steps, (size * world,), generator=generator)[share]
            empty = torch.rand(size * world, generator=generator)[share] < args.proportion_empty_prompts
            context[empty] = cached.empty_context  # half of them: the copy has to read the hint (Sec. 3.3)
            z0 = sd.sample_latents(moments, noise)
            z0, eps, t, context, hint = (x.to(device, non_blocking=True) for x in (z0, eps, t, context, hint))
            last = i + 1 == batches_a_step
            with contextlib.nullcontext() if last or world == 1 else predict.no_sync():
                eps_fn = partial(predict, context=context.float(), hint=hint)
                loss = denoising_loss(eps_fn, z0, eps, t, schedule) / batches_a_step  # equation (5)
                loss.backward()
            step_loss += loss.detach()
            names += [pairs.name(i) for i in batch["index"].tolist()]
        norm = nn.utils.get_total_norm(p.grad for p in learning if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()

        if world > 1:
            distributed.all_reduce(step_loss)
            step_loss /= world

        done = step + 1
        at_the_end = done == args.max_train_steps
        pending.append(({"step": done, "loss": step_loss, "lr": args.learning_rate}, norm, names))
        due_response = done % preset.response_steps == 0
        due_preview = args.validation_steps > 0 and done % args.validation_steps == 0
        due_save = at_the_end or done % args.checkpointing_steps == 0
        if done % read_every and not (due_response or due_preview or due_save):
            continue
        stopping = torch.tensor(len(stop), device=device)
        if world > 1:
            distributed.all_reduce(stopping)
        check_finite(pending, output / "checkpoints")
        if rank == 0:
            entry, sheet = pending[-1][0], None
            if due_response and response:
                entry |= response.measure(denoiser)
                shown["sensitivity"] = f"{entry['hint_sensitivity']:.1e}"
            if due_preview:
                sheet, scores = validation.preview(controlnet, done)
                entry |= scores
            log.write([entry for entry, _, _ in pending], sheet)
            bar.set_postfix(loss=f"{entry['loss']:.4f}", **shown)
            if due_response or due_preview:
                for line in log.news():
                    bar.write(line)
            if due_save or stopping:
                save(done)
        pending.clear()
        if stopping:
            break

    if world > 1:
        distributed.destroy_process_group()
    if rank > 0:
        return
    log.close()
    plot_convergence({output.name: log.history}, output / "convergence.png")
    print(f"wrote {output / 'controlnet.safetensors'} and {output / 'convergence.png'}")
    if stop:
        options = [] if args.resume_from_checkpoint == "latest" else ["--resume-from-checkpoint", "latest"]
        print(f"stopped at step {done}; go on with: {shlex.join(['python', *sys.argv, *options])}")
        return
    if validation and args.max_train_steps % args.validation_steps:
        validation.preview(controlnet, args.max_train_steps)
    command = ["python", "sample.py", "--base", args.base, "--controlnet", str(output / "controlnet.safetensors")]
    hint = str(output / "previews" / "hint.png") if validation else "HINT.png"
    print("now:", shlex.join([*command, "--hint", hint, "--prompt", held_out.prompts[0]]))


if __name__ == "__main__":
    run(main, "--gradient-checkpointing, --mixed-precision bf16, a lower --resolution, or a lower --train-batch-size "
        "with --gradient-accumulation-steps")  # fmt: skip
