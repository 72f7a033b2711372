"""Hint and prompt to picture: guided DDIM sampling with any number of ControlNets, and its command line."""

import math
from collections.abc import Callable
from pathlib import Path

from support.command import run_command_line

import torch
from torch import Tensor
from tqdm import tqdm

from controlnet import CONTROL_MODES, ControlNet, add_residuals, control_weights
from diffusion import EpsFn, NoiseSchedule, ddim, guided_noise
from formats.diffusers import CONTROLNET_FILES
from stable_diffusion import StableDiffusion
from support import options
from support.detect import add_options, detector, warn_if_inverted
from support.devices import choose_device, describe, place_for_sampling, sampling_precision, warn_if_slow
from support.errors import UserError, warn_if_cut
from support.files import make_folder
from support.hub import locate
from support.pictures import fit_image, open_image, save_samples
from weights import load_controlnet, load_decoder

AT_ONCE = 8  # images in a batch, to bound the memory


@torch.no_grad()
def generate(
    sd: StableDiffusion, controlnets: list[ControlNet], hints: list[Tensor], prompts: list[str], *,
    negative_prompt: str = "", steps: int = 20, guidance_scale: float = 9.0, strengths: list[float] | None = None,
    control_mode: str = "uniform", control_start: float = 0.0, control_end: float = 1.0, seed: int = 0,
    size: tuple[int, int] | None = None, watch: Callable[[Tensor], None] | None = None,
) -> Tensor:  # fmt: skip
    """Sample one image for each prompt: [B, 3, H, W] in [-1, 1].

    `hints` has one [B, 3, H, W] in [0, 1] for each ControlNet, H and W multiples of 64; without any, `size` is (H, W).
    Image i starts from the noise of seed + i, whatever stands beside it. No ControlNet runs before the share
    `control_start` of the steps, nor after `control_end`. `watch` is shown the z_0 that each step predicts.
    Raises ValueError if a hint's batch is not the prompts'.
    """
    if any(len(hint) != len(prompts) for hint in hints):
        raise ValueError(f"{len(prompts)} prompts, but {[len(hint) for hint in hints]} hints: one for each image")
    height, width = hints[0].shape[2:] if hints else size
    shape, images = (sd.unet.config.in_channels, height // 8, width // 8), []
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]  # on the CPU: alike everywhere
    z_T = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(sd.device)
    controlled = [done / steps >= control_start and (done + 1) / steps <= control_end for done in range(steps)]
    settings = negative_prompt, guidance_scale, strengths or [1.0] * len(controlnets), control_mode, controlled
    for first in range(0, len(prompts), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        eps_fn = guided_eps(sd, controlnets, [hint[some] for hint in hints], prompts[some], *settings)
        z_0 = ddim(eps_fn, z_T[some], NoiseSchedule(), steps, watch=watch)
        if not z_0.isfinite().all():
            raise UserError("what was sampled is not finite: take a --strength and a --guidance-scale nearer to 1, "
                            "--precision fp32, or another ControlNet")  # fmt: skip
        images += [sd.decode_latents(z) for z in z_0.split(1)]  # one by one: this needs the most memory
    return torch.cat(images)


def guided_eps(
    sd: StableDiffusion, controlnets: list[ControlNet], hints: list[Tensor], prompts: list[str], negative_prompt: str,
    scale: float, strengths: list[float], mode: str, controlled: list[bool],
) -> EpsFn:  # fmt: skip
    """ε_prd of Sec. 3.4 as DDIM calls it, step by step, with ControlNets at those that are `controlled`.

    In the mode "uniform" both sides of guidance see the hints, as released; else ε_c alone does, as in the paper and in
    the released guess mode, and no ControlNet runs for ε_uc.
    """
    sides = 1 if scale == 1 else 2  # at 1 ε_uc cancels out
    hinted = sides if mode == "uniform" else 1  # sides that see the hints
    weights = [control_weights(mode, strength) for strength in strengths]
    contexts = [sd.encode_prompts([negative_prompt]).expand(len(prompts), -1, -1), sd.encode_prompts(prompts)]
    context, seeing = torch.cat(contexts[-sides:]), slice(-hinted * len(prompts), None)  # rows of the batch
    with sd.autocast():
        conditions = [net.hint_encoder(hint.to(sd.device)) for net, hint in zip(controlnets, hints, strict=True)]

    def control(z: Tensor, t: Tensor) -> list[Tensor]:
        """The residuals of all ControlNets, each times its weight, added (Fig. 6); 0 for a side that sees no hint."""
        lists = []
        for net, condition, factors in zip(controlnets, conditions, weights, strict=True):
            residuals = net.residuals(z[seeing], torch.cat([condition] * hinted), t[seeing], context[seeing])
            lists.append([factor * residual for factor, residual in zip(factors, residuals, strict=True)])
        unseeing = (sides - hinted) * len(prompts)
        return [torch.cat([r.new_zeros(unseeing, *r.shape[1:]), r]) for r in add_residuals(*lists)]

    steps = iter(controlled)

    def eps_fn(z: Tensor, t: Tensor) -> Tensor:
        z, t = torch.cat([z] * sides), torch.cat([t] * sides)  # ε_uc and ε_c in one batch
        with sd.autocast():  # for a UNet in half precision
            eps = sd.unet(z, t, context, control(z, t) if next(steps) and controlnets else None).float()
        return guided_noise(*eps.chunk(2), scale) if sides == 2 else eps

    return eps_fn


def locate_controlnet(source: str | Path) -> Path:
    """Where the ControlNet that --controlnet means lies, after a download if need be."""
    return locate(source, CONTROLNET_FILES, "pass a local --controlnet FILE")


def load_to_sample(args, device: torch.device) -> StableDiffusion:
    """The base that a command's options ask for, on `device`; `args.precision` is then no longer "auto"."""
    args.precision = sampling_precision(args.precision, device)
    sd = StableDiffusion.load(args.base, args.vae)
    warn_if_slow(sd.unet, device)
    place_for_sampling(sd, device, args.precision)
    return sd


def load_beside(sd: StableDiffusion, path: Path) -> ControlNet:
    """A ControlNet to sample with, on the base's device and in the precision of its UNet."""
    return load_controlnet(path, sd.unet).requires_grad_(False).to(sd.device, sd.unet.conv_out.weight.dtype)


def parse_arguments():
    parser = options.ArgumentParser(description="Sample pictures that follow a hint and a prompt.")
    add, finite, steps = parser.add_argument, options.finite_float, NoiseSchedule().steps
    ddim_steps = options.number(int, lambda value: 1 <= value < steps, f"a whole number from 1 to {steps - 1}")
    add("--base", default="tiny", help=options.BASE)
    add("--vae", default="", help=options.VAE)
    add("--controlnet", action="append", default=[], help=f"{options.CONTROLNET}; repeatable")
    add("--hint", action="append", type=Path, default=[], help="condition picture, one for each --controlnet")
    add_options(parser, several=True)  # --detect, --canny-low, --canny-high
    add("--invert", action="store_true", help="hints with --detect none are dark on white: turn them")
    add("--strength", action="append", type=finite, default=[], help="one for all, or one for each (default: 1)")
    add("--prompt", default="", help="what to paint (default: nothing, the hint alone)")
    add("--negative-prompt", default="", help="what to stay away from, if the guidance scale is not 1")
    add("--num-samples", type=options.positive_int, default=1)
    add("--steps", type=ddim_steps, dest="sampling_steps", help="DDIM steps (default: 20)")
    add("--guidance-scale", type=finite, help="β of classifier-free guidance (default: tiny 4, sd15 9)")
    add("--control-mode", choices=CONTROL_MODES, default="uniform", help="weights, and which side sees it (Sec. 3.4)")
    add("--control-start", type=options.fraction, default=0.0, help="share of the steps before it starts (default: 0)")
    add("--control-end", type=options.fraction, default=1.0, help="share of the steps after which it ends (default: 1)")
    options.add_placing(parser)  # --precision, --resolution, --device
    add("--seed", type=options.seed, default=0, help="sample i starts from seed + i")
    add("--output", type=options.png, default=Path("out.png"), decides=False, help="a row; samples alone: out-0.png, …")
    args = parser.parse_args()
    if len(args.hint) != len(args.controlnet):
        raise UserError(f"{len(args.controlnet)} --controlnet but {len(args.hint)} --hint: each needs its own")
    args.strength = options.one_each("--strength", args.strength, 1.0, len(args.controlnet))
    args.detect = options.one_each("--detect", args.detect, "none", len(args.controlnet))
    if args.control_start > args.control_end:
        raise UserError(f"--control-start {args.control_start} is after --control-end {args.control_end}: swap them")
    return args


def main() -> None:
    args = parse_arguments()
    device = choose_device(args.device)
    detectors = [detector(kind, args.canny_low, args.canny_high, args.invert) for kind in args.detect]
    pictures = [open_image(path) for path in args.hint]
    paths = [locate_controlnet(source) for source in args.controlnet]
    sd = load_to_sample(args, device)
    print(f"sampling on {describe(device)}")
    controlnets = [load_beside(sd, path) for path in paths]
    if sum(load_decoder(sd.unet, path) for path in paths) > 1:
        raise UserError(f"several of {', '.join(map(str, paths))} bring a decoder of their own: use one at a time")
    args = options.with_defaults(args, sd.preset)
    pictures = [fit_image(picture, args.resolution, square=False) for picture in pictures]
    hints = [detect(picture) for detect, picture in zip(detectors, pictures, strict=True)]
    sizes = {tuple(hint.shape[1:]) for hint in hints}
    if len(sizes) > 1:
        raise UserError(f"the hints have different shapes, {' and '.join(map(str, sizes))}: crop them alike")
    warn_if_cut(sd.tokenizer, {"--prompt": args.prompt, "--negative-prompt": args.negative_prompt})
    for path, hint in zip(args.hint, hints, strict=True):
        warn_if_inverted(path, hint)
    make_folder(args.output.absolute().parent)

    with tqdm(total=args.sampling_steps * math.ceil(args.num_samples / AT_ONCE), desc="sampling") as bar:
        images = generate(
            sd, controlnets, [hint.expand(args.num_samples, -1, -1, -1) for hint in hints],
            [args.prompt] * args.num_samples, negative_prompt=args.negative_prompt, steps=args.sampling_steps,
            guidance_scale=args.guidance_scale, strengths=args.strength, control_mode=args.control_mode,
            control_start=args.control_start, control_end=args.control_end, seed=args.seed,
            size=(args.resolution,) * 2, watch=lambda z_0: bar.update(),
        )  # fmt: skip
    save_samples(images, hints, args.output, args.seed, {name: getattr(args, name) for name in args.deciding})
    print(f"wrote {args.output} ({'hint, ' if hints else ''}{len(images)} samples)")


if __name__ == "__main__":
    run_command_line(main, "a lower --resolution or --num-samples")
