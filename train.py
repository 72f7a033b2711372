"""Train a ControlNet: load a base, lock it, copy its encoder, and minimise equation (5). One flat loop.

`python train.py` runs on the miniature that ships here, with nothing to download; `python train.py --base sd15` on
fill50k with the batch and learning rate of the released code's tutorial, meant for one 24 GB card.
"""

import json
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from support.errors import UserError, run_command_line

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from controlnet import ControlNet, Denoiser
from convergence import HeldOut, milestones, plot_convergence
from data import open_pairs
from diffusion import NoiseSchedule
from stable_diffusion import SD15, SOURCES, TINY, StableDiffusion
from support import options
from support.cache import CachedPairs
from support.devices import PRECISIONS, place, usable_cpus, warn_if_slow
from support.randomness import NOISE, generator_for
from support.run import Run
from vae import sample_latent
from weights import official_names, save_controlnet


def parse_arguments() -> Namespace:
    def both(field: str) -> str:
        return f"(default: tiny {getattr(TINY, field)}, sd15 {getattr(SD15, field)})"

    parser = options.ArgumentParser(description="Train a ControlNet on pairs of hint and picture.")
    add, whole, count = parser.add_argument, options.positive_int, options.count_or_zero
    add("--base", default="tiny", help=options.BASE)
    add("--data", help=f"drawn, drawn-palette, fill50k (fetched once), or a folder in its layout {both('data')}")
    add("--output-dir", type=Path, default=Path("runs/controlnet"), decides=False, help="default: runs/controlnet")
    add("--max-train-steps", type=whole, help=f"optimizer steps {both('max_train_steps')}")
    add("--train-batch-size", type=whole, help=f"of each process {both('train_batch_size')}")
    add("--gradient-accumulation-steps", type=whole, default=1, help="batches for each step (default: 1)")
    add("--learning-rate", type=options.positive_float, help=both("learning_rate"))
    add("--cooldown", type=options.fraction, help=f"of the steps, the last: with a falling rate {both('cooldown')}")
    add("--proportion-empty-prompts", type=options.fraction, default=0.5, help="prompts replaced by '' (default: 0.5)")
    add("--resolution", type=options.side, help=f"pixels a side, a multiple of 64 {both('resolution')}")
    add("--seed", type=options.seed, default=0)
    add("--mixed-precision", choices=("no", "auto", "bf16", "fp16"), help=f"auto: by device {both('mixed_precision')}")
    add("--gradient-checkpointing", action="store_true", decides=False, help="less memory, a third more arithmetic")
    add("--compile", action="store_true", decides=False, help="torch.compile: takes minutes to start")
    add("--checkpointing-steps", type=whole, default=500, decides=False, help="default: 500, and always at the end")
    add("--checkpoints-total-limit", type=whole, default=2, decides=False, help="newest that are kept (default: 2)")
    add("--resume-from-checkpoint", decides=False, help="a checkpoint folder, or latest")
    add("--validation-steps", type=count, decides=False, help=f"0: never {both('validation_steps')}")
    add("--snapshot-steps", type=count, decides=False, help=f"for draw.py; 0: none {both('snapshot_steps')}")
    add("--validation-hints", type=whole, default=8, help="held-out hints that are sampled and scored (default: 8)")
    add("--num-workers", type=count, default=0 if usable_cpus() <= 4 else 4, decides=False, help="that load pictures")
    add("--hint-init", choices=("default", "he"), help=f"of the hint encoder {both('hint_init')}")
    add("--connection", choices=("zero", "gaussian"), default="zero", help="gaussian: the ablation of Fig. 8b")
    add("--copy", choices=("full", "lite"), default="full", help="lite: the ablation of Fig. 8c")
    add("--only-mid-control", action="store_true", help="connect the middle block alone (docs/training.md)")
    add("--unlock-decoder", action="store_true", help="train the UNet's decoder too (docs/training.md)")
    add("--report-to", choices=("jsonl", "tensorboard"), default="jsonl", decides=False, help="beside log.jsonl")
    options.add_device(parser)
    args = parser.parse_args()
    if args.report_to == "tensorboard" and find_spec("tensorboard") is None:
        raise UserError("--report-to tensorboard: not installed; pip install tensorboard, or leave it out")
    return args


def main() -> None:
    args = parse_arguments()
    with Run(args) as run:
        args, denoiser, optimizer, cached, latent_scale, held_out = prepare(args, run)
        train(args, run, denoiser, optimizer, cached, latent_scale, held_out)
        if run.writes:
            finish(args, run, denoiser, held_out)


def prepare(args: Namespace, run: Run) -> tuple[Namespace, Denoiser, Optimizer, CachedPairs, float, HeldOut | None]:
    """Load the base, encode the pairs, make the ControlNet. Only `held_out` keeps VAE and text encoder, to sample."""
    sd = StableDiffusion.load(args.base)
    args = options.with_defaults(args, sd.preset)
    run.begin(args)
    warn_if_slow(sd.unet, run.device)
    sd.to(run.device)
    with run.one_process_first():
        pairs, held_out_pairs = open_pairs(args.data, args.resolution, args.seed, args.validation_hints)
        cached = run.encode(sd, pairs, held_out_pairs)

    torch.manual_seed(args.seed)  # for the hint encoder's weights
    controlnet = ControlNet.from_unet(sd.unet, args.preset.hint_channels, args.hint_init, args.connection, args.copy)
    denoiser = Denoiser(  # the UNet locked, its copy trainable: equations (1) and (2)
        sd.unet, controlnet, precision=PRECISIONS[args.mixed_precision], unlock_decoder=args.unlock_decoder,
        only_mid_control=args.only_mid_control, checkpointing=args.gradient_checkpointing,
    )  # fmt: skip
    place(denoiser, run.device)
    previews = run.folder / "previews"
    held_out = HeldOut(sd, held_out_pairs, args.seed, previews, args.validation_steps > 0) if run.writes else None
    optimizer = torch.optim.AdamW(denoiser.trainable_parameters(), lr=args.learning_rate, fused=True)
    run.resume(denoiser.trained, optimizer)
    return args, denoiser, optimizer, cached, sd.latent_scale, held_out


def train(
    args: Namespace, run: Run, denoiser: Denoiser, optimizer: Optimizer, cached: CachedPairs, latent_scale: float,
    held_out: HeldOut | None,
) -> None:  # fmt: skip
    """The loop: equation (5), from the step after run.start to --max-train-steps, or until a signal ends it."""
    model, schedule, batches = run.distribute(denoiser), NoiseSchedule(device=run.device), run.batches(cached)
    learning, empty_prompt = denoiser.trainable_parameters(), cached.empty_context.to(run.device)
    batches_per_step = args.gradient_accumulation_steps
    if run.due(run.start, args.snapshot_steps):
        export(args, run, denoiser, snapshot=True)

    cooldown = round(args.cooldown * args.max_train_steps)
    for step in run.steps():
        left = args.max_train_steps - step  # the rate is constant, as released, but for the steps of the cooldown
        rate = optimizer.param_groups[0]["lr"] = args.learning_rate * min(1, (left + 1) / (cooldown + 1))
        loss, names = torch.zeros((), device=run.device), []
        for i in range(batches_per_step):
            batch = next(batches)
            generator, shape = generator_for(args.seed, NOISE, batch.number), (batch.size, *batch.latent_shape)
            vae_noise, eps = (run.share(torch.randn(shape, generator=generator)) for _ in range(2))
            t = run.share(torch.randint(schedule.steps, shape[:1], generator=generator))
            dropped = run.share(torch.rand(shape[:1], generator=generator)) < args.proportion_empty_prompts

            z0 = latent_scale * sample_latent(batch.moments, vae_noise)
            z_t = schedule.add_noise(z0, eps, t)
            # Without a prompt the copy reads the meaning off the hint (Sec. 3.3). The released tutorial drops none.
            context = torch.where(dropped[:, None, None], empty_prompt, batch.context)
            with run.accumulating(model, last=i + 1 == batches_per_step):
                batch_loss = F.mse_loss(model(z_t, t, context, batch.hint), eps) / batches_per_step  # equation (5)
                run.scaler.scale(batch_loss).backward()
            loss += batch_loss.detach()
            names += batch.names
        run.scaler.unscale_(optimizer)
        loss, gradient_norm = run.mean(loss), nn.utils.get_total_norm([p.grad for p in learning]).item()
        run.check(step, loss, gradient_norm, names)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()

        entry = run.finished({"step": step, "loss": loss, "gradient_norm": gradient_norm, "lr": rate})
        if run.due(step, args.preset.response_steps):
            entry |= held_out.response(denoiser)
        if run.due(step, args.validation_steps):
            entry |= held_out.preview(denoiser.controlnet, step)
        if run.due(step, args.snapshot_steps):
            export(args, run, denoiser, snapshot=True)
        run.log(entry)
        run.say(*milestones(run.history))
        if run.due_to_save(step):
            run.save()
            export(args, run, denoiser)
            plot_convergence({run.folder.name: run.history}, run.folder / "convergence.png")


def export(args: Namespace, run: Run, denoiser: Denoiser, snapshot: bool = False) -> None:
    """Write the ControlNet for other programs, with a decoder that was trained; for draw.py a snapshot, in float16."""
    config = json.dumps(run.config)
    licence = {"license": args.preset.license} if args.base in SOURCES else {}  # of others it is not known
    metadata = {"base": args.base, "steps": str(run.step), "config": config} | licence
    file = f"snapshots/step-{run.step}.safetensors" if snapshot else "controlnet.safetensors"
    decoder = {}
    if args.unlock_decoder:
        metadata["unlock_decoder"] = "true"  # sample.py then loads it into the base
        names, tensors = official_names(denoiser.unet), denoiser.unet.state_dict()
        decoder = {names[k]: tensor for k, tensor in tensors.items() if k.split(".")[0] in denoiser.trained}
    save_controlnet(denoiser.controlnet, run.folder / file, metadata=metadata, others=decoder,
                    dtype=torch.float16 if snapshot else None)  # fmt: skip


def finish(args: Namespace, run: Run, denoiser: Denoiser, held_out: HeldOut) -> None:
    """Write what is left of the run's files, and say what to do next."""
    if run.step == run.start:  # nothing was left to do, but maybe the run was killed between checkpoint and this file
        export(args, run, denoiser)
        plot_convergence({run.folder.name: run.history}, run.folder / "convergence.png")
    if run.step == args.max_train_steps and args.validation_steps and run.step % args.validation_steps:
        # Said, but not logged: a longer run that is resumed from here would not have it in its log.
        run.say(*milestones([{"step": run.step} | held_out.preview(denoiser.controlnet, run.step)]))
    run.say_what_next(held_out.prompts[0])


if __name__ == "__main__":
    run_command_line(main, "--gradient-checkpointing, --validation-steps 0, --mixed-precision auto, a lower "
                     "--resolution, or a lower --train-batch-size with --gradient-accumulation-steps")  # fmt: skip
