"""The pairs in batches; each target is encoded when a batch first needs it, and then kept."""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from support.errors import writing
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
