"""Train a ControlNet: load a base, lock it, copy its encoder, and minimise equation (5). One flat loop.

`python train.py` runs on the miniature that ships here, with nothing to download; `--base sd15` on one 24 GB card.
"""

import json
import math
from contextlib import nullcontext

from support.command import run_command_line

import torch
import torch.nn.functional as F

from controlnet import ControlNet, Denoiser
from convergence import HeldOut, milestones, plot_convergence
from data import open_pairs
from diffusion import NoiseSchedule
from sample import generate, locate_controlnet
from stable_diffusion import SD15, SOURCES, TINY, StableDiffusion
from support import options
from support.batches import EncodedPairs, open_inputs
from support.devices import PRECISIONS, place, warn_if_slow
from support.dry_run import dry_run
from support.errors import UserError
from support.randomness import NOISE, generator_for
from support.run import Run
from vae import sample_latent
from weights import load_controlnet, load_decoder, save_trained


def parse_arguments():
    def both(field: str) -> str:
        return f"(default: tiny {getattr(TINY, field)}, sd15 {getattr(SD15, field)})"

    parser = options.ArgumentParser(description="Train a ControlNet on pairs of hint and picture.")
    add, positive_int, count_or_zero = parser.add_argument, options.positive_int, options.count_or_zero
    add("--base", default="tiny", help=options.BASE)
    add("--vae", default="", help=options.VAE)
    add("--data", help=f"drawn, drawn-palette, fill50k (fetched once), or a folder in its layout {both('data')}")
    add("--controlnet", help=f"go on from: {options.CONTROLNET} (default: a fresh copy of the base's encoder)")
    add("--max-train-steps", type=positive_int, help=f"optimizer steps {both('max_train_steps')}")
    add("--train-batch-size", type=positive_int, help=f"of each process {both('train_batch_size')}")
    add("--gradient-accumulation-steps", type=positive_int, default=1, help="batches for each step (default: 1)")
    add("--learning-rate", type=options.positive_float, help=both("learning_rate"))
    add("--cooldown", type=options.fraction, help=f"of the steps, the last: the rate falls {both('cooldown')}")
    add("--proportion-empty-prompts", type=options.fraction, default=0.5, help="prompts replaced by '' (default: 0.5)")
    add("--resolution", type=options.side, help=f"pixels a side, a multiple of 64 {both('resolution')}")
    add("--seed", type=options.seed, default=0)
    add("--mixed-precision", choices=("no", "auto", "bf16", "fp16"), help=f"auto: by device {both('mixed_precision')}")
    add("--gradient-checkpointing", action="store_true", decides=False, help="less memory, a third more arithmetic")
    add("--validation-steps", type=count_or_zero, decides=False, help=f"0: never {both('validation_steps')}")
    add("--snapshot-steps", type=count_or_zero, decides=False, help=f"for draw.py; 0: none {both('snapshot_steps')}")
    add("--validation-hints", type=positive_int, default=8, help="held-out hints, sampled and scored (default: 8)")
    add("--hint-init", choices=("default", "silu"), help=f"of the hint encoder {both('hint_init')}")
    add("--connection", choices=("zero", "gaussian"), default="zero", help="gaussian: the ablation of Fig. 8b")
    add("--copy", choices=("full", "lite"), default="full", help="lite: the ablation of Fig. 8c")
    add("--only-mid-control", action="store_true", help="connect the middle block alone (docs/training.md)")
    add("--unlock-decoder", action="store_true", help="train the UNet's decoder too (docs/training.md)")
    Run.add_options(parser)  # --output-dir, --resume-from-checkpoint, --device, --dry-run, …
    args = parser.parse_args()
    if args.controlnet and (args.hint_init, args.connection, args.copy) != (None, "zero", "full"):
        raise UserError("--hint-init, --connection and --copy are for a fresh copy: leave them out with --controlnet")
    return args


def main() -> None:
    args = parse_arguments()
    if args.dry_run:
        return dry_run(args, StableDiffusion.without_weights, open_pairs, assemble, train, generate)
    with Run(args) as run:
        sd, pairs, denoiser, optimizer, scaler, held_out = prepare(run)
        train(run, sd, pairs, denoiser, optimizer, scaler, held_out)
        if run.unsaved:
            save(run, denoiser)
        if held_out:
            run.say_what_next(held_out.prompts[0])


def prepare(run: Run) -> tuple:
    """Load the base, look at the pairs, make the ControlNet, and go back to where the run was: what `train` takes."""
    args = run.args
    sd, controlnet = StableDiffusion.load(args.base, args.vae).requires_grad_(False), None
    if args.controlnet:
        path = locate_controlnet(args.controlnet)
        controlnet = load_controlnet(path, sd.unet)
        if load_decoder(sd.unet, path) and not args.unlock_decoder:
            raise UserError(f"{path} brings a decoder that was trained with it: add --unlock-decoder")
        args.copy = "lite" if controlnet.lite else "full"
        run.say(f"starting from the ControlNet in {path} ({args.copy}), no fresh copy of the base's encoder")
    args = run.begin(sd.preset)
    warn_if_slow(sd.unet, run.device)
    pairs, held_out_pairs = open_pairs(args.data, args.resolution, args.seed, args.validation_hints)
    pairs = open_inputs(run, sd, controlnet, pairs, held_out_pairs)
    denoiser, optimizer, scaler, held_out = assemble(run, sd, controlnet, held_out_pairs)
    run.resume(denoiser.trained, optimizer, scaler)
    if args.controlnet and held_out and not run.history:  # what its hint moves before the first step
        run.history.append({"step": 0} | held_out.response(denoiser))
        run.log()
        run.say(*milestones(run.history))
    if run.due(args.snapshot_steps):
        export(run, denoiser, f"snapshots/step-{run.step}.safetensors", torch.float16)
    return sd, pairs, denoiser, optimizer, scaler, held_out


def assemble(run: Run, sd: StableDiffusion, controlnet: ControlNet | None, held_out_pairs) -> tuple:
    """The denoiser, its optimizer and scaler, and in the process that writes what measures it, as before all steps."""
    args = run.args
    sd.to(run.device)
    torch.manual_seed(args.seed)  # for the hint encoder's weights
    fresh = args.preset.hint_channels, args.hint_init, args.connection, args.copy
    controlnet = controlnet or ControlNet.from_unet(sd.unet, *fresh)
    denoiser = place(Denoiser(  # the UNet locked, its copy trainable: equations (1) and (2)
        sd.unet, controlnet, precision=PRECISIONS[args.mixed_precision], unlock_decoder=args.unlock_decoder,
        only_mid_control=args.only_mid_control, checkpointing=args.gradient_checkpointing,
    ), run.device)  # fmt: skip
    held_out = run.writes and HeldOut(sd, held_out_pairs, args.seed, run.folder / "previews", args.validation_steps > 0)
    optimizer = torch.optim.AdamW(denoiser.trainable_parameters(), lr=args.learning_rate, fused=True)
    # fp16 has no numbers below 6e-8: the loss is scaled up, so that small gradients are not rounded to 0.
    scaler = torch.amp.GradScaler(run.device.type, enabled=args.mixed_precision == "fp16")
    return denoiser, optimizer, scaler, held_out


def train(run: Run, sd: StableDiffusion, pairs: EncodedPairs, denoiser: Denoiser, optimizer, scaler, held_out) -> None:
    """The loop: equation (5), from the step after run.step to --max-train-steps, or until a signal ends it."""
    args, model, batches = run.args, run.distribute(denoiser), pairs.batches(run)
    schedule = NoiseSchedule(device=run.device)
    batches_per_step, cooldown = args.gradient_accumulation_steps, round(args.cooldown * args.max_train_steps)
    global_size, rows = args.train_batch_size * run.processes, run.local_rows(args.train_batch_size)

    for step in run.steps():
        left = args.max_train_steps - step  # the rate is constant, as released, but for the steps of the cooldown
        rate = optimizer.param_groups[0]["lr"] = args.learning_rate * min(1, (left + 1) / (cooldown + 1))

        # ---- the step
        loss, names = 0, []
        for i, batch in zip(range(batches_per_step), batches):
            # What is random: the seed and the batch's number decide it, and it is drawn for all processes together.
            generator, shape = generator_for(args.seed, NOISE, batch.number), (global_size, *pairs.latent_shape)
            vae_noise, eps = (torch.randn(shape, generator=generator)[rows].to(run.device) for _ in range(2))
            t = torch.randint(schedule.steps, shape[:1], generator=generator)[rows].to(run.device)
            dropped = torch.rand(shape[:1], generator=generator)[rows] < args.proportion_empty_prompts

            with torch.autocast(run.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                moments = pairs.moments(batch, sd.vae.encode)  # of each target: known, or else encoded now
                # Without a prompt the copy reads the meaning off the hint (Sec. 3.3). The released tutorial drops none.
                context = sd.encode_prompts(["" if drop else p for drop, p in zip(dropped, batch.prompts)])
            z_0 = sd.latent_scale * sample_latent(moments, vae_noise)
            z_t = schedule.add_noise(z_0, eps, t)

            accumulating = run.processes > 1 and i + 1 < batches_per_step  # else gradients are averaged over processes
            with model.no_sync() if accumulating else nullcontext():
                batch_loss = F.mse_loss(model(z_t, t, context, batch.hint), eps) / batches_per_step  # equation (5)
                scaler.scale(batch_loss).backward()
            loss += batch_loss.detach()
            names += batch.names
        scaler.unscale_(optimizer)
        gradients = [p.grad for p in denoiser.trainable_parameters()]
        loss, gradient_norm = run.mean(loss), torch.nn.utils.get_total_norm(gradients).item()
        # In fp16 a gradient can overflow: the scaler then leaves the step out, and scales the next ones less.
        skipped = scaler.get_scale() > 1 and math.isfinite(loss) and not math.isfinite(gradient_norm)
        if not skipped and not math.isfinite(loss + gradient_norm):
            raise UserError(f"step {step}: loss {loss}, gradient norm {gradient_norm}, with {', '.join(names)}; look "
                            "at these pairs, lower --learning-rate or take --mixed-precision no")  # fmt: skip
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # ---- look, and save
        gradient = {"skipped": True} if skipped else {"gradient_norm": gradient_norm}
        run.history.append(entry := {"step": step, "loss": loss, "lr": rate} | gradient)
        if run.due(args.preset.response_steps):
            entry |= held_out.response(denoiser)
        if run.due(args.validation_steps):
            entry |= held_out.preview(denoiser.controlnet, step)
        if run.due(args.snapshot_steps):
            export(run, denoiser, f"snapshots/step-{step}.safetensors", torch.float16)  # for draw.py
        run.log()
        run.say(*milestones(run.history))
        if run.due(args.checkpointing_steps):
            save(run, denoiser)


def save(run: Run, denoiser: Denoiser) -> None:
    """Write the ControlNet, the curves, and last the checkpoint, so that it never stands without the others."""
    export(run, denoiser, "controlnet.safetensors")
    plot_convergence({run.folder.name: run.history}, run.folder / "convergence.png")
    run.save()


def export(run: Run, denoiser: Denoiser, file: str, dtype: torch.dtype | None = None) -> None:
    """Write the ControlNet for other programs, with a decoder that was trained."""
    known = {"license": run.args.preset.license} if run.args.base in SOURCES else {}  # of others it is not known
    metadata = {"base": run.args.base, "steps": str(run.step), "config": json.dumps(run.config)} | known
    save_trained(denoiser, run.folder / file, metadata, dtype)


if __name__ == "__main__":
    run_command_line(main, "--gradient-checkpointing, --validation-steps 0, a lower --train-batch-size or --resolution")
