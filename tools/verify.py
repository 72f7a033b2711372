"""Your own files, here and in diffusers: python -m tools.verify --base FILE [--controlnet FILE].

Loads a base, and a ControlNet, in float32 on the CPU, first here, then in diffusers and transformers, so that only one
side is in memory at a time; computes the same with both, and prints how far the numbers are apart.
"""

import math
import sys
import tempfile
from argparse import Namespace
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

from support.command import run_command_line

import torch
from torch import Tensor
from tqdm import tqdm

from clip_text import MAX_LENGTH, Tokenizer
from data import draw_fill50k
from formats.diffusers import BASE_FILES, controlnet_settings, weights_in
from formats.networks import hint_channels, read_controlnet, refuse_own
from sample import generate, locate_controlnet
from stable_diffusion import SD15, SOURCES, StableDiffusion
from support import options
from support.errors import UserError
from support.files import save_json
from support.hub import locate
from support.pictures import fit_image
from tools.versus_diffusers import DDIM, STEPS, write_config
from weights import load_controlnet

TIMES = (1, 101, 301, 501, 701, 901, 981)
GUIDANCE_SCALE = 7.5
PROMPTS = [  # no curly quotes: what transformers does with them depends on its version
    "a photograph of an astronaut riding a horse", "", "Coral circle, 42 blue-ish backgrounds!!", "it's  NAÏVE ½ x²",
    "日本語 🎨🖌️ здравствуй", "masterpiece, (best quality:1.2), <lora:x:1> " + "very " * 90 + "long",
]  # fmt: skip
# How far rounding may bring two programs apart in float32: max |ours - theirs| / max |theirs|. A sample goes through
# the UNet twice a step, each step from where the last one ended.
LIMITS = defaultdict(lambda: 1e-4, {"tokens": 0.0, "sample": 1e-2})
Numbers = dict[str, Tensor]


def inputs(size: int) -> dict[str, Tensor]:
    """What both sides are given: a drawn pair, and a latent of noise."""
    hint, target, _ = draw_fill50k(0, size)
    hint, image = (fit_image(picture, size)[None] for picture in (hint, target))
    # The numbers that `generate` draws for seed 0.
    noise = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    return {"hint": hint, "image": image * 2 - 1, "z": noise}


@torch.no_grad()
def our_side(args: Namespace, base: Path, control: Path | None) -> tuple[Numbers, dict, Tokenizer]:
    """Our numbers, the sizes of the base, and its tokenizer."""
    sd, given = StableDiffusion.load(base), inputs(args.resolution)
    controlnets = [load_controlnet(control, sd.unet)] if control else []
    z, context = given["z"], sd.encode_prompts(PROMPTS[:1])
    numbers = {"tokens": sd.tokenizer(PROMPTS), "text": sd.encode_prompts(PROMPTS)}
    numbers |= {"VAE, encoded": sd.vae.encode(given["image"]), "VAE, decoded": sd.vae.decode(z)}
    for t in TIMES:
        at = torch.tensor([t])
        residuals = controlnets[0](z, given["hint"], at, context) if control else None
        numbers |= {f"residual {i:2} at t = {t}": r for i, r in enumerate(residuals or [], 1)}
        numbers[f"ε at t = {t}"] = sd.unet(z, at, context, residuals)
    hints = [given["hint"]] * len(controlnets)
    with tqdm(total=args.steps, desc="sampling") as bar:
        numbers["sample"] = generate(
            sd, controlnets, hints, PROMPTS[:1], steps=args.steps, guidance_scale=GUIDANCE_SCALE,
            size=(args.resolution,) * 2, watch=lambda z_0: bar.update(),
        )  # fmt: skip
    sizes = {"unet": sd.unet.config, "vae": sd.vae.config, "text": sd.text_encoder.config}
    return numbers, sizes | {"latent_scale": sd.latent_scale}, sd.tokenizer


@torch.no_grad()
def their_side(args: Namespace, base: Path, control: Path | None, config: Path) -> Numbers:
    """diffusers' numbers. `config` is a folder of settings for single files."""
    pipeline, given = their_pipeline(base, control, config), inputs(args.resolution)
    z, controlnet = given["z"], getattr(pipeline, "controlnet", None)
    whole = {"padding": "max_length", "max_length": MAX_LENGTH, "truncation": True}
    ids = pipeline.tokenizer(PROMPTS, return_tensors="pt", **whole).input_ids
    text = torch.cat([pipeline.text_encoder(row[None])[0] for row in ids])
    context, empty = text[:1], text[1:2]
    numbers = {"tokens": ids, "text": text}
    numbers["VAE, encoded"] = pipeline.vae.encode(given["image"]).latent_dist.parameters
    numbers["VAE, decoded"] = pipeline.vae.decode(z).sample
    for t in TIMES:
        more = {}
        if controlnet:
            down, middle = controlnet(z, t, context, given["hint"], return_dict=False)
            numbers |= {f"residual {i:2} at t = {t}": r for i, r in enumerate([*down, middle], 1)}
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        numbers[f"ε at t = {t}"] = pipeline.unet(z, t, context, **more).sample
    hint = {"image": given["hint"]} if controlnet else {"height": args.resolution, "width": args.resolution}
    picture = pipeline(
        prompt_embeds=context, negative_prompt_embeds=empty, latents=z, guidance_scale=GUIDANCE_SCALE,
        num_inference_steps=args.steps, output_type="pt", **hint,
    ).images  # fmt: skip
    return numbers | {"sample": picture * 2 - 1}


def their_pipeline(base: Path, control: Path | None, config: Path):
    import diffusers
    import transformers

    single = {"local_files_only": True, "torch_dtype": torch.float32}
    kind, parts = diffusers.StableDiffusionPipeline, {"safety_checker": None}
    if control:
        kind, controlnet = diffusers.StableDiffusionControlNetPipeline, diffusers.ControlNetModel
        if control.is_dir():
            parts["controlnet"] = pretrained(controlnet, control)
        else:
            parts["controlnet"] = controlnet.from_single_file(str(control), config=str(config / "controlnet"), **single)
    if not base.is_dir():
        pipeline = kind.from_single_file(str(base), config=str(config), **single, **parts)
        pipeline.scheduler = diffusers.DDIMScheduler(**DDIM)
        return pipeline
    words = base if (base / "tokenizer" / "vocab.json").is_file() else config
    schedule = base if (base / "scheduler").is_dir() else config
    return kind(
        unet=pretrained(diffusers.UNet2DConditionModel, base / "unet"),
        vae=pretrained(diffusers.AutoencoderKL, base / "vae"),
        text_encoder=pretrained(transformers.CLIPTextModel, base / "text_encoder"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(words / "tokenizer"),
        # the folder's own noise, and the steps that both programs can take, whichever sampler it was saved with
        scheduler=diffusers.DDIMScheduler.from_pretrained(schedule / "scheduler", **STEPS),
        feature_extractor=None, requires_safety_checker=False, **parts,
    )  # fmt: skip


def pretrained(kind, folder: Path):
    """One of their models from its folder, in float32."""
    variant = "fp16" if ".fp16." in weights_in(folder).name else None
    return kind.from_pretrained(folder, variant=variant, local_files_only=True, torch_dtype=torch.float32)


def compare(ours: Numbers, theirs: Numbers) -> dict[str, float]:
    """The largest difference of what was compared, relative to the largest number. All times are one row."""
    worst: dict[str, float] = {}
    for name, values in ours.items():
        if values.shape != theirs[name].shape:
            raise UserError(f"{name} is {list(values.shape)} here, {list(theirs[name].shape)} in diffusers")
        difference = ((values - theirs[name]).abs().max() / theirs[name].abs().max().clamp_min(1e-12)).item()
        kind = name.partition(" at ")[0]
        worst[kind] = max(worst.get(kind, 0.0), difference if math.isfinite(difference) else math.inf)
    return worst


def main() -> None:
    parser = options.ArgumentParser(prog="python -m tools.verify", description="Compare a file here and in diffusers.")
    # Of other numbers of steps diffusers visits other times than `generate`.
    divisor = options.number(int, lambda n: 0 < n < 1000 and 1000 % n == 0, "a divisor of 1000, below it")
    parser.add_argument("--base", default="sd15", help="as for sample.py (default: sd15)")
    parser.add_argument("--controlnet", help="as for sample.py")
    parser.add_argument("--resolution", type=options.side, default=256, help="of the picture (default: 256)")
    parser.add_argument("--steps", type=divisor, default=20, help="a divisor of 1000 (default: 20)")
    args = parser.parse_args()
    if missing := next((name for name in ("diffusers", "transformers") if find_spec(name) is None), None):
        raise UserError(f"{missing} is not installed: pip install -r requirements-dev.txt")
    base = locate(SOURCES.get(args.base, args.base), BASE_FILES, "pass a local checkpoint with --base FILE")
    if control := args.controlnet and locate_controlnet(args.controlnet):
        part = read_controlnet(control)
        refuse_own(part)
        if control.is_dir() and not (control / "config.json").is_file():
            raise UserError(f"{control / 'config.json'}: no such file, and diffusers needs it: pass a single file")

    print("here …", flush=True)
    ours, sizes, tokenizer = our_side(args, base, control)
    with tempfile.TemporaryDirectory() as folder:
        if sizes["unet"].model_channels == SD15.unet.model_channels:  # not as we read them
            sizes = {"unet": SD15.unet, "vae": SD15.vae, "text": SD15.text, "latent_scale": SD15.latent_scale}
        write_config(Path(folder), sizes, tokenizer)
        if control:
            settings = controlnet_settings(sizes["unet"], hint_channels(part))
            save_json(settings, Path(folder) / "controlnet" / "config.json")
        print("in diffusers …", flush=True)
        theirs = their_side(args, base, control, Path(folder))
    differences = compare(ours, theirs)
    print(f"{'largest difference, relative':<30} {'here and there':>20} {'limit':>8}")
    for name, value in differences.items():
        mark = "" if value <= LIMITS[name] else "  <- too far apart"
        print(f"{name:<30} {value:>20.1e} {LIMITS[name]:>8.0e}{mark}")
    if wrong := [name for name, value in differences.items() if value > LIMITS[name]]:
        print(f"DIFFERENT: {', '.join(wrong)}")
        sys.exit(1)
    print("the same, up to rounding")


if __name__ == "__main__":
    run_command_line(main, "a lower --resolution")
