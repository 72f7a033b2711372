"""Train a ControlNet: load a base, lock it, copy its encoder, and minimise equation (5). One flat loop.

`python train.py` runs on the miniature that ships here, with nothing to download; `python train.py --base sd15` is
the paper's experiment on fill50k, on one 24 GB card.
"""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from controlnet import ControlNet
from data import DrawnImages, PairedImages, Pairs, Selected, cache_latents, check_resolution, fetch_fill50k
from diffusion import NoiseSchedule, denoising_loss
from files import ArgumentParser, UserError, read_tensors, run, save_json, save_tensors, write_atomically
from sample import generate, save_picture, to_picture
from stable_diffusion import SD15, TINY, Preset, StableDiffusion
from weights import save_controlnet

DRAWN_PAIRS = 2000  # for --data drawn
HELD_OUT = 8  # pairs that are never trained on, sampled for the previews


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
    add("--checkpointing-steps", type=int, default=500, help="default: 500, and always at the end")
    add("--checkpoints-total-limit", type=int, default=2, help="keep the newest so many (default: 2)")
    add("--resume-from-checkpoint", help="a checkpoint folder, or latest")
    add("--validation-steps", type=int, help=f"steps between previews, 0 for none {both('validation_steps')}")
    add("--num-workers", type=int, default=0 if os.cpu_count() <= 4 else 4, help="processes that load pictures")
    add("--hint-init", choices=("default", "he"), help=f"of the hint encoder {both('hint_init')}")
    add("--connection", choices=("zero", "gaussian"), default="zero", help="gaussian: the ablation of Fig. 8b")
    add("--copy", choices=("full", "lite"), default="full", help="lite: the ablation of Fig. 8c")
    args = parser.parse_args()
    for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps",
                 "checkpoints_total_limit", "learning_rate"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0")
    for name in ("validation_steps", "num_workers", "seed"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 0 or more")
    if not 0 <= args.proportion_empty_prompts <= 1:
        raise UserError(f"--proportion-empty-prompts {args.proportion_empty_prompts}: must be from 0 to 1")
    check_resolution(args.resolution)
    return args


def open_pairs(source: str, resolution: int, seed: int) -> tuple[Pairs, Pairs]:
    """The pairs to train on, and those for the previews."""
    if source == "drawn":
        return DrawnImages(DRAWN_PAIRS, resolution, seed), DrawnImages(HELD_OUT, resolution, seed + 1)
    pairs = PairedImages(fetch_fill50k() if source == "fill50k" else source, resolution)
    first_held_out = len(pairs) - min(HELD_OUT, len(pairs) // 10)
    if first_held_out == len(pairs):
        print(f"{source} has only {len(pairs)} pairs: none is held out, the previews show training pairs")
        return pairs, Selected(pairs, range(min(HELD_OUT, len(pairs))))
    return Selected(pairs, range(first_held_out)), Selected(pairs, range(first_held_out, len(pairs)))


def index_batches(count: int, batch_size: int, seed: int, first: int) -> Iterator[list[int]]:
    """Batches of indices from number `first` on, without end: all pairs in a new order, again and again."""

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        return torch.randperm(count, generator=generator_for(seed, 1, epoch)).tolist()

    position = first * batch_size
    while True:
        yield [order(i // count)[i % count] for i in range(position, position + batch_size)]
        position += batch_size


def generator_for(*key: int) -> torch.Generator:
    """A generator for (seed, 0, batch) or (seed, 1, epoch), so that a resumed run goes on as if it had not stopped.

    The key is hashed, since torch's CPU generator keeps only the lower 32 bits of a seed.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


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


def save_checkpoint(folder: Path, step: int, controlnet: ControlNet, optimizer, config: dict) -> None:
    """Write checkpoints/step-N, beside its place first, so that a folder of that name is always complete."""
    final, temporary = folder / f"step-{step}", folder / f".step-{step}"
    weights = {f"controlnet.{name}": tensor for name, tensor in controlnet.state_dict().items()}
    save_tensors(weights | optimizer_tensors(optimizer), temporary / "state.safetensors")
    save_json({"step": step} | config, temporary / "config.json")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint."""
    paths = folder.glob("step-*")
    return {int(match[1]): path for path in paths if (match := re.fullmatch(r"step-(\d+)", path.name))}


def find_checkpoint(folder: Path, wanted: str) -> Path:
    """The folder that --resume-from-checkpoint means."""
    found = checkpoints_in(folder)
    if wanted == "latest" and not found:
        raise UserError(f"{folder} has no checkpoint to resume from: leave --resume-from-checkpoint out")
    path = found[max(found)] if wanted == "latest" else Path(wanted)
    if not (path / "state.safetensors").is_file() or not (path / "config.json").is_file():
        raise UserError(f"{path} is no checkpoint: expected state.safetensors and config.json in it")
    return path


def resumed_step(path: Path, config: dict) -> int:
    """A checkpoint's step. Raises UserError if options that decide the result have changed since."""
    try:
        saved = json.loads((path / "config.json").read_text())
        step = int(saved["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'config.json'} is broken ({error!r}): resume from another checkpoint") from None
    free = {"max_train_steps"}
    changed = [name for name in config if name not in free and saved.get(name) != config[name]]
    if changed:
        options = ", ".join(f"--{name.replace('_', '-')} {saved.get(name)}" for name in changed)
        raise UserError(f"{path} was made with {options}: resume with the same, or start a new --output-dir")
    return step


def load_checkpoint(path: Path, controlnet: ControlNet, optimizer: torch.optim.Optimizer) -> None:
    tensors, _ = read_tensors(path / "state.safetensors")
    prefix = "controlnet."
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    controlnet.load_state_dict(weights)
    load_optimizer_tensors(optimizer, tensors)


def trim_log(path: Path, last_step: int) -> float:
    """Drop what a log says of steps after `last_step`, and a line cut short; returns the seconds logged up to there."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
    write_atomically(path, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))
    return json.loads(kept[-1])["seconds"] if kept else 0.0


def contact_sheet(columns: list[list[Tensor]], captions: list[str], labels: list[str]) -> Image.Image:
    """Pictures in rows, one column a pair, with the rows' labels at the left and the prompts below."""
    side = columns[0][0].shape[-1]
    margin, rows = 60, len(labels)
    sheet = Image.new("RGB", (margin + side * len(columns), side * rows + 64), "white")
    draw = ImageDraw.Draw(sheet)
    for y, label in enumerate(labels):
        draw.text((4, side * y + side // 2), label, fill="black")
    for x, (column, caption) in enumerate(zip(columns, captions)):
        for y, picture in enumerate(column):
            sheet.paste(to_picture(picture), (margin + side * x, side * y))
        lines = textwrap.wrap(caption, max(side // 7, 8))[:4]
        draw.text((margin + side * x + 2, side * rows + 2), "\n".join(lines), fill="black", font_size=10)
    return sheet


def main() -> None:
    args = parse_arguments()
    output = args.output_dir
    if (output / "log.jsonl").exists() and not args.resume_from_checkpoint:
        raise UserError(
            f"{output} holds a run already: add --resume-from-checkpoint latest, or choose another --output-dir"
        )
    sd = StableDiffusion.load(args.base)
    preset: Preset = sd.preset
    for name, value in vars(args).items():
        if value is None and hasattr(preset, name):
            setattr(args, name, getattr(preset, name))
    place_only = {"output_dir", "resume_from_checkpoint", "num_workers", "checkpointing_steps", "validation_steps",
                  "checkpoints_total_limit", "gradient_checkpointing"}  # fmt: skip
    config = {name: value for name, value in vars(args).items() if name not in place_only}
    checkpoint, start = None, 0
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(output / "checkpoints", args.resume_from_checkpoint)
        start = resumed_step(checkpoint, config)
        print(f"resuming from {checkpoint}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sd.to(device).requires_grad_(False)  # locked: from here on only the copy learns
    pairs, held_out = open_pairs(args.data, args.resolution, args.seed)
    cache_key = {name: config[name] for name in ("base", "data", "resolution", "seed")}
    cache_key["prompts"] = hashlib.sha256(json.dumps(pairs.prompts).encode()).hexdigest()
    cache_key["encoders"] = [sd.vae.to_moments.weight.sum().item(), sd.text_encoder.norm_out.weight.sum().item()]
    cached = cache_latents(sd, pairs, output / "cache", cache_key, args.train_batch_size, args.num_workers)

    torch.manual_seed(args.seed)  # for the hint encoder's weights
    controlnet = ControlNet.from_unet(sd.unet, preset.hint_channels, args.hint_init, args.connection, args.copy)
    controlnet.checkpointing = sd.unet.checkpointing = args.gradient_checkpointing
    if args.mixed_precision == "bf16":
        sd.unet.bfloat16()  # the locked part only: trainable weights and optimizer state stay float32
    for module in (sd.unet, controlnet):
        module.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=args.learning_rate, fused=True)
    if checkpoint:
        load_checkpoint(checkpoint, controlnet, optimizer)
    save_json(config, output / "config.json")
    log_path = output / "log.jsonl"
    earlier = trim_log(log_path, start)

    stop = []  # the signal that asked for it: the step in hand is finished and saved

    def ask_to_stop(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)

    def save(step: int) -> None:
        save_checkpoint(output / "checkpoints", step, controlnet, optimizer, config)
        metadata = {"base": args.base, "steps": str(step), "config": json.dumps(config), "license": preset.license}
        save_controlnet(controlnet, output / "controlnet.safetensors", metadata=metadata)
        found = checkpoints_in(output / "checkpoints")
        newest = sorted(number for number in found if number <= step)[-args.checkpoints_total_limit :]
        for number in found.keys() - newest:  # later ones are of a run that was resumed from before them
            shutil.rmtree(found[number])

    preview_hints = torch.stack([held_out.hint(i) for i in range(len(held_out))])
    preview_targets = [held_out.image(i) for i in range(len(held_out))]
    before = []  # the same samples without ControlNet, which is what step 0 gives: equation (3)

    def preview(step: int) -> None:
        settings = {"steps": preset.sampling_steps, "guidance_scale": preset.guidance_scale, "seed": args.seed}
        size = tuple(preview_hints.shape[2:])
        if not before:
            before.extend(generate(sd, [], [], held_out.prompts, size=size, **settings))
        now = generate(sd, [controlnet], [preview_hints], held_out.prompts, **settings)
        columns = [list(column) for column in zip(preview_hints * 2 - 1, before, now, preview_targets)]
        sheet = contact_sheet(columns, held_out.prompts, ["hint", "step 0", f"step {step}", "target"])
        save_picture(sheet, output / "previews" / f"step-{step}.png")

    batches_a_step = args.gradient_accumulation_steps
    order = index_batches(len(cached), args.train_batch_size, args.seed, start * batches_a_step)
    loader = DataLoader(cached, batch_sampler=order, num_workers=args.num_workers, pin_memory=device.type == "cuda")
    batches = iter(loader)
    schedule, began = NoiseSchedule(), time.time() - earlier
    bar = tqdm(range(start, args.max_train_steps), initial=start, total=args.max_train_steps, desc="training")
    with open(log_path, "a") as log:
        for step in bar:
            step_loss = 0.0
            for i in range(batches_a_step):
                generator = generator_for(args.seed, 0, step * batches_a_step + i)
                batch = next(batches)
                z0 = sd.sample_latents(batch["moments"].float(), generator)
                eps = torch.randn(z0.shape, generator=generator)
                t = torch.randint(schedule.steps, (len(z0),), generator=generator)
                # Half of the prompts become "": the copy has to read the meaning off the hint (Sec. 3.3).
                context, hint = batch["context"], batch["hint"]
                context[torch.rand(len(z0), generator=generator) < args.proportion_empty_prompts] = cached.empty_context
                z0, eps, context, hint = (x.to(device, torch.float32) for x in (z0, eps, context, hint))
                t = t.to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):

                    def eps_fn(z, t, context=context, hint=hint):
                        return sd.unet(z, t, context, controlnet(z, hint, t, context))

                    loss = denoising_loss(eps_fn, z0, eps, t, schedule)  # equation (5)
                (loss / batches_a_step).backward()
                step_loss += loss.item() / batches_a_step
            optimizer.step()
            optimizer.zero_grad()

            done = step + 1
            seconds = round(time.time() - began, 2)
            entry = {"step": done, "loss": step_loss, "lr": args.learning_rate, "seconds": seconds}
            log.write(json.dumps(entry) + "\n")
            log.flush()
            bar.set_postfix(loss=f"{step_loss:.4f}", lr=f"{args.learning_rate:.0e}")
            at_the_end = done == args.max_train_steps
            if stop or at_the_end or done % args.checkpointing_steps == 0:
                save(done)
            if stop:
                break
            if args.validation_steps and (at_the_end or done % args.validation_steps == 0):
                preview(done)

    print(f"wrote {output / 'controlnet.safetensors'}")
    if stop:
        options = [] if args.resume_from_checkpoint == "latest" else ["--resume-from-checkpoint", "latest"]
        print(f"stopped at step {done}; go on with: {shlex.join(['python', *sys.argv, *options])}")
        return
    print(
        f"now: python sample.py --base {args.base} --controlnet {output / 'controlnet.safetensors'} "
        '--hint HINT.png --prompt "coral circle with blue background"'
    )


if __name__ == "__main__":
    run(main)
