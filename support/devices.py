"""Where tensors live, and how memory is laid out there."""

import contextlib
import ctypes
import os
import sys

import torch
from torch import nn

from support.errors import UserError


def choose_device(name: str | None, tune: bool = True) -> torch.device:
    """The device called `name`, by default a GPU if there is one. Raises UserError when there is no such device.

    A CPU is tuned for repeatable sums and for memory that is used again, unless `tune` is False.
    """
    try:
        if name is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        else:
            device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--device {name} is not there ({reason}): leave it out, or take cpu") from None
    if device.type == "cpu" and tune:
        os.environ.setdefault("MKL_CBWR", "AUTO")  # sums always in the same order, so that runs are equal bit for bit
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let the process keep what it frees, where the C library is glibc (elsewhere nothing is done).

    By default each large tensor is mapped afresh and zeroed page by page by the kernel, step after step: on a CPU a
    third of a training step at SD 1.5's size.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap's free end is not given back


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to the device; there its convolutions get channels_last where that pays.

    On CUDA it is the format of the fast kernels (not measured here). On a CPU it pays for a small model only: at
    SD 1.5's width AdamW loses more than the convolutions gain.
    """
    small = sum(p.numel() for p in module.parameters()) < 100e6
    if device.type == "cuda" or small:
        return module.to(device, memory_format=torch.channels_last)
    return module.to(device)
