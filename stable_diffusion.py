"""The four parts of Stable Diffusion as one: tokenizer, text encoder, autoencoder and UNet, with the presets."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_text import CLIPTextConfig, CLIPTextModel, Tokenizer
from files import UserError, fetch, locate, read_tensors
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig
from weights import PREFIXES, RULES, likely_cause, load_official, translate, unet_config

SD15_REPO = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD15_FILE = "v1-5-pruned-emaonly.safetensors"
TINY_FILE = Path(__file__).parent / "models" / "tiny" / "tiny-stable-diffusion.safetensors"
LOCAL_BASE = "pass a local checkpoint with --base FILE"


@dataclass(frozen=True)
class Preset:
    """Sizes of a Stable Diffusion, and what training and sampling with it default to."""

    name: str
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
    max_train_steps: int
    validation_steps: int
    response_steps: int  # between measurements of hint sensitivity and gap: 5 % of the time at most
    mixed_precision: str
    sampling_steps: int
    guidance_scale: float
    license: str  # of the base, and so of what is trained from it


SD15 = Preset(
    name="sd15",
    unet=UNetConfig(),
    vae=VAEConfig(),
    text=CLIPTextConfig(),
    latent_scale=0.18215,
    hint_channels=(16, 32, 96, 256),
    hint_init="default",
    data="fill50k",
    resolution=512,
    train_batch_size=4,
    learning_rate=1e-5,
    max_train_steps=10_000,
    validation_steps=500,
    response_steps=50,
    mixed_precision="bf16",
    sampling_steps=20,
    guidance_scale=9.0,
    license="CreativeML OpenRAIL-M",
)
TINY = Preset(
    name="tiny",
    unet=UNetConfig(model_channels=32, channel_mult=(1, 2, 3, 3), num_heads=4, context_dim=64, norm_groups=8),
    vae=VAEConfig(channels=32, channel_mult=(1, 2, 2, 2), norm_groups=8),
    text=CLIPTextConfig(vocab_size=866, width=64, mlp_width=256, num_layers=2, num_heads=4),
    latent_scale=0.50042,
    hint_channels=(8, 16, 24, 32),
    hint_init="he",
    data="drawn",
    resolution=128,
    train_batch_size=8,
    learning_rate=1e-3,
    max_train_steps=800,
    validation_steps=100,
    response_steps=10,
    mixed_precision="no",
    sampling_steps=10,
    guidance_scale=3.0,
    license="Apache-2.0",
)


class StableDiffusion(nn.Module):
    """`text_encoder`, `vae` and `unet` with their `tokenizer`, and the scale between the last two."""

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
        """Load in float32 from "tiny" (ships here), "sd15" (fetched once), a local file, or owner/repo:file.

        Sizes come from the file's metadata or else from its tensors' shapes. float32 files stay memory-mapped.
        Raises UserError when the file can't be had, is damaged, or is no Stable Diffusion 1.x.
        """
        if source == "tiny":
            path = TINY_FILE
        elif source == "sd15":
            path = fetch(SD15_REPO, SD15_FILE, LOCAL_BASE)
        else:
            path = locate(source, LOCAL_BASE)
        tensors, metadata = read_tensors(path)
        configs = read_configs(tensors, metadata, path)
        if configs["unet"].in_channels != configs["vae"].latent_channels:
            raise UserError(
                f"{path}: its UNet takes {configs['unet'].in_channels} channels, not the latent's "
                f"{configs['vae'].latent_channels}; an inpainting or InstructPix2Pix model is no base here"
            )
        tokenizer = load_tokenizer(path, configs["text"].vocab_size)
        try:
            with torch.device("meta"):
                sd = cls(tokenizer, **configs)
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(f"{path}: the config in its metadata makes no model ({error}): fetch it again") from None
        del tensors  # each part maps the file anew, so that a converted part's pages are given back
        for part in (sd.unet, sd.vae, sd.text_encoder):
            load_official(part, read_tensors(path)[0], str(path))
        return sd.eval()

    @property
    def preset(self) -> Preset:
        """The defaults for training and sampling that fit this base."""
        return TINY if self.unet.config == TINY.unet else SD15

    @property
    def device(self) -> torch.device:
        return self.unet.conv_out.weight.device

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompts -> context [B, 77, D]. Prompts over 75 tokens are cut."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> a scaled sample [B, 4, H/8, W/8] of their latent distribution."""
        moments = self.vae.encode(images)
        mean = moments[:, : moments.shape[1] // 2]
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return self.sample_latents(moments, noise)

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Moments [B, 8, h, w] and normal noise [B, 4, h, w] -> scaled latents: mean + σ · noise, times the scale."""
        mean, log_variance = moments.chunk(2, dim=1)
        return self.latent_scale * (mean + (log_variance.clamp(-30, 20) / 2).exp() * noise)

    def decode_latents(self, z: Tensor) -> Tensor:
        """Scaled latents [B, 4, h, w] -> images [B, 3, 8h, 8w], clipped to [-1, 1]."""
        return self.vae.decode(z / self.latent_scale).clamp(-1, 1)


def config_metadata(sd: StableDiffusion) -> dict[str, str]:
    """What `read_configs` needs beside tensors: a miniature's heads and groups can't be read off its shapes."""
    configs = {"text": asdict(sd.text_encoder.config), "vae": asdict(sd.vae.config), "unet": asdict(sd.unet.config)}
    return {"config": json.dumps(configs | {"latent_scale": sd.latent_scale})}


def read_configs(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> dict:
    """Arguments of StableDiffusion but for the tokenizer: from the metadata, else widths and depths off the shapes.

    What shapes don't show is taken to be Stable Diffusion 1.x's: heads, norm groups, the scale.
    """
    classes = {"text": CLIPTextConfig, "vae": VAEConfig, "unet": UNetConfig}
    if "config" in metadata:
        try:
            configs = json.loads(metadata["config"])
            parts = {}
            for part, config in classes.items():
                sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in configs[part].items()}
                parts[part] = config(**sizes)
            return parts | {"latent_scale": float(configs["latent_scale"])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: the config in its metadata is broken ({error}): fetch it again") from None

    def shape(name: str) -> list[int]:
        if name not in tensors:
            raise UserError(f"{path}: {name} is missing, so this is no Stable Diffusion 1.x{likely_cause(tensors)}")
        return list(tensors[name].shape)

    def count(template: str) -> int:
        return next(i for i in range(100) if template.format(i) not in tensors)

    def official(name: str) -> str:
        return PREFIXES[UNet] + translate(name, RULES[UNet])

    vae, text = PREFIXES[AutoencoderKL], PREFIXES[CLIPTextModel]
    out_channels = shape(official("conv_out.weight"))[0]
    vae_width = shape(f"{vae}encoder.conv_in.weight")[0]
    vocab_size, text_width = shape(f"{text}embeddings.token_embedding.weight")
    return {
        "unet": unet_config(
            lambda name: shape(official(name)), lambda name: official(name) in tensors, out_channels=out_channels
        ),
        "vae": VAEConfig(
            channels=vae_width,
            channel_mult=tuple(
                shape(f"{vae}encoder.down.{level}.block.0.conv2.weight")[0] // vae_width for level in range(4)
            ),
            latent_channels=shape(f"{vae}post_quant_conv.weight")[0],
        ),
        "text": CLIPTextConfig(
            vocab_size=vocab_size,
            width=text_width,
            mlp_width=shape(f"{text}encoder.layers.0.mlp.fc1.weight")[0],
            num_layers=count(text + "encoder.layers.{}.layer_norm1.weight"),
            max_length=shape(f"{text}embeddings.position_embedding.weight")[0],
        ),
        "latent_scale": SD15.latent_scale,
    }


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The merges beside a checkpoint, in tokenizer/ beside it, or SD 1.5's from the hub. Raises UserError."""
    places = (path.parent / "merges.txt", path.parent / "tokenizer" / "merges.txt")
    merges = next((place for place in places if place.is_file()), None)
    if merges is None:
        merges = fetch(SD15_REPO, "tokenizer/merges.txt", f"put the tokenizer's merges.txt beside {path}")
    try:
        tokenizer = Tokenizer.from_merges(merges)
    except (OSError, ValueError) as error:
        raise UserError(f"{error}: fetch {merges} again") from None
    if len(tokenizer.ids) != vocab_size:
        raise UserError(
            f"{merges} makes {len(tokenizer.ids)} tokens, but {path} was trained on {vocab_size}: "
            "put the merges.txt that belongs to it beside it"
        )
    return tokenizer
