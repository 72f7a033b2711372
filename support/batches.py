"""What a training is made from: told by its contents before the first step, then given in batches, encoded once."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.detect import warn_if_inverted
from support.devices import usable_cpus
from support.errors import UserError, warn_if_cut, writing
from support.files import read_json, save_json
from support.listing import refuse_broken
from support.randomness import index_batches
from support.run import Run, ignore_terminal

CHECKSUM = 32  # bytes


class Batch(NamedTuple):
    """This process's rows of batch `number` of the training."""

    number: int
    pairs: list[int]  # by index
    names: list[str]
    prompts: list[str]
    hint: Tensor  # [B, 3, H, W] in [0, 1]
    images: list[Tensor | None]  # the targets [3, H, W] in [-1, 1]; None for one that was encoded before


class EncodedPairs(Dataset):
    """Pairs whose targets' latent distributions (moments, not samples of them) are encoded once, in half precision.

    `path` has one record for each pair: a checksum, then the numbers. A record counts only if its checksum is that of
    the numbers, of the pair's content and of `encoder`, a text that tells VAE, resolution and precision apart. So what
    a kill or a power cut leaves, in whatever order it was written, can't be taken for another's or for whole. Each
    picture is encoded alone, and rounded before its first use: its bits depend on nothing else.
    """

    def __init__(self, pairs, contents: list[str], path: Path, encoder: str, latent_channels: int):
        self.pairs, self.contents, self.path, self.encoder = pairs, contents, path, encoder
        self.latent_shape = (latent_channels, pairs.resolution // 8, pairs.resolution // 8)
        self.record_size = CHECKSUM + 2 * 2 * math.prod(self.latent_shape)  # half precision; mean and log variance
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, indices: list[int]) -> tuple[list[int], Tensor, list[Tensor | None]]:
        # Pictures have 8 bits a channel: as bytes they take a quarter of the memory that processes share.
        hints = torch.stack([(self.pairs.hint(i) * 255).round().byte() for i in indices])
        return indices, hints, [self.pairs.image(i) if self.known(i) is None else None for i in indices]

    def checksum(self, index: int, numbers: bytes) -> bytes:
        return hashlib.sha256(f"{self.encoder} {self.contents[index]} ".encode() + numbers).digest()

    def known(self, index: int) -> Tensor | None:
        """The moments [8, H/8, W/8] of a target; None if it was not encoded yet."""
        with open(self.path, "rb") as file:
            file.seek(index * self.record_size)
            record = file.read(self.record_size)
        checksum, numbers = record[:CHECKSUM], record[CHECKSUM:]
        if checksum != self.checksum(index, numbers):
            return None
        return torch.from_numpy(np.frombuffer(numbers, np.float16).astype(np.float32)).view(-1, *self.latent_shape[1:])

    def keep(self, index: int, moments: Tensor) -> Tensor:
        """Write a target's moments; returns them as they will be known."""
        moments = moments.half().cpu().contiguous()  # as it will be known: the order in memory decides that of sums
        numbers = moments.numpy().tobytes()
        with writing(self.path), open(self.path, "r+b") as file:
            file.seek(index * self.record_size)
            file.write(self.checksum(index, numbers) + numbers)
        return moments.float()

    @torch.no_grad()
    def moments(self, batch: Batch, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, 8, H/8, W/8] of a batch, known or else encoded now; `encode` takes [1, 3, H, W]."""
        rows, device = [], batch.hint.device
        for index, image in zip(batch.pairs, batch.images):
            row = self.known(index)  # by now it may be, as a pair can come twice
            if row is None:
                image = self.pairs.image(index) if image is None else image
                row = self.keep(index, encode(image[None].to(device))[0])
            rows.append(row)
        return torch.stack(rows).to(device)

    def batches(self, run: Run) -> Iterator[Batch]:
        """Batches of shuffled pairs without end, from the one that the next step needs."""
        args, first = run.args, run.step * run.args.gradient_accumulation_steps
        rows, size = run.local_rows(args.train_batch_size), args.train_batch_size * run.processes
        loader = DataLoader(
            self, batch_size=None, sampler=index_batches(len(self), size, args.seed, first, rows),
            num_workers=args.num_workers, pin_memory=run.device.type == "cuda", worker_init_fn=ignore_terminal,
        )  # fmt: skip
        for number, (pairs, hint, images) in enumerate(loader, start=first):
            names, prompts = [self.pairs.name(i) for i in pairs], [self.pairs.prompts[i] for i in pairs]
            yield Batch(number, pairs, names, prompts, hint.to(run.device, non_blocking=True).float() / 255, images)


def open_inputs(run: Run, sd, controlnet, pairs, held_out) -> EncodedPairs:
    """Look at the base, the ControlNet to start from if there is one, and all pairs; refuse others than at first."""
    networks = {"UNet": sd.unet, "VAE": sd.vae, "text encoder": sd.text_encoder}
    checksums = {f"base's {name}": checksum_of(network) for name, network in networks.items()}
    checksums["base's tokenizer"] = digest(json.dumps(sd.tokenizer.tokens).encode())
    checksums["ControlNet that it starts from"] = checksum_of(controlnet) if controlnet else "none"
    both = [(some, i) for some in (pairs, held_out) for i in range(len(some))]
    contents = look_at(both, record=run.folder / "cache" / "pictures.json")
    if run.writes:
        inputs = [(f"the {name}", checksum) for name, checksum in checksums.items()]
        for (some, i), content in zip(both, contents):
            inputs.append((some.name(i), digest(json.dumps([some.prompts[i], content]).encode())[:16]))
        remember(run.folder / "inputs.json", inputs, run.checkpoint is not None)
        warn_if_cut(sd.tokenizer, {pairs.name(i): prompt for i, prompt in enumerate(pairs.prompts)})
        warn_if_inverted(pairs.name(0), pairs.hint(0))
    precision = "bf16" if run.args.mixed_precision == "bf16" else "float32"  # in fp16 the VAE can overflow
    vae = checksums["base's VAE"]
    encoder, own = f"{vae} {pairs.resolution} {precision}", contents[: len(pairs)]
    return EncodedPairs(pairs, own, run.folder / "cache" / "moments", encoder, sd.vae.config.latent_channels)


def checksum_of(network: nn.Module) -> str:
    return digest(*(tensor.cpu().contiguous().numpy() for tensor in network.state_dict().values()))


def digest(*parts) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def look_at(pairs: list[tuple], record: Path) -> list[str]:
    """The contents of pairs, each (set of pairs, index). Raises UserError that shows the broken ones.

    Their files are opened, but for those that `record` knows from another time, by path, size and date. Of several
    processes one looks, the others then find the record.
    """
    with FileLock(record.with_suffix(".lock")):
        known = read_json(record, "delete it") if record.exists() else {}
        stamps = [stamp(*some.files(i)) for some, i in pairs]
        new = {stamp: pair for stamp, pair in zip(stamps, pairs) if stamp and stamp not in known}
        broken = []
        with ThreadPoolExecutor(usable_cpus()) as pool:
            contents = {key: pool.submit(some.content, i) for key, (some, i) in new.items()}
            for key, content in tqdm(contents.items(), "looking at the pairs", disable=not new):
                try:
                    known[key] = content.result()
                except UserError as error:
                    broken.append(str(error))
        if known:
            save_json(known, record)
    refuse_broken(broken, len(set(stamps)), "the pairs")
    return [known.get(stamp) or some.content(i) for stamp, (some, i) in zip(stamps, pairs)]


def stamp(*files: Path) -> str:
    """What tells without opening them that files are still the same; "" of no files."""
    return " ".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)


def remember(record: Path, inputs: list[tuple[str, str]], resumed: bool) -> None:
    """Write down the checksums of all that a run is made from; going on with anything else is refused by its name."""
    checksums = [checksum for _, checksum in inputs]
    if resumed and record.exists():
        known = read_json(record, "delete it, and these are taken for the same")["inputs"]
        if known != checksums:
            changed = (name for (name, checksum), before in zip(inputs, known) if checksum != before)
            raise UserError(f"{next(changed, 'the number of pairs')} is not what {record.parent} was trained with: "
                            "restore it, or start another --output-dir")  # fmt: skip
    save_json({"inputs": checksums}, record)
