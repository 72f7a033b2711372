"""What the programs that sample have in common: a base and ControlNets, found, loaded and put on a device."""

from pathlib import Path

from support.errors import UserError

import torch

from controlnet import ControlNet
from stable_diffusion import StableDiffusion
from support.checkpoints import read_decoder
from support.devices import describe, place_for_sampling, warn_if_slow
from support.diffusers_format import CONTROLNET_FILES
from support.files import read_tensors
from support.hub import locate
from weights import load_controlnet, load_official, official_names, official_state_dict


def locate_controlnet(source: str | Path) -> Path:
    """Where the ControlNet that --controlnet means lies, after a download if need be. Raises UserError as locate."""
    return locate(source, CONTROLNET_FILES, "pass a local --controlnet FILE")


def load_to_sample(
    base: str, paths: list[Path], device: torch.device, precision: str
) -> tuple[StableDiffusion, list[ControlNet]]:
    """A base and the ControlNets in `paths`, with a decoder that one of them brings; on `device`, which is printed.

    Raises UserError as StableDiffusion.load, load_controlnet and load_decoders do.
    """
    sd = StableDiffusion.load(base)
    controlnets = [load_controlnet(path, sd.unet).requires_grad_(False) for path in paths]
    load_decoders(sd, paths)
    print(f"sampling on {describe(device)}")
    warn_if_slow(sd.unet, device)
    place_for_sampling(sd, controlnets, device, precision)
    return sd, controlnets


def brings_decoder(path: Path) -> bool:
    """Whether a decoder that was trained with it (train.py --unlock-decoder) comes with a ControlNet."""
    return bool(read_decoder(path)) or (path.is_file() and "unlock_decoder" in read_tensors(path)[1])


def load_decoders(sd: StableDiffusion, paths: list[Path]) -> bool:
    """Load a decoder that was trained with a ControlNet into the UNet; True if one was.

    Raises UserError if two ControlNets bring one.
    """
    marked, names = [path for path in paths if brings_decoder(path)], official_names(sd.unet)
    if len(marked) > 1:
        raise UserError(f"{marked[0]} and {marked[1]} both bring a decoder of their own: use one of them at a time")
    for path in marked:
        tensors = {names[name]: tensor for name, tensor in read_decoder(path).items()} or read_tensors(path)[0]
        load_official(sd.unet, official_state_dict(sd.unet) | tensors, str(path))
    return bool(marked)
