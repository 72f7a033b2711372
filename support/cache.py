"""Targets and prompts encoded once, before training: the locked encoders give the same at every step."""

import contextlib
import hashlib
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from support.errors import UserError, reading, warn_if_cut, writing

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from support.devices import fast_precision
from support.files import read_json, save_json
from support.listing import refuse_broken

FLUSH_EVERY = 1000  # rows
UNET = "the base's UNet"
# What a terminal sends to all processes of a program: Ctrl-C, and its own end, which Windows does not tell.
STOPPED_BY_TERMINAL = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]


class CachedPairs(Dataset):
    """Pairs whose targets and prompts are encoded: (index, hint as bytes, moments, context) of each.

    `empty_context` [77, D] is the empty prompt's.
    """

    def __init__(self, pairs, folder: Path):
        self.pairs, self.folder = pairs, folder
        rows = context_rows(pairs.prompts)
        self.context_row = [rows[prompt] for prompt in pairs.prompts]
        self.empty_context = self.row("contexts.npy", rows[""])

    def row(self, name: str, index: int) -> Tensor:
        # Mapped afresh each time: a map that is kept would be copied whole into every process that loads pictures.
        with reading(self.folder / name, "encoded pictures", "delete it and resume"):
            rows = np.load(self.folder / name, mmap_mode="r")
        return torch.from_numpy(rows[index].copy()).float()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor, Tensor]:
        # Pictures have 8 bits a channel: as bytes they take a quarter of the memory that workers share.
        moments = self.row("moments.npy", index)  # [8, H/8, W/8]
        context = self.row("contexts.npy", self.context_row[index])  # [77, D]
        return index, (self.pairs.hint(index) * 255).round().byte(), moments, context


def context_rows(prompts: list[str]) -> dict[str, int]:
    """The row of each distinct prompt among the encoded ones; the empty prompt's is the first."""
    return {prompt: row for row, prompt in enumerate(dict.fromkeys(["", *prompts]))}


def fingerprints(sd, pairs, held_out) -> dict[str, str]:
    """All that a training is made from: name -> a checksum, the same on another machine or device."""

    def digest(parts: Iterable) -> str:
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def weights(*modules: nn.Module) -> str:
        tensors = (tensor for module in modules for tensor in module.state_dict().values())
        return digest(tensor.cpu().contiguous().numpy() for tensor in tensors)

    base = {
        UNET: weights(sd.unet),
        "the base's VAE or text encoder": weights(sd.vae, sd.text_encoder),
        "the base's tokenizer": digest([json.dumps(sd.tokenizer.tokens).encode()]),
    }
    return base | {
        prefix + some.name(i): digest([json.dumps([some.prompts[i], some.content(i)]).encode()])[:16]
        for prefix, some in (("", pairs), ("held-out ", held_out))
        for i in range(len(some))
    }


def ignore_interrupt(worker: int) -> None:
    """For processes that load pictures: Ctrl-C reaches them too, but when to stop is the main process's decision."""
    for number in STOPPED_BY_TERMINAL:
        signal.signal(number, signal.SIG_IGN)


class Targets(Dataset):
    """A set's targets, or, for a pair that can't be read, what is wrong with it."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.pairs.image(index)
        except UserError as error:
            return str(error)


def holds(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a file is an array as write_rows makes them, of this shape."""
    try:
        rows = np.load(path, mmap_mode="r")
        return (rows.shape, rows.dtype) == (shape, np.float16)
    except Exception:  # no file, or anything else in it
        return False


@torch.no_grad()
def cache_latents(
    sd, pairs, held_out, folder: Path, inputs: dict[str, str], num_workers: int = 0, batch_size: int = 4
) -> None:
    """Encode all targets and prompts into `folder`, unless what is there was made from the same `inputs`.

    Keeps the latent distributions (moments), not samples of them, in half precision; every step then samples afresh,
    as the released code does. Every picture is opened on the way, the held-out ones too. What was stopped goes on where
    it was. Raises UserError that shows the broken pairs, or when the disk is too small.
    """
    encoded = sorted((name, checksum) for name, checksum in inputs.items() if name != UNET)
    key = {"inputs": hashlib.sha256(json.dumps(encoded).encode()).hexdigest(), "resolution": pairs.resolution}
    state_file, side = folder / "key.json", pairs.resolution // 8
    prompts, broken, state = list(context_rows(pairs.prompts)), [], {}
    finished = key | {"images": len(pairs), "prompts": len(prompts)}
    with contextlib.suppress(UserError):  # none yet, or a broken one
        state = read_json(state_file)
    whole = holds(folder / "moments.npy", (len(pairs), 2 * sd.vae.config.latent_channels, side, side))
    contexts_shape = (len(prompts), sd.text_encoder.config.max_length, sd.text_encoder.config.width)
    if state == finished and whole and holds(folder / "contexts.npy", contexts_shape):
        return
    first = state["images"] if whole and state == key | {"images": state.get("images")} else 0
    warn_if_cut(sd.tokenizer, {pairs.name(i): prompt for i, prompt in enumerate(pairs.prompts)})

    def encoded_images() -> Iterator[Tensor]:
        targets = Subset(Targets(pairs), range(first, len(pairs)))
        loader = DataLoader(
            targets, batch_size, num_workers=num_workers, collate_fn=list, worker_init_fn=ignore_interrupt
        )
        bfloat16 = sd.device.type == "cuda" and fast_precision(sd.device) == "bf16"  # in fp16 the VAE can overflow
        with tqdm(desc="encoding images, once", initial=first, total=len(pairs), unit="image") as bar:
            for batch in loader:
                broken.extend(item for item in batch if isinstance(item, str))
                if not broken:  # else the rest is only looked at
                    with torch.autocast(sd.device.type, torch.bfloat16, enabled=bfloat16):
                        yield sd.vae.encode(torch.stack(batch).to(sd.device))
                bar.update(len(batch))
        checked = Targets(held_out)
        broken.extend(item for item in (checked[i] for i in range(len(checked))) if isinstance(item, str))

    def encoded_prompts() -> Iterator[Tensor]:
        for i in tqdm(range(0, len(prompts), batch_size), desc="encoding prompts", unit="batch"):
            yield sd.encode_prompts(prompts[i : i + batch_size])

    def note(done: int) -> None:
        save_json(key | {"images": done}, state_file)

    with writing(folder, "another --output-dir"):
        if first == 0:
            state_file.unlink(missing_ok=True)
        write_rows(folder / "moments.npy", len(pairs), encoded_images(), first, note)
        if broken:
            shutil.rmtree(folder, ignore_errors=True)
            names = {some.name(i) for some in (pairs, held_out) for i in range(len(some))}
            refuse_broken(list(dict.fromkeys(broken)), len(names), "the pairs")  # few pairs are in both
        write_rows(folder / "contexts.npy", len(prompts), encoded_prompts())
        save_json(finished, state_file)


def write_rows(
    path: Path, count: int, batches: Iterator[Tensor], first: int = 0, note: Callable[[int], None] = lambda done: None
) -> None:
    """Write rows that come in batches as one float16 array of `count`, from row `first` on; what was before stays.

    Now and then, and at the end, `note` is told how many are on the disk. Raises UserError when the disk is too small.
    """
    rows, done = None, first
    for batch in batches:
        batch = batch.half().cpu().numpy()
        if rows is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            needed = 2 * (count - first) * math.prod(batch.shape[1:])
            if shutil.disk_usage(path.parent).free < needed:
                raise UserError(f"{path.parent} needs {needed / 1e9:.1f} GB for {path.name}: make room")
            shape = (count, *batch.shape[1:])
            rows = np.lib.format.open_memmap(path, "r+" if first else "w+", np.float16, shape)
        rows[done : done + len(batch)] = batch
        done += len(batch)
        if done == count or done // FLUSH_EVERY > (done - len(batch)) // FLUSH_EVERY:
            rows.flush()
            note(done)
