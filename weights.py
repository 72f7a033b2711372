"""Weights into our networks and out of them: official Stable Diffusion and ControlNet files, diffusers' folders.

Loading is strict: a missing, unknown or misshapen tensor inside a network is an error that names it as its file does.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from controlnet import ControlNet, Denoiser
from formats import diffusers
from formats.layouts import OFFICIAL, OWN, Part, load
from formats.networks import HIDDEN, hint_channels, pick, read_controlnet
from formats.wrong_files import warn_of_pooling
from support.checkpoints import STATE, is_checkpoint, read_trained
from support.errors import UserError
from support.files import read_tensors, save_tensors
from unet import UNet


def official_names(module: nn.Module) -> dict[str, str]:
    """Our name -> the official one, for every tensor of a UNet, AutoencoderKL, CLIPTextModel or ControlNet."""
    layout = OWN if isinstance(module, ControlNet) and module.lite else OFFICIAL[type(module)]
    return {name: layout.theirs(name) for name in module.state_dict()}


def official_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module under their full official names."""
    return dict(zip(official_names(module).values(), module.state_dict().values(), strict=True))


def load_official(module: nn.Module, tensors: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Load a UNet, AutoencoderKL, CLIPTextModel or ControlNet from tensors under their full official names.

    Other networks' tensors beside them are ignored. An error, which names `source`, leaves the module unchanged.
    """
    load(module, pick(tensors, type(module), source))


def load_controlnet(source: str | Path | Part, unet: UNet) -> ControlNet:
    """A ControlNet in float32 for `unet`, from a file, a folder of diffusers, a checkpoint, or what was read of it."""
    part = source if isinstance(source, Part) else read_controlnet(Path(source))
    warn_of_pooling(part.source)
    for name in HIDDEN:
        wanted = getattr(unet.config, name)
        if (said := part.hidden.get(name)) not in (None, wanted):
            raise UserError(f"{part.source}: was copied from a base with {name} {said}, this one has {wanted}: pass "
                            "the base that it was trained with")  # fmt: skip
    with torch.device("meta"):
        copy = "lite" if part.lite else "full"
        controlnet = ControlNet.from_unet(UNet(unet.config), hint_channels(part), copy=copy)
    load(controlnet, part)
    return controlnet


def save_controlnet(
    controlnet: ControlNet, path: str | Path, layout: str = "official", metadata: dict[str, str] | None = None,
    others: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Write a ControlNet for other programs, with its tensors rounded to `dtype`.

    "official" is one .safetensors file, which A1111, ComfyUI and diffusers read. `others` are more tensors for it,
    under official names: the base's decoder if that was trained too. "diffusers" is a folder, for ControlNetModel,
    with no place for `metadata` and `others`. The lite ablation keeps our names and has no diffusers layout.
    """
    if layout == "official":
        hidden = {name: getattr(controlnet.config, name) for name in HIDDEN}
        metadata = (metadata or {}) | {"unet": json.dumps(hidden)} | ({"copy": "lite"} if controlnet.lite else {})
        tensors = official_state_dict(controlnet) | dict(others or {})
        save_tensors({name: tensor.to(dtype=dtype) for name, tensor in tensors.items()}, path, metadata)
    elif layout != "diffusers":
        raise ValueError(f"layout is 'official' or 'diffusers', not {layout!r}")
    elif controlnet.lite:
        raise UserError(f"{path}: a ControlNet-lite has no diffusers layout, only this project's own")
    else:
        diffusers.save_controlnet_folder(controlnet, Path(path), dtype)


def save_trained(denoiser: Denoiser, path: Path, metadata: dict[str, str], dtype: torch.dtype | None = None) -> None:
    """Write what train.py trained: the ControlNet, and a decoder, which sample.py then loads into the base."""
    decoder = {}
    if len(denoiser.trained) > 1:
        metadata, names = metadata | {"unlock_decoder": "true"}, official_names(denoiser.unet)
        tensors = denoiser.unet.state_dict()
        decoder = {names[k]: tensor for k, tensor in tensors.items() if k.split(".")[0] in denoiser.trained}
    save_controlnet(denoiser.controlnet, path, metadata=metadata, others=decoder, dtype=dtype)


def load_decoder(unet: UNet, path: Path) -> bool:
    """Load the decoder that was trained with a ControlNet (--unlock-decoder); False if none was."""
    folder = path.parent if path.name == STATE else path
    if is_checkpoint(folder):
        names = official_names(unet)
        decoder = {names[name]: tensor for name, tensor in read_trained(folder)[1].items()}
    else:
        tensors, metadata = read_tensors(path) if path.is_file() else ({}, {})
        decoder = tensors if "unlock_decoder" in metadata else {}
    if decoder:
        load_official(unet, official_state_dict(unet) | decoder, str(path))
    return bool(decoder)
