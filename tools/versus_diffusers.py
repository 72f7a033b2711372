"""diffusers' side of tools/bench.py, as its train_controlnet.py and its pipelines do the same work."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from clip_text import CLIPTextConfig, Tokenizer
from formats.diffusers import BETAS, unet_settings
from support.devices import PRECISIONS
from support.files import save_json
from unet import UNetConfig
from vae import VAEConfig

SAMPLING_STEPS, GUIDANCE_SCALE = 4, 9.0  # on both sides
STEPS = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
DDIM = BETAS | STEPS
Work = Callable[[Callable[[str], None]], None]  # does the work once, and calls back after each of its parts


def settings(unet: UNetConfig, vae: VAEConfig, text: CLIPTextConfig, latent_scale: float) -> dict[str, dict]:
    """What diffusers and transformers call these sizes; in all else their defaults are Stable Diffusion 1.x's."""
    levels = len(vae.channel_mult)
    return {
        "unet": unet_settings(unet),
        "vae": {
            "block_out_channels": [vae.channels * mult for mult in vae.channel_mult],
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": vae.num_res_blocks, "norm_num_groups": vae.norm_groups, "scaling_factor": latent_scale,
        },
        "text_encoder": {
            "model_type": "clip_text_model", "vocab_size": text.vocab_size, "hidden_size": text.width,
            "intermediate_size": text.mlp_width, "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
        },
    }  # fmt: skip


def base_models(*sizes) -> tuple:
    """Their UNet, VAE and text encoder of these sizes, as for `settings`, with random weights."""
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet, vae, text = settings(*sizes).values()
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
    return UNet2DConditionModel.from_config(unet), AutoencoderKL.from_config(vae), text


def networks(args: Namespace, device: torch.device) -> tuple:
    """UNet, VAE and text encoder, locked and in the precision asked for, and a ControlNet in float32."""
    from diffusers import ControlNetModel

    preset, dtype = args.preset, PRECISIONS[args.precision]
    unet, vae, text = base_models(preset.unet, preset.vae, preset.text, preset.latent_scale)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=preset.hint_channels)
    return *(model.to(device, dtype).requires_grad_(False) for model in (unet, vae, text)), controlnet.to(device)


def training(args: Namespace, device: torch.device) -> Work:
    """A step of train_controlnet.py."""
    from diffusers import DDPMScheduler

    unet, vae, text, controlnet = networks(args, device)
    dtype, scheduler = unet.dtype, DDPMScheduler(**BETAS)
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=args.preset.learning_rate)
    images, hints = torch.rand(2, args.batch_size, 3, args.resolution, args.resolution).to(device, dtype)
    ids = args.ids.to(device)

    def step(lap: Callable[[str], None]) -> None:
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
            context = text(ids)[0]
        lap("encode")
        noise = torch.randn(latents.shape, dtype=dtype, device=device)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=device)
        noisy = scheduler.add_noise(latents.float(), noise.float(), t).to(dtype)
        with torch.autocast(device.type, dtype, enabled=args.precision != "fp32"):
            down, middle = controlnet(noisy, t, context, controlnet_cond=hints, return_dict=False)
            predicted = unet(
                noisy, t, context, down_block_additional_residuals=[residual.to(dtype) for residual in down],
                mid_block_additional_residual=middle.to(dtype), return_dict=False,
            )[0]  # fmt: skip
        lap("forward")
        F.mse_loss(predicted.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
        lap("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lap("optimizer")

    return step


def sampling(args: Namespace, device: torch.device) -> Work:
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

    unet, vae, text, controlnet = networks(args, device)
    pipeline = StableDiffusionControlNetPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, controlnet=controlnet.to(unet.dtype),
        scheduler=DDIMScheduler(**DDIM), safety_checker=None, feature_extractor=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    hints, ids = torch.rand(args.batch_size, 3, args.resolution, args.resolution), args.ids.to(device)

    @torch.no_grad()
    def step(lap: Callable[[str], None]) -> None:
        pipeline(
            image=hints, prompt_embeds=text(ids)[0], negative_prompt_embeds=text(ids)[0], output_type="pt",
            guidance_scale=GUIDANCE_SCALE, num_inference_steps=SAMPLING_STEPS,
        )  # fmt: skip
        lap("sampling")

    return step


def write_config(folder: Path, sizes: dict, ours: Tokenizer) -> None:
    """The folder of settings that diffusers wants for a single file, with the vocabulary of our tokenizer.

    `sizes` are the arguments of StableDiffusion.
    """
    from transformers import CLIPTokenizer

    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    index = {name: ["diffusers", kind] for name, kind in classes.items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    save_json({"_class_name": "StableDiffusionPipeline"} | index, folder / "model_index.json")
    save_json({"_class_name": classes["scheduler"]} | DDIM, folder / "scheduler" / "scheduler_config.json")
    for name, values in settings(**sizes).items():
        save_json(values, folder / name / "config.json")
    merges = sorted(ours.ranks, key=ours.ranks.get)
    CLIPTokenizer(vocab=ours.ids, merges=merges).save_pretrained(folder / "tokenizer")
