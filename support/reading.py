"""Files and folders of weights, in whatever layout, to one network's tensors under our names."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from support.errors import UserError

from torch import nn

from support.checkpoints import STATE, is_checkpoint, read_trained
from support.diffusers_format import (
    FOLDERS,
    is_controlnet_file,
    read_controlnet_folder,
    read_folder_sizes,
    read_network,
    weights_in,
)
from support.files import read_tensors
from support.formats import Layout, Part, read_part
from support.kinds import refuse_differences, warn_of_pooling
from support.sizes import HIDDEN, own_metadata, read_sizes

Layouts = Mapping[type[nn.Module], Sequence[Layout]]


def read_base_sizes(path: Path, in_file: Layouts, in_folder: Layouts) -> dict:
    """The sizes of a base's three networks: arguments of StableDiffusion.

    `path` is a single file, or a folder of diffusers. Raises UserError as read_tensors does, and for settings that are
    not Stable Diffusion 1.x's.
    """
    if path.is_dir():
        return read_folder_sizes(path, in_folder)
    tensors, metadata = read_tensors(path)
    return read_sizes(path, metadata, [read_part(layouts, tensors, path) for layouts in in_file.values()])


def read_part_of_base(path: Path, network: type[nn.Module], in_file: Layouts, in_folder: Layouts) -> Part:
    """The tensors of one of the networks, from a mapping of its own, so that no other keeps its memory."""
    if path.is_dir():
        return read_network(weights_in(path / FOLDERS[network]), network, in_folder[network])[0]
    return read_part(in_file[network], read_tensors(path)[0], path)


def read_controlnet(path: Path, layouts: Sequence[Layout]) -> tuple[Part, dict[str, int], dict[str, str]]:
    """The tensors of a ControlNet, the sizes of its base that no shape shows, and its file's metadata.

    `path` is a single file, a folder of diffusers or a file in one, or a checkpoint of train.py or the file in it.
    Raises UserError as read_tensors does, for settings that are not those of a ControlNet for Stable Diffusion 1.x, and
    for differences.
    """
    warn_of_pooling(path)
    if path.name == STATE and is_checkpoint(path.parent):
        path = path.parent
    if (path.is_dir() and not is_checkpoint(path)) or is_controlnet_file(path):
        return *read_controlnet_folder(path, layouts), {}
    tensors, metadata = read_trained(path) if is_checkpoint(path) else read_tensors(path)
    refuse_differences(path, tensors)
    hidden = {name: size for name, size in own_metadata(metadata, "unet").items() if name in HIDDEN}
    return read_part(layouts, tensors, path), hidden, metadata


def refuse_own(part: Part) -> None:
    """Raise UserError for what only this project reads."""
    if part.layout.name == "own":
        lite = "time_embed.0.weight" not in part.tensors
        what = "a ControlNet-lite: keep it as it is" if lite else "a checkpoint: pass the run's controlnet.safetensors"
        raise UserError(f"no other program can read {part.source}, {what}")
