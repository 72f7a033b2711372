"""Hint and prompt to picture: guided DDIM sampling with any number of ControlNets, and its command line."""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from controlnet import ControlNet, add_residuals, control_weights
from diffusion import NoiseSchedule, ddim, guided_noise
from stable_diffusion import StableDiffusion
from support import options
from support.devices import choose_device
from support.errors import UserError, run_command_line, warn_if_cut
from support.files import make_folder, read_tensors
from support.hub import locate
from support.pictures import fit_image, open_image, save_picture, side_by_side, to_picture
from support.randomness import DDIM_NOISE, generator_for
from weights import load_controlnet, load_official, official_state_dict

CONTROL_MODES = ("uniform", "conditional", "guess", "resolution")


@torch.no_grad()
def generate(
    sd: StableDiffusion, controlnets: list[ControlNet], hints: list[Tensor], prompts: list[str], *,
    negative_prompt: str = "", steps: int = 20, guidance_scale: float = 9.0, strengths: list[float] | None = None,
    weighting: str = "uniform", both_sides: bool = True, eta: float = 0.0, seed: int = 0,
    size: tuple[int, int] | None = None, progress: bool = False,
) -> Tensor:  # fmt: skip
    """Sample one image for each prompt: [B, 3, H, W] in [-1, 1].

    `hints` has one [B, 3, H, W] in [0, 1] for each ControlNet, H and W multiples of 64; without any, `size` is
    (H, W). Image i starts from the noise of seed + i, whatever stands beside it in the batch. The residuals of
    several ControlNets are added (Fig. 6), each times its strength and control_weights(weighting). With `both_sides`
    both sides of guidance see the hint, as released; else only the conditional one does, as in the paper (Sec. 3.4),
    and no ControlNet runs for the other.
    """
    device = sd.device
    strengths = strengths or [1.0] * len(controlnets)
    height, width = hints[0].shape[2:] if hints else size
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]  # on the CPU: alike everywhere
    latent_shape = (sd.unet.config.in_channels, height // 8, width // 8)
    z_T = torch.stack([torch.randn(latent_shape, generator=generator) for generator in generators]).to(device)

    guided = guidance_scale != 1.0  # at 1 the unconditional side cancels out
    context = sd.encode_prompts(prompts)
    if guided:  # one batch: the unconditional half first
        context = torch.cat([sd.encode_prompts([negative_prompt]).expand_as(context), context])
    skipped = len(prompts) if guided and not both_sides else 0  # rows of the side that does not see the hint
    weights = [control_weights(weighting, strength) for strength in strengths]
    hints = [hint.to(device).repeat(2 if guided and not skipped else 1, 1, 1, 1) for hint in hints]

    def control(z: Tensor, t: Tensor) -> list[Tensor] | None:
        lists = []
        for controlnet, hint, factors in zip(controlnets, hints, weights, strict=True):
            residuals = controlnet(z[skipped:], hint, t[skipped:], context[skipped:])
            lists.append([factor * residual for factor, residual in zip(factors, residuals)])
        if not lists:
            return None
        return [torch.cat([r.new_zeros(skipped, *r.shape[1:]), r]) for r in add_residuals(*lists)]

    bar = tqdm(total=steps, desc="sampling", disable=not progress)
    # On a GPU always; elsewhere only when the UNet's weights are bfloat16, as in bf16 training.
    bfloat16 = device.type == "cuda" or sd.unet.encoder[0].conv.weight.dtype == torch.bfloat16

    def eps_fn(z: Tensor, t: Tensor) -> Tensor:
        if guided:
            z, t = z.repeat(2, 1, 1, 1), t.repeat(2)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            eps = sd.unet(z, t, context, control(z, t)).float()
        bar.update()
        return guided_noise(*eps.chunk(2), guidance_scale) if guided else eps

    z0 = ddim(eps_fn, z_T, NoiseSchedule(), steps, eta, generator_for(seed, DDIM_NOISE))
    bar.close()
    return torch.cat([sd.decode_latents(latent) for latent in z0.split(1)])  # one by one: this needs the most memory


def load_decoders(sd: StableDiffusion, paths: list[Path]) -> None:
    """Load a decoder that was trained along with a ControlNet (train.py --unlock-decoder) into the base's UNet."""
    marked = [path for path in paths if not path.is_dir() and "unlock_decoder" in read_tensors(path)[1]]
    if len(marked) > 1:
        raise UserError(f"{marked[0]} and {marked[1]} both bring a decoder of their own: use one of them at a time")
    for path in marked:
        load_official(sd.unet, official_state_dict(sd.unet) | read_tensors(path)[0], str(path))


def parse_arguments():
    parser = options.ArgumentParser(description="Sample pictures that follow a hint and a prompt.")
    add, finite, steps = parser.add_argument, options.finite_float, NoiseSchedule().steps
    ddim_steps = options.number(int, lambda value: 1 <= value < steps, f"a whole number from 1 to {steps - 1}")
    add("--base", default="tiny", help="tiny (ships here), sd15 (fetched once), a file, or owner/repo:file")
    add("--controlnet", action="append", default=[], help="a file, a diffusers folder, or owner/repo:file; repeatable")
    add("--hint", action="append", type=Path, default=[], help="condition picture, one for each --controlnet")
    add("--strength", action="append", type=finite, default=[], help="one for all, or one for each (default: 1)")
    add("--prompt", default="", help="what to paint (default: nothing, the hint alone)")
    add("--negative-prompt", default="", help="what to stay away from")
    add("--num-samples", type=options.positive_int, default=1)
    add("--steps", type=ddim_steps, dest="sampling_steps", help="DDIM steps (default: tiny 10, sd15 20)")
    add("--guidance-scale", type=finite, help="β of classifier-free guidance (default: tiny 3, sd15 9)")
    add("--control-mode", choices=CONTROL_MODES, default="uniform", help="how the residuals are weighted (Sec. 3.4)")
    add("--resolution", type=options.side, help="shorter side, a multiple of 64 (default: tiny 128, sd15 512)")
    add("--seed", type=options.count_or_zero, default=0, help="sample i starts from seed + i")
    add("--device", help="cpu, cuda, cuda:1, mps, … (default: cuda if there is one, else cpu)")
    add("--output", type=Path, default=Path("out.png"), help="the row of hint and samples; samples go to out-0.png, …")
    args = parser.parse_args()
    if len(args.hint) != len(args.controlnet):
        raise UserError(f"{len(args.controlnet)} --controlnet but {len(args.hint)} --hint: each needs its own")
    if len(args.strength) not in (0, 1, len(args.controlnet)):
        raise UserError(f"{len(args.strength)} --strength, {len(args.controlnet)} --controlnet: give one, or one each")
    if args.output.suffix != ".png":
        raise UserError(f"--output {args.output}: must end in .png")
    return args


def main() -> None:
    args = parse_arguments()
    device = choose_device(args.device)
    pictures = [open_image(path) for path in args.hint]
    paths = [locate(source, "pass a local file with --controlnet FILE") for source in args.controlnet]
    sd = StableDiffusion.load(args.base)
    controlnets = [load_controlnet(path, sd.unet).requires_grad_(False) for path in paths]
    load_decoders(sd, paths)
    for module in (sd, *controlnets):
        module.to(device)
    args = options.with_defaults(args, sd.preset)
    hints = [fit_image(picture, args.resolution, square=False) for picture in pictures]
    sizes = {tuple(hint.shape[1:]) for hint in hints}
    if len(sizes) > 1:
        raise UserError(f"the hints have different shapes, {' and '.join(map(str, sizes))}: crop them alike")
    warn_if_cut(sd.tokenizer, {"--prompt": args.prompt, "--negative-prompt": args.negative_prompt})
    make_folder(args.output.absolute().parent)

    strengths = (args.strength * len(paths))[: len(paths)] or [1.0] * len(paths)
    settings = {
        "base": args.base, "controlnet": args.controlnet, "hint": [str(path) for path in args.hint],
        "strength": strengths, "prompt": args.prompt, "negative_prompt": args.negative_prompt,
        "steps": args.sampling_steps, "guidance_scale": args.guidance_scale, "control_mode": args.control_mode,
        "resolution": args.resolution,
    }  # fmt: skip
    images = generate(
        sd, controlnets, [hint.expand(args.num_samples, -1, -1, -1) for hint in hints],
        [args.prompt] * args.num_samples, negative_prompt=args.negative_prompt, steps=args.sampling_steps,
        guidance_scale=args.guidance_scale, strengths=strengths, weighting=args.control_mode,
        both_sides=args.control_mode == "uniform", seed=args.seed, size=(args.resolution,) * 2, progress=True,
    )  # fmt: skip
    samples = [to_picture(image) for image in images]
    for i, sample in enumerate(samples):
        path = args.output.with_name(f"{args.output.stem}-{i}.png")
        save_picture(sample, path, settings | {"seed": args.seed + i, "num_samples": 1})
    row = side_by_side([*(to_picture(hint * 2 - 1) for hint in hints), *samples])
    save_picture(row, args.output, settings | {"seed": args.seed, "num_samples": args.num_samples})
    print(f"wrote {args.output} ({'hint, ' if hints else ''}{len(samples)} samples)")


if __name__ == "__main__":
    run_command_line(main, "a lower --resolution or --num-samples")
