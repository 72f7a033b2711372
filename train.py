"""Train a ControlNet: load a base, lock it, copy its encoder, and minimise equation (5). One flat loop.

`python train.py` runs on the miniature that ships here, with nothing to download; `python train.py --base sd15` is
the paper's experiment on fill50k, on one 24 GB card.
"""

import hashlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoints import find_checkpoint, load_checkpoint, resumed_step, save_checkpoint, trim_log
from controlnet import ControlNet
from data import DrawnImages, PairedImages, Pairs, Selected, cache_latents, check_resolution, fetch_fill50k
from diffusion import NoiseSchedule, denoising_loss
from files import ArgumentParser, UserError, run, save_json
from metrics import circle_iou, colour_error, growth_step, hint_response, is_circle_task, jump_step
from pictures import contact_sheet, plot_convergence, save_picture, to_picture
from sample import generate
from stable_diffusion import SD15, TINY, Preset, StableDiffusion
from weights import save_controlnet

DRAWN_PAIRS = 2000  # for --data drawn
DRAWN_HELD_OUT = 2**32 - 1  # seed of the drawn pairs that are never trained on
PREVIEWED = 8  # columns of a preview
PROBE_TIMES = (200, 400, 600, 800)  # at which hint sensitivity and gap are measured, one held-out pair each


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
    add("--validation-hints", type=int, default=8, help="held-out hints that are sampled and scored (default: 8)")
    add("--num-workers", type=int, default=0 if os.cpu_count() <= 4 else 4, help="processes that load pictures")
    add("--hint-init", choices=("default", "he"), help=f"of the hint encoder {both('hint_init')}")
    add("--connection", choices=("zero", "gaussian"), default="zero", help="gaussian: the ablation of Fig. 8b")
    add("--copy", choices=("full", "lite"), default="full", help="lite: the ablation of Fig. 8c")
    args = parser.parse_args()
    for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps",
                 "checkpoints_total_limit", "learning_rate", "validation_hints"):  # fmt: skip
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


@torch.no_grad()
def fixed_batch(sd: StableDiffusion, pairs: Pairs, schedule: NoiseSchedule, seed: int) -> dict[str, Tensor] | None:
    """What hint_response is measured on: held-out pairs, noised once and for all, one at each of PROBE_TIMES.

    `other` holds another pair's hint for each. None when there is only one pair, which has no other.
    """
    if len(pairs) < 2:
        return None
    generator = generator_for(seed, 2)
    chosen = [i % len(pairs) for i in range(len(PROBE_TIMES))]
    others = [(i + 1) % len(pairs) for i in chosen]
    moments = sd.vae.encode(torch.stack([pairs.image(i) for i in chosen]).to(sd.device)).cpu()
    z0 = sd.sample_latents(moments, generator).to(sd.device)
    eps, t = torch.randn(z0.shape, generator=generator).to(z0), torch.tensor(PROBE_TIMES, device=sd.device)
    hints, other = (torch.stack([pairs.hint(i) for i in indices]).to(sd.device) for indices in (chosen, others))
    context = sd.encode_prompts([pairs.prompts[i] for i in chosen])
    z = schedule.add_noise(z0, eps, t)
    return {"z": z, "t": t, "context": context, "hint": hints, "other": other, "eps": eps}


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
                  "validation_hints", "checkpoints_total_limit", "gradient_checkpointing"}  # fmt: skip
    config = {name: value for name, value in vars(args).items() if name not in place_only}
    checkpoint, start = None, 0
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(output / "checkpoints", args.resume_from_checkpoint)
        start = resumed_step(checkpoint, config)
        print(f"resuming from {checkpoint}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sd.to(device).requires_grad_(False)  # locked: from here on only the copy learns
    pairs, held_out = open_pairs(args.data, args.resolution, args.seed, args.validation_hints)
    cache_key = {name: config[name] for name in ("base", "data", "resolution", "seed")}
    cache_key["prompts"] = hashlib.sha256(json.dumps(pairs.prompts).encode()).hexdigest()
    cache_key["encoders"] = [sd.vae.to_moments.weight.sum().item(), sd.text_encoder.norm_out.weight.sum().item()]
    cached = cache_latents(sd, pairs, output / "cache", cache_key, args.train_batch_size, args.num_workers)
    schedule = NoiseSchedule()
    probe = fixed_batch(sd, held_out, schedule, args.seed)

    torch.manual_seed(args.seed)  # for the hint encoder's weights
    controlnet = ControlNet.from_unet(sd.unet, preset.hint_channels, args.hint_init, args.connection, args.copy)
    controlnet.checkpointing = sd.unet.checkpointing = args.gradient_checkpointing
    bf16 = args.mixed_precision == "bf16"
    if bf16:
        sd.unet.bfloat16()  # the locked part only: trainable weights and optimizer state stay float32
    for module in (sd.unet, controlnet):
        module.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=args.learning_rate, fused=True)
    if checkpoint:
        load_checkpoint(checkpoint, controlnet, optimizer)
    save_json(config, output / "config.json")
    history = trim_log(output / "log.jsonl", start)

    stop = []  # the signal that asked for it: the step in hand is finished and saved

    def ask_to_stop(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)

    def predict(z: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> Tensor:
        """ε_θ(z_t, t, c_t, c_f)."""
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return sd.unet(z, t, context, controlnet(z, hint, t, context))

    hints, targets = (torch.stack([part(i) for i in range(len(held_out))]) for part in (held_out.hint, held_out.image))
    scored = is_circle_task(hints, held_out.prompts)

    def sample(controlnets: list[ControlNet]) -> tuple[Tensor, dict]:
        """The held-out hints as pictures, from fixed seeds, and their scores."""
        settings = {"steps": preset.sampling_steps, "guidance_scale": preset.guidance_scale, "seed": args.seed}
        given = [hints for _ in controlnets]
        # The hint on the conditional side of guidance only, as in the paper (Sec. 3.4).
        pictures = generate(
            sd, controlnets, given, held_out.prompts, mode="conditional", size=tuple(hints.shape[2:]), **settings
        ).cpu()
        if not scored:
            return pictures, {}
        errors = colour_error(pictures, hints, held_out.prompts)
        return pictures, {"iou": circle_iou(pictures, hints).mean().item(), "colour_error": errors.mean().item()}

    if args.validation_steps:
        before, base_scores = sample([])  # what step 0 gives too: equation (3)
        save_picture(to_picture(hints[0] * 2 - 1), output / "previews" / "hint.png")

    def preview(step: int) -> dict:
        now, scores = sample([controlnet])
        rows = {"hint": hints * 2 - 1, "step 0": before, f"step {step}": now, "target": targets}
        sheet = contact_sheet({label: row[:PREVIEWED] for label, row in rows.items()}, held_out.prompts[:PREVIEWED])
        save_picture(sheet, output / "previews" / f"step-{step}.png")
        return scores | {f"base_{name}": score for name, score in base_scores.items()}

    @torch.no_grad()
    def respond() -> dict:
        own, other = (predict(probe["z"], probe["t"], probe["context"], probe[name]) for name in ("hint", "other"))
        sensitivity, gap = hint_response(own, other, probe["eps"])
        heldout_loss = (own.double() - probe["eps"]).square().mean().item()
        return {"hint_sensitivity": sensitivity, "hint_gap": gap, "heldout_loss": heldout_loss}

    def save(step: int) -> None:
        save_checkpoint(output / "checkpoints", step, controlnet, optimizer, config, args.checkpoints_total_limit)
        metadata = {"base": args.base, "steps": str(step), "config": json.dumps(config), "license": preset.license}
        save_controlnet(controlnet, output / "controlnet.safetensors", metadata=metadata)

    batches_a_step = args.gradient_accumulation_steps
    order = index_batches(len(cached), args.train_batch_size, args.seed, start * batches_a_step)
    loader = DataLoader(cached, batch_sampler=order, num_workers=args.num_workers, pin_memory=device.type == "cuda")
    batches = iter(loader)
    began = time.time() - (history[-1]["seconds"] if history else 0)
    shown = {"lr": f"{args.learning_rate:.0e}"}
    bar = tqdm(range(start, args.max_train_steps), initial=start, total=args.max_train_steps, desc="training")
    with open(output / "log.jsonl", "a") as log:
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
                eps_fn = partial(predict, context=context, hint=hint)
                loss = denoising_loss(eps_fn, z0, eps, t.to(device), schedule)  # equation (5)
                (loss / batches_a_step).backward()
                step_loss += loss.item() / batches_a_step
            optimizer.step()
            optimizer.zero_grad()

            done = step + 1
            at_the_end = done == args.max_train_steps
            entry = {"step": done, "loss": step_loss, "lr": args.learning_rate}
            if probe and done % preset.response_steps == 0:
                entry |= respond()
                shown["sensitivity"] = f"{entry['hint_sensitivity']:.1e}"
            if args.validation_steps and done % args.validation_steps == 0:
                entry |= preview(done)
            history.append(entry | {"seconds": round(time.time() - began, 2)})
            log.write(json.dumps(history[-1]) + "\n")
            log.flush()
            bar.set_postfix(loss=f"{step_loss:.4f}", **shown)
            measured = "hint_sensitivity" in entry  # only then can the whole log say something new
            if measured and growth_step(history) == done:
                bar.write(f"step {done}: the hint begins to count, its sensitivity is {entry['hint_sensitivity']:.1e} "
                          "and growing; the samples do not show it yet")  # fmt: skip
            if measured and jump_step(history) == done:
                bar.write(f"step {done}: the jump has come: with another pair's hint the held-out loss is "
                          f"{entry['hint_gap'] / entry['heldout_loss']:.0%} higher")  # fmt: skip
            if "iou" in entry:
                bar.write(
                    f"step {done}: IoU {entry['iou']:.2f} of samples and hints (the base: {entry['base_iou']:.2f})"
                )
            if stop or at_the_end or done % args.checkpointing_steps == 0:
                save(done)
            if stop:
                break

    plot_convergence({output.name: history}, output / "convergence.png")
    print(f"wrote {output / 'controlnet.safetensors'} and {output / 'convergence.png'}")
    if stop:
        options = [] if args.resume_from_checkpoint == "latest" else ["--resume-from-checkpoint", "latest"]
        print(f"stopped at step {done}; go on with: {shlex.join(['python', *sys.argv, *options])}")
        return
    if args.validation_steps and args.max_train_steps % args.validation_steps:
        preview(args.max_train_steps)
    command = ["python", "sample.py", "--base", args.base, "--controlnet", str(output / "controlnet.safetensors")]
    hint = str(output / "previews" / "hint.png") if args.validation_steps else "HINT.png"
    print("now:", shlex.join([*command, "--hint", hint, "--prompt", held_out.prompts[0]]))


if __name__ == "__main__":
    run(main)
