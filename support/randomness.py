"""Randomness that depends on a seed and a step alone, so that a resumed run goes on as if it had not stopped."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

NOISE, ORDER, HELD_OUT = range(3)  # what is drawn: each use has numbers of its own


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator for a key (seed, use, number of the batch or epoch).

    The key is hashed, since torch's CPU generator keeps only the lower 32 bits of a seed.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def index_batches(count: int, batch_size: int, seed: int, first: int, rows: slice = slice(None)) -> Iterator[list[int]]:
    """Batches of indices without end, from batch number `first` on: all pairs in a new order, again and again.

    Only the `rows` of each batch that are this process's are given.
    """

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        return torch.randperm(count, generator=generator_for(seed, ORDER, epoch)).tolist()

    position = first * batch_size
    while True:
        yield [order(i // count)[i % count] for i in range(position, position + batch_size)[rows]]
        position += batch_size
