"""Hint and prompt to picture: guided DDIM sampling with any number of ControlNets, and its command line."""

import sys
from bisect import bisect_right
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from clip_text import MAX_LENGTH
from controlnet import ControlNet, add_residuals, control_weights
from data import check_resolution
from diffusion import NoiseSchedule, ddim, ddim_timesteps, guided_noise
from files import (
    ArgumentParser,
    UserError,
    choose_device,
    keep_freed_memory,
    locate,
    make_folder,
    read_image,
    read_tensors,
    run,
)
from pictures import save_picture, side_by_side, to_picture
from stable_diffusion import StableDiffusion
from weights import load_controlnet, load_official, official_state_dict

CONTROL_MODES = ("uniform", "conditional", "guess", "resolution")


@torch.no_grad()
def generate(
    sd: StableDiffusion,
    controlnets: list[ControlNet],
    hints: list[Tensor],
    prompts: list[str],
    *,
    negative_prompt: str = "",
    steps: int = 20,
    guidance_scale: float = 9.0,
    strengths: list[float] | None = None,
    mode: str = "uniform",
    eta: float = 0.0,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample one image for each prompt: [B, 3, H, W] in [-1, 1].

    `hints` has one [B, 3, H, W] in [0, 1] for each ControlNet, H and W multiples of 64; without any, `size` is
    (H, W). Image i starts from the noise of seed + i, whatever stands beside it in the batch. The residuals of
    several ControlNets are added, each times its strength and control_weights(mode). In mode "uniform" both sides
    of guidance see the hint; in the others only the conditional side does, and no ControlNet runs for the other.
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
    skipped = len(prompts) if guided and mode != "uniform" else 0  # rows whose side does not see the hint
    weights = [control_weights(mode, strength) for strength in strengths]
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

    def eps_fn(z: Tensor, t: Tensor) -> Tensor:
        if guided:
            z, t = z.repeat(2, 1, 1, 1), t.repeat(2)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            eps = sd.unet(z, t, context, control(z, t)).float()
        bar.update()
        return guided_noise(*eps.chunk(2), guidance_scale) if guided else eps

    # On a GPU always; elsewhere only when the UNet's weights are bfloat16, as in bf16 training.
    bfloat16 = device.type == "cuda" or sd.unet.encoder[0].conv.weight.dtype == torch.bfloat16
    noise = torch.Generator(device).manual_seed(seed)
    z0 = ddim(eps_fn, z_T, NoiseSchedule(), steps, eta, noise)
    bar.close()
    return torch.cat([sd.decode_latents(part) for part in z0.split(4)])  # the decoder needs the most memory


def load_decoders(sd: StableDiffusion, paths: list[Path]) -> None:
    """Put the UNet's decoder that came with a ControlNet (train.py --unlock-decoder) in the base's place.

    Raises UserError when two of them brought one.
    """
    marked = [path for path in paths if not path.is_dir() and "unlock_decoder" in read_tensors(path)[1]]
    if len(marked) > 1:
        raise UserError(f"{marked[0]} and {marked[1]} both bring a decoder of their own: use one of them at a time")
    for path in marked:
        tensors, _ = read_tensors(path)
        load_official(sd.unet, official_state_dict(sd.unet) | tensors, str(path))


def warn_if_cut(sd: StableDiffusion, prompt: str) -> None:
    """Say which words of a prompt do not fit into 75 tokens."""
    words, room = prompt.split(), MAX_LENGTH - 2

    def tokens(count: int) -> int:
        return len(sd.tokenizer.encode(" ".join(words[:count])))

    if tokens(len(words)) > room:
        kept = bisect_right(range(len(words) + 1), room, key=tokens) - 1
        rest = " ".join(words[kept:])
        print(f"warning: {tokens(len(words))} tokens in the prompt, {room} fit; cut from: {rest}", file=sys.stderr)


def parse_arguments():
    parser = ArgumentParser(description="Sample pictures that follow a hint and a prompt.")
    add = parser.add_argument
    add("--base", default="tiny", help="tiny (ships here), sd15 (fetched once), a file, or owner/repo:file")
    add("--controlnet", action="append", default=[], help="a file, a diffusers folder, or owner/repo:file; repeatable")
    add("--hint", action="append", type=Path, default=[], help="condition picture, one for each --controlnet")
    add("--strength", action="append", type=float, default=[], help="one for all, or one for each (default: 1)")
    add("--prompt", default="", help="what to paint (default: nothing, the hint alone)")
    add("--negative-prompt", default="", help="what to stay away from")
    add("--num-samples", type=int, default=1)
    add("--steps", type=int, help="DDIM steps (default: tiny 10, sd15 20)")
    add("--guidance-scale", type=float, help="β of classifier-free guidance (default: tiny 3, sd15 9)")
    add("--control-mode", choices=CONTROL_MODES, default="uniform", help="how the residuals are weighted (Sec. 3.4)")
    add("--resolution", type=int, help="shorter side in pixels, a multiple of 64 (default: tiny 128, sd15 512)")
    add("--seed", type=int, default=0, help="sample i starts from seed + i")
    add("--device", help="cpu, cuda, cuda:1, mps, … (default: cuda if there is one, else cpu)")
    add("--output", type=Path, default=Path("out.png"), help="the row of hint and samples; samples go to out-0.png, …")
    args = parser.parse_args()
    if len(args.hint) != len(args.controlnet):
        raise UserError(f"{len(args.controlnet)} --controlnet but {len(args.hint)} --hint: each needs its own")
    if len(args.strength) not in (0, 1, len(args.controlnet)):
        raise UserError(
            f"{len(args.strength)} --strength, {len(args.controlnet)} --controlnet: give one, or one for each"
        )
    if args.num_samples < 1:
        raise UserError(f"--num-samples {args.num_samples}: must be 1 or more")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more")
    if args.output.suffix != ".png":
        raise UserError(f"--output {args.output}: must end in .png")
    check_resolution(args.resolution)
    if args.steps is not None:
        try:
            ddim_timesteps(NoiseSchedule(), args.steps)
        except ValueError as error:
            raise UserError(f"--steps: {error}") from None
    return args


def main() -> None:
    args = parse_arguments()
    device = choose_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    resolution = args.resolution or 512  # for a first look at the hints, before a base is loaded
    for path in args.hint:
        read_image(path, resolution)
    advice = "pass a local file with --controlnet FILE"
    paths = [locate(source, advice) for source in args.controlnet]

    sd = StableDiffusion.load(args.base)
    controlnets = [load_controlnet(path, sd.unet).requires_grad_(False) for path in paths]
    load_decoders(sd, paths)
    for module in (sd, *controlnets):
        module.to(device)
    resolution = args.resolution or sd.preset.resolution
    hints = [read_image(path, resolution, square=False) for path in args.hint]
    sizes = {tuple(hint.shape[1:]) for hint in hints}
    if len(sizes) > 1:
        raise UserError(f"the hints have different shapes, {' and '.join(map(str, sizes))}: crop them alike")
    for prompt in (args.prompt, args.negative_prompt):
        warn_if_cut(sd, prompt)
    make_folder(args.output.absolute().parent)

    settings = {
        "base": args.base,
        "controlnet": args.controlnet,
        "hint": [str(path) for path in args.hint],
        "strength": (args.strength * len(paths))[: len(paths)] or [1.0] * len(paths),
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "steps": args.steps or sd.preset.sampling_steps,
        "guidance_scale": sd.preset.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "control_mode": args.control_mode,
        "resolution": resolution,
    }
    images = generate(
        sd,
        controlnets,
        [hint.expand(args.num_samples, -1, -1, -1) for hint in hints],
        [args.prompt] * args.num_samples,
        negative_prompt=args.negative_prompt,
        steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        strengths=settings["strength"],
        mode=args.control_mode,
        seed=args.seed,
        size=(resolution, resolution),
        progress=True,
    )
    samples = [to_picture(image) for image in images]
    for i, sample in enumerate(samples):
        path = args.output.with_name(f"{args.output.stem}-{i}.png")
        save_picture(sample, path, settings | {"seed": args.seed + i, "num_samples": 1})
    row = side_by_side([*(to_picture(hint * 2 - 1) for hint in hints), *samples])
    save_picture(row, args.output, settings | {"seed": args.seed, "num_samples": args.num_samples})
    print(f"wrote {args.output} ({'hint, ' if hints else ''}{len(samples)} samples)")


if __name__ == "__main__":
    run(main, "a lower --resolution or --num-samples")
