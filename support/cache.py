"""Targets and prompts encoded once, before training: the locked encoders give the same at every step."""

import contextlib
import hashlib
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from support.devices import fast_precision
from support.errors import UserError, warn_if_cut
from support.files import read_json, save_json
from support.listing import refuse_broken

FLUSH_EVERY = 1000  # rows


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
        return torch.from_numpy(np.load(self.folder / name, mmap_mode="r")[index].copy()).float()

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


def cache_key(sd, pairs) -> dict:
    """What the encoded rows depend on. It is the same on another machine or device, if the data are."""

    def digest(*parts: bytes) -> str:
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    encoders = (sd.vae.encoder, sd.vae.to_moments, sd.text_encoder)
    tensors = (tensor for module in encoders for tensor in module.state_dict().values())
    listed = [[prompt, pairs.content(i)] for i, prompt in enumerate(pairs.prompts)]
    return {
        "tokens": digest(json.dumps(sd.tokenizer.tokens).encode()),
        "encoders": digest(*(tensor.cpu().contiguous().numpy().tobytes() for tensor in tensors)),
        "pairs": digest(json.dumps(listed).encode()),
        "resolution": pairs.resolution,
    }


def ignore_interrupt(worker: int) -> None:
    """For processes that load pictures: Ctrl-C reaches them too, but when to stop is the main process's decision."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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


def encoded_so_far(folder: Path, state: dict, key: dict, count: int) -> int:
    """How many images a stopped encoding has left in `folder`, if it was of the same base and pairs."""
    done = state.get("images")
    with contextlib.suppress(OSError, ValueError):  # no array there, or a broken one
        if state == key | {"images": done} and len(np.load(folder / "moments.npy", mmap_mode="r")) == count:
            return done
    return 0


@torch.no_grad()
def cache_latents(
    sd, pairs, held_out, folder: Path, num_workers: int = 0, batch_size: int = 4, ready: bool = False
) -> CachedPairs:
    """Encode all targets and prompts into `folder`, unless what is there belongs to the same base and pairs.

    Keeps the latent distributions (moments), not samples of them, in half precision; every step then samples afresh,
    as the released code does. Every picture is opened on the way, the held-out ones too. What was stopped goes on where
    it was. `ready` says that another process has just done it. Raises UserError that shows the broken pairs, or when
    the disk is too small.
    """
    if ready:
        return CachedPairs(pairs, folder)
    try:
        key, state_file = cache_key(sd, pairs), folder / "key.json"
    except OSError as error:
        raise UserError(f"a picture can't be read ({error}): correct or remove its pair") from None
    prompts, broken, state = list(context_rows(pairs.prompts)), [], {}
    finished = key | {"images": len(pairs), "prompts": len(prompts)}
    with contextlib.suppress(UserError):  # none yet, or a broken one
        state = read_json(state_file)
    if state == finished:
        return CachedPairs(pairs, folder)
    first = encoded_so_far(folder, state, key, len(pairs))
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

    try:
        if first == 0:
            state_file.unlink(missing_ok=True)
        write_rows(folder / "moments.npy", len(pairs), encoded_images(), first, note)
        if broken:
            shutil.rmtree(folder, ignore_errors=True)
            names = {some.name(i) for some in (pairs, held_out) for i in range(len(some))}
            refuse_broken(list(dict.fromkeys(broken)), len(names), "the pairs")  # few pairs are in both
        write_rows(folder / "contexts.npy", len(prompts), encoded_prompts())
        save_json(finished, state_file)
    except OSError as error:
        raise UserError(f"can't write {folder} ({error}): choose another --output-dir") from None
    return CachedPairs(pairs, folder)


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
