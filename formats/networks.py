"""One network out of any file or folder: a base's UNet, VAE or text encoder, or a ControlNet. And a base's words."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from clip_text import CLIPTextModel, Tokenizer
from controlnet import ControlNet
from formats import diffusers
from formats.layouts import BARE, BARE_VAE, OFFICIAL, OWN, SHORT_TEXT, Part
from formats.sizes import sizes_in_metadata
from formats.wrong_files import likely_cause
from support.checkpoints import STATE, is_checkpoint, read_trained
from support.errors import UserError, reading
from support.files import read_json, read_tensors
from support.hub import fetch
from vae import AutoencoderKL

LAYOUTS = {network: [layout, *diffusers.LAYOUTS[network]] for network, layout in OFFICIAL.items()}
LAYOUTS[CLIPTextModel].append(SHORT_TEXT)
LAYOUTS[AutoencoderKL].append(BARE_VAE)
LAYOUTS[ControlNet] += [BARE, OWN]
PREFIXES = tuple(layout.prefix for layout in OFFICIAL.values())
WRAPPERS = ("_orig_mod.", "module.", "controlnet.")  # before all names: torch.compile's, DataParallel's, a trainer's
TRAINERS = ("loss.", "model_ema.")  # what a VAE was trained with, beside it
# CLIP's position_ids are just 0 to 76, its projection is for comparing texts with pictures.
UNUSED = ("embeddings.position_ids", "text_projection.weight")


def pick(tensors: Mapping[str, Tensor], network: type[nn.Module], source: object) -> Part:
    """A network's tensors out of all in a file, in the first of the known layouts that the file has.

    In official files all names with no network's prefix are ignored: buffers that follow from the noise schedule, as
    betas, and running averages of the weights, model_ema.*.
    """
    while os.path.commonprefix(list(tensors)).startswith(WRAPPERS):
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    layout = next((layout for layout in LAYOUTS[network] if layout.mark in tensors), OFFICIAL[network])
    others = () if layout.prefix else (*PREFIXES, *TRAINERS)
    own = [name for name in tensors if name.startswith(layout.prefix) and not name.startswith(others)]
    picked = {layout.ours(name): tensors[name] for name in own if not name.endswith(UNUSED)}
    return Part(picked, layout, str(source), likely_cause(tensors, network is ControlNet))


def read_network(path: Path, network: type[nn.Module]) -> Part:
    """A network out of a file, or out of its own folder in diffusers' layout.

    A config.json counts in such a folder, and beside a file that has that layout and one of diffusers' names.
    """
    file = diffusers.weights_in(path) if path.is_dir() else path
    tensors, metadata = read_tensors(file)
    if "difference" in tensors:  # it fits by all its names
        raise UserError(f"{path} holds differences to a base's weights, not weights: pass the full ControlNet that "
                        "they were extracted from")  # fmt: skip
    part, settings = pick(tensors, network, file), file.with_name("config.json")
    if part.layout.name != "diffusers":
        return replace(part, metadata=metadata, hidden=sizes_in_metadata(metadata, network))
    for name, tensor in part.tensors.items():
        if network is AutoencoderKL and tensor.ndim == 2:  # linear layers there, 1x1 convolutions here
            part.tensors[name] = tensor[..., None, None]
    if settings.is_file() and (path.is_dir() or file.name.split(".")[0] in diffusers.NAMES):
        return diffusers.apply_settings(part, network, settings)
    return part


def read_base(path: Path, vae: Path | None = None) -> list[Part]:
    """A base's UNet, VAE (out of `vae`, if given) and text encoder, out of a file or a folder in diffusers' layout.

    Each from a mapping of its own, so that one that is let go gives its memory back.
    """
    places = {network: path / folder if path.is_dir() else path for network, folder in diffusers.FOLDERS.items()}
    if vae:
        places[AutoencoderKL] = vae
    if missing := [place.name for place in places.values() if place.parent == path and not place.is_dir()]:
        raise UserError(f"{path} has no {missing[0]}/ in it, as a base's folder in diffusers' layout does: pass such a "
                        "folder, or a single file")  # fmt: skip
    schedule = path / "scheduler" / "scheduler_config.json"
    if schedule.is_file():  # the sampler that it names does not matter, the diffusion process does
        diffusers.check_settings(schedule, diffusers.SCHEDULE_DEFAULTS | read_json(schedule), diffusers.SCHEDULE)
    return [read_network(place, network) for network, place in places.items()]


def read_controlnet(path: Path) -> Part:
    """A ControlNet out of a file, a folder in diffusers' layout, or a checkpoint of train.py."""
    folder = path.parent if path.name == STATE else path
    if is_checkpoint(folder):
        return pick(read_trained(folder)[0], ControlNet, folder)
    return read_network(path, ControlNet)


def refuse_own(part: Part) -> None:
    """Raise UserError for what only this project reads."""
    if part.layout is OWN:
        what = "ControlNet-lite: keep it as it is" if part.lite else "checkpoint: pass the run's controlnet.safetensors"
        raise UserError(f"no other program can read {part.source}, a {what}")


def read_tokenizer(base: Path, vocab_size: int, repo: str) -> Tokenizer:
    """Its merges are in a file beside a base or in its folder, in tokenizer/ there, or in the hub's `repo`."""
    folder = base if base.is_dir() else base.parent
    names = ("merges.txt", "tokenizer/merges.txt", "tokenizer/tokenizer.json")  # transformers 5 writes the last alone
    if (merges := next((folder / name for name in names if (folder / name).is_file()), None)) is None:
        merges = fetch(repo, "tokenizer/merges.txt", f"put the tokenizer's merges.txt beside {base}")
    if merges.suffix == ".json":
        model = read_json(merges).get("model")
        pairs = model.get("merges") if isinstance(model, dict) else None
        pairs = pairs if isinstance(pairs, list) else []
        lines = [" ".join(map(str, pair)) if isinstance(pair, list) else str(pair) for pair in pairs]
        tokenizer = Tokenizer([tuple(line.split()) for line in lines])
    else:
        with reading(merges, "list of BPE merges"):
            tokenizer = Tokenizer.from_merges(merges)
    if len(tokenizer.ids) != vocab_size:
        raise UserError(f"{merges} makes {len(tokenizer.ids)} tokens, but {base} was trained with {vocab_size}: put "
                        "the merges.txt that belongs to it beside it")  # fmt: skip
    return tokenizer
