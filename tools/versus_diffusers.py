"""diffusers' side of tools/bench.py, as its train_controlnet.py and its pipelines do the same work.

The functions that are timed take tools.bench's options, a device and a tools.bench.Timer.
"""

from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_text import CLIPTextConfig, Tokenizer
from formats.diffusers import BETAS, unet_settings
from stable_diffusion import Preset
from unet import UNetConfig
from vae import VAEConfig

SAMPLING_STEPS, GUIDANCE_SCALE = 4, 9.0  # on both sides
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
DDIM = BETAS | STEPS


def first_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What both UNets are called with once they are loaded: z, t, context, for a picture of 256x256."""
    inputs = torch.randn(1, 4, 32, 32), torch.tensor([5]), torch.randn(1, 77, 768)
    return tuple(tensor.to(device) for tensor in inputs)


def token_ids(count: int, preset: Preset) -> Tensor:
    """Prompts as ids [count, 77]. The work does not depend on the words."""
    return torch.full((count, 77), preset.text.vocab_size - 1)


def models(preset: Preset, dtype: torch.dtype = torch.float32) -> tuple:
    """UNet, VAE and text encoder, locked and in `dtype`, and a ControlNet in float32, all with random weights."""
    from diffusers import ControlNetModel

    unet, vae, text = base_models(preset.unet, preset.vae, preset.text, preset.latent_scale)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=preset.hint_channels)
    return *(model.to(dtype).requires_grad_(False) for model in (unet, vae, text)), controlnet


def base_models(unet: UNetConfig, vae: VAEConfig, text: CLIPTextConfig, latent_scale: float) -> tuple:
    """Their UNet, VAE and text encoder of these sizes, with random weights."""
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    levels = len(vae.channel_mult)
    return (
        UNet2DConditionModel(**unet_settings(unet)),
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=[vae.channels * mult for mult in vae.channel_mult], layers_per_block=vae.num_res_blocks,
            latent_channels=vae.latent_channels, norm_num_groups=vae.norm_groups, scaling_factor=latent_scale,
        ),
        transformers.CLIPTextModel(transformers.CLIPTextConfig(
            vocab_size=text.vocab_size, hidden_size=text.width, intermediate_size=text.mlp_width,
            num_hidden_layers=text.num_layers, num_attention_heads=text.num_heads,
        )),
    )  # fmt: skip


def training(args: Namespace, device: torch.device, timer) -> None:
    """Image and prompt are encoded at each step."""
    from diffusers import DDPMScheduler

    dtype = DTYPES[args.precision]
    unet, vae, text, controlnet = (model.to(device) for model in models(args.preset, dtype))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        controlnet.enable_gradient_checkpointing()
    if args.compile:
        unet, controlnet = torch.compile(unet), torch.compile(controlnet)
    scheduler = DDPMScheduler(**BETAS)
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=args.preset.learning_rate)
    size = (args.batch_size, 3, args.resolution, args.resolution)
    images, hints = (torch.rand(size, device=device, dtype=dtype) for _ in range(2))
    ids = token_ids(args.batch_size, args.preset).to(device)

    for _ in timer.steps():
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample() * args.preset.latent_scale
            context = text(ids)[0]
            noise = torch.randn_like(latents)
            t = torch.randint(0, 1000, (args.batch_size,), device=device)
            noisy = scheduler.add_noise(latents.float(), noise.float(), t).to(dtype)
        timer.lap("encode")
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            down, middle = controlnet(noisy, t, context, controlnet_cond=hints, return_dict=False)
            predicted = unet(
                noisy, t, context, down_block_additional_residuals=[residual.to(dtype) for residual in down],
                mid_block_additional_residual=middle.to(dtype), return_dict=False,
            )[0]  # fmt: skip
        timer.lap("forward")
        F.mse_loss(predicted.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
        timer.lap("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        timer.lap("optimizer")


def sampling(args: Namespace, device: torch.device, timer) -> None:
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

    unet, vae, text, controlnet = (model.to(device) for model in models(args.preset, DTYPES[args.precision]))
    pipeline = StableDiffusionControlNetPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, controlnet=controlnet.to(unet.dtype),
        scheduler=DDIMScheduler(**DDIM), safety_checker=None, feature_extractor=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    hints = torch.rand(args.batch_size, 3, args.resolution, args.resolution)
    ids = token_ids(args.batch_size, args.preset).to(device)

    for _ in timer.steps():
        with torch.no_grad():
            prompts, empty = (text(ids)[0] for _ in range(2))
            pipeline(
                image=hints, prompt_embeds=prompts, negative_prompt_embeds=empty, guidance_scale=GUIDANCE_SCALE,
                num_inference_steps=SAMPLING_STEPS, output_type="pt",
            )  # fmt: skip
        timer.lap("sampling")


def loading(args: Namespace, device: torch.device, timer) -> None:
    for _ in timer.steps():
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_single_file(
            f"{args.folder}/model.safetensors", config=f"{args.folder}/config", local_files_only=True
        ).to(device)
        timer.lap("load")
        with torch.no_grad():
            pipeline.unet(*first_inputs(device))
        timer.lap("first forward")


def write_config(folder: Path, sizes: dict, ours: Tokenizer | None = None) -> None:
    """The folder of settings that diffusers wants for a single file, with the vocabulary of our tokenizer.

    `sizes` are the arguments of StableDiffusion.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()  # its remarks on what is not installed
    with torch.device("meta"):
        unet, vae, text = base_models(**sizes)
    scheduler, words = diffusers.DDIMScheduler(**DDIM), {}
    if ours:
        words = {"vocab": ours.ids, "merges": sorted(ours.ranks, key=ours.ranks.get)}
    tokenizer = transformers.CLIPTokenizer(**words)
    pipeline = diffusers.StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=text, tokenizer=tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_config(folder)
    for name, part in {"unet": unet, "vae": vae, "scheduler": scheduler}.items():
        part.save_config(folder / name)
    text.config.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
