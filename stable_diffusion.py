"""The four parts of Stable Diffusion as one: tokenizer, text encoder, autoencoder and UNet, with the presets."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_text import CLIPTextConfig, CLIPTextModel, Tokenizer
from controlnet import HINT_CHANNELS
from support.diffusers_format import BASE_FILES
from support.hub import locate
from support.reading import read_base_sizes, read_part_of_base
from support.sizes import read_tokenizer, sizes_of
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig, sample_latent
from weights import BASE, DIFFUSERS, load

TINY_FILE = Path(__file__).parent / "models" / "tiny" / "tiny-stable-diffusion.safetensors"
SD15_REPO = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SOURCES = {"tiny": TINY_FILE, "sd15": f"{SD15_REPO}:v1-5-pruned-emaonly.safetensors"}


@dataclass(frozen=True)
class Preset:
    """The sizes of a Stable Diffusion, and the defaults for training and sampling with it."""

    unet: UNetConfig
    vae: VAEConfig
    text: CLIPTextConfig
    latent_scale: float  # latents are multiplied by it so that their standard deviation is about 1
    hint_channels: tuple[int, ...]
    hint_init: str
    data: str
    resolution: int  # of images, pixels a side
    train_batch_size: int
    learning_rate: float
    cooldown: float  # share of the steps, the last ones, in which the learning rate falls to 0; released: 0
    max_train_steps: int
    validation_steps: int
    response_steps: int  # between measurements of hint sensitivity and gap
    snapshot_steps: int  # between the snapshots that draw.py scrubs through
    mixed_precision: str
    sampling_steps: int
    guidance_scale: float
    license: str  # of the base, and so of what is trained from it


SD15 = Preset(
    unet=UNetConfig(), vae=VAEConfig(), text=CLIPTextConfig(), latent_scale=0.18215,
    hint_channels=HINT_CHANNELS, hint_init="default", data="fill50k", resolution=512, train_batch_size=4,
    learning_rate=1e-5, cooldown=0.0, max_train_steps=10_000, validation_steps=500, response_steps=50,
    snapshot_steps=0, mixed_precision="auto", sampling_steps=20, guidance_scale=9.0, license="CreativeML OpenRAIL-M",
)  # fmt: skip
TINY = Preset(
    unet=UNetConfig(model_channels=32, channel_mult=(1, 2, 3, 3), num_heads=4, context_dim=64, norm_groups=8),
    vae=VAEConfig(channels=32, channel_mult=(1, 2, 2, 2), norm_groups=8),
    text=CLIPTextConfig(vocab_size=866, width=64, mlp_width=256, num_layers=2, num_heads=4), latent_scale=0.50042,
    hint_channels=(8, 16, 24, 32), hint_init="he", data="drawn", resolution=128, train_batch_size=32,
    learning_rate=2e-3, cooldown=0.4, max_train_steps=240, validation_steps=40, response_steps=5,
    snapshot_steps=10, mixed_precision="no", sampling_steps=20, guidance_scale=4.0, license="Apache-2.0",
)  # fmt: skip


class StableDiffusion(nn.Module):
    """The `tokenizer`, `text_encoder`, `vae` and `unet`, and the scale of the latents between the last two."""

    def __init__(
        self, tokenizer: Tokenizer, text: CLIPTextConfig, vae: VAEConfig, unet: UNetConfig, latent_scale: float
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = CLIPTextModel(text)
        self.vae = AutoencoderKL(vae)
        self.unet = UNet(unet)
        self.latent_scale = latent_scale

    @classmethod
    def load(cls, source: str | Path) -> "StableDiffusion":
        """Load in float32 from "tiny" (ships here), "sd15", a local file or folder, owner/repo:file or owner/repo.

        A folder or a repository is one in diffusers' layout. Sizes come from metadata or settings, or else from the
        tensors' shapes. What is in float32 stays memory-mapped. Raises UserError if it can't be found or downloaded,
        is damaged, or is no Stable Diffusion 1.x.
        """
        path = locate(SOURCES.get(source, source), BASE_FILES, "pass a local checkpoint with --base FILE")
        sizes = {"latent_scale": SD15.latent_scale} | read_base_sizes(path, BASE, DIFFUSERS)
        tokenizer = read_tokenizer(path, sizes["text"].vocab_size, SD15_REPO)
        with sizes_of(path):
            sd = cls(tokenizer, **sizes)
        # Map the file again for each network, so that memory is freed as soon as the network has been converted.
        for network in (sd.unet, sd.vae, sd.text_encoder):
            load(network, read_part_of_base(path, type(network), BASE, DIFFUSERS))
        return sd.eval()

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
