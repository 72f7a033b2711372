"""The four parts of Stable Diffusion as one: tokenizer, text encoder, autoencoder and UNet, with the presets."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_text import CLIPTextConfig, CLIPTextModel
from controlnet import HINT_CHANNELS
from formats.diffusers import BASE_FILES, VAE_FILES
from formats.layouts import load
from formats.networks import base_sizes, read_base, read_tokenizer
from support.hub import locate, on_hub
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig, sample_latent

TINY_FILE = Path(__file__).parent / "models" / "tiny" / "tiny-stable-diffusion.safetensors"
SD15_REPO = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SOURCES = {"tiny": TINY_FILE, "sd15": f"{SD15_REPO}:v1-5-pruned-emaonly.safetensors"}


@dataclass(frozen=True)
class Preset:
    """The sizes of a Stable Diffusion, and the defaults for training and sampling with it: 1.5's, unless said."""

    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text: CLIPTextConfig = CLIPTextConfig()
    latent_scale: float = 0.18215  # latents are multiplied by it so that their standard deviation is about 1
    hint_channels: tuple[int, ...] = HINT_CHANNELS
    hint_init: str = "default"
    data: str = "fill50k"
    resolution: int = 512  # of images, pixels a side
    train_batch_size: int = 4
    learning_rate: float = 1e-5
    cooldown: float = 0.0  # share of the steps, the last ones, in which the learning rate falls to 0; released: 0
    max_train_steps: int = 10_000
    validation_steps: int = 500
    response_steps: int = 50  # between measurements of hint sensitivity and gap
    snapshot_steps: int = 0  # between the snapshots that draw.py scrubs through
    mixed_precision: str = "auto"
    sampling_steps: int = 20
    guidance_scale: float = 9.0
    license: str = "CreativeML OpenRAIL-M"  # of the base, and so of what is trained from it


SD15 = Preset()
TINY = Preset(
    unet=UNetConfig(model_channels=32, channel_mult=(1, 2, 3, 3), num_heads=4, context_dim=64, norm_groups=8),
    vae=VAEConfig(channels=32, channel_mult=(1, 2, 2, 2), norm_groups=8),
    text=CLIPTextConfig(vocab_size=866, width=64, mlp_width=256, num_layers=2, num_heads=4), latent_scale=0.50042,
    hint_channels=(8, 16, 24, 32), hint_init="silu", data="drawn", resolution=128, train_batch_size=32,
    learning_rate=2e-3, cooldown=0.4, max_train_steps=240, validation_steps=40, response_steps=5,
    snapshot_steps=10, mixed_precision="no", guidance_scale=4.0, license="Apache-2.0",
)  # fmt: skip


class StableDiffusion(nn.Module):
    """The `tokenizer`, `text_encoder`, `vae` and `unet`, and the scale of the latents between the last two."""

    def __init__(self, tokenizer, text: CLIPTextConfig, vae: VAEConfig, unet: UNetConfig, latent_scale: float):
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = CLIPTextModel(text)
        self.vae = AutoencoderKL(vae)
        self.unet = UNet(unet)
        self.latent_scale = latent_scale

    @classmethod
    def load(cls, source: str | Path, vae: str | Path = "") -> "StableDiffusion":
        """In float32 "tiny", which ships here, "sd15", a file, a folder of diffusers, owner/repo:file or owner/repo.

        `vae` is another of these places, whose VAE is taken instead; the base's own is not read, and may be missing.
        """
        path = locate(SOURCES.get(source, source), BASE_FILES, "pass a local checkpoint with --base FILE")
        parts = read_base(path, locate(vae, VAE_FILES, "pass a local file with --vae FILE") if vae else None)
        sizes = {"latent_scale": SD15.latent_scale} | base_sizes(*parts)
        tokenizer = read_tokenizer(path, sizes["text"].vocab_size, SD15_REPO)
        with torch.device("meta"):
            sd = cls(tokenizer, **sizes)
        for network in (sd.unet, sd.vae, sd.text_encoder):
            load(network, parts.pop(0))  # one after the other, so that of a converted one only the copy is in memory
        return sd.eval()

    @classmethod
    def without_weights(cls, source: str | Path) -> "StableDiffusion":
        """Its networks, on the meta device. Nothing is fetched: what is not here has Stable Diffusion 1.5's sizes."""
        source, sizes = SOURCES.get(source, source), {"unet": SD15.unet, "vae": SD15.vae, "text": SD15.text}
        if not on_hub(source):
            sizes = base_sizes(*read_base(Path(source)))
        with torch.device("meta"):
            return cls(None, **{"latent_scale": SD15.latent_scale} | sizes).eval()

    @property
    def preset(self) -> Preset:
        """The defaults for training and sampling that fit this base: the miniature's for any below 320 channels."""
        return TINY if self.unet.config.model_channels < SD15.unet.model_channels else SD15

    @property
    def device(self) -> torch.device:
        return self.unet.conv_out.weight.device

    def autocast(self) -> torch.autocast:
        """For a UNet, and its ControlNets, that are stored in half precision; else it does nothing."""
        precision = self.unet.encoder[0].conv.weight.dtype  # the decoder may be in float32, if it was trained
        return torch.autocast(self.device.type, precision, enabled=precision != torch.float32)

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompts -> context [B, 77, D]. Prompts over 75 tokens are cut."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> a scaled sample [B, 4, H/8, W/8] of their latent distribution."""
        moments = self.vae.encode(images)
        noise = torch.randn(moments[:, :4].shape, generator=generator).to(moments)  # from the CPU: alike everywhere
        return self.latent_scale * sample_latent(moments, noise)

    def decode_latents(self, z: Tensor) -> Tensor:
        """Scaled latents [B, 4, h, w] -> images [B, 3, 8h, 8w], clipped to [-1, 1]."""
        return self.vae.decode(z / self.latent_scale).clamp(-1, 1)
