"""Where tensors live, how memory is laid out there, and in which precision is computed."""

import contextlib
import ctypes
import os
import sys

import torch
from torch import nn

from support.errors import UserError, warn

PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def usable_cpus() -> int:
    """How many processors this process may use: in a container, or under taskset, not all that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str | None, tune: bool = True) -> torch.device:
    """The device called `name`, by default a GPU if there is one; under torchrun the process's own.

    A CPU is tuned for memory that is used again, unless `tune` is False.
    """
    try:
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = torch.empty(0, device=own if name == "cuda" else name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # for what asks for "cuda" alone
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--device {name} is not there ({reason}): leave it out, or take cpu") from None
    if device.type == "cpu" and tune:
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let the process keep what it frees, where the C library is glibc.

    Else each large tensor is mapped afresh and zeroed page by page by the kernel, step after step: on a CPU a third of
    a training step at SD 1.5's size.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap's free end is not given back


def describe(device: torch.device) -> str:
    """What the user knows the device as: "cuda:0 (NVIDIA GeForce RTX 3090, 25 GB)", "cpu (2 threads)"."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"{device} ({card.name}, {card.total_memory / 1e9:.0f} GB)"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def small(module: nn.Module) -> bool:
    """Whether it is of the miniature's size rather than Stable Diffusion's."""
    return sum(p.numel() for p in module.parameters()) < 100e6


def warn_if_slow(unet: nn.Module, device: torch.device) -> None:
    if device.type == "cpu" and not small(unet):
        warn("Stable Diffusion 1.5 on a CPU takes seconds a step at 256x256, far longer at 512x512; for a GPU install "
             "PyTorch's CUDA build")  # fmt: skip


def fast_precision(device: torch.device) -> str:
    """The half precision that the device is fast in, "bf16" or "fp16"; "no" where there is none, or it isn't known.

    GPUs before Ampere, and CPUs without instructions for it, compute bf16 by detours, slower than float32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    instructions = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if instructions.get("avx512_bf16") or instructions.get("amx_bf16") else "no"


def sampling_precision(word: str, device: torch.device) -> str:
    """What --precision means. "auto" is half precision on a GPU alone, so that pictures do not depend on the CPU."""
    if word == "auto":
        return fast_precision(device) if device.type == "cuda" else "fp32"
    return word


def place_for_sampling(sd, device: torch.device, precision: str) -> None:
    """Move a Stable Diffusion to the device, its UNet in `precision`: the VAE's numbers can be too large for fp16."""
    sd.unet.to(device, PRECISIONS[precision])
    sd.to(device)


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to the device; there its convolutions get channels_last where that pays.

    On CUDA it is the format of the fast kernels (not measured here). On a CPU it pays for a small model only: at
    SD 1.5's width AdamW loses more than the convolutions gain.
    """
    channels_last = device.type == "cuda" or small(module)
    return module.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
