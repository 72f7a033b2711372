"""train.py --dry-run: what a training will take, counted on tensors that have shape and type but no data.

The networks, the loop and the optimizer are the training's own. The device is a pretended CPU; what is counted there is
what a card holds but for CUDA's own context, its kernels' workspaces and fragmentation.
"""

import contextlib
import copy
import math
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from support.batches import CHECKSUM, Batch
from support.hub import on_hub
from support.options import with_defaults
from support.run import Run

GB, TERA = 1e9, 1e12
CARDS = 8, 12, 16, 24  # GB
PEAKS = {"RTX 3090": 71, "RTX 4090": 165, "H100": 989}  # TFLOP/s of dense bf16 products summed in float32, by NVIDIA
REACHED = 0.4  # of a card's peak: an estimate
FILL50K, FILL50K_ZIP = 50_000, 200_000_000  # pairs, bytes
ATTENTION = {  # of the CPU, which PyTorch's own counter leaves out
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda gradient, q, k, v, *_: sdpa_backward_flop_count(gradient, q, k, v),
}  # fmt: skip


class Count(TorchDispatchMode):
    """Adds up the bytes of all storages that are alive, and the arithmetic of products and convolutions."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = self.flop = 0
        self.known = weakref.WeakSet()

    def freed(self, size: int) -> None:
        self.bytes -= size

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, operator._overloadpacket
        if packet is torch.ops.aten._local_scalar_dense:
            return 0.5 if args[0].is_floating_point() else 1  # .item() and bool() of numbers that are not there
        out = operator(*args, **kwargs)
        if packet in ATTENTION:
            self.flop += ATTENTION[packet](*(tensor.shape for tensor in args if isinstance(tensor, Tensor)))
        elif packet in flop_registry:
            self.flop += flop_registry[packet](*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return out

    @contextlib.contextmanager
    def phase(self, peaks: dict[str, int], name: str) -> Iterator[None]:
        self.peak = self.bytes
        yield
        peaks[name] = self.peak


@contextlib.contextmanager
def pretending() -> Iterator[Count]:
    """All tensors that are made here have no data. Modules that are moved or copied get new parameters: the data of
    one can't be swapped for another's, as Module.to does it, where there is none."""

    def replace_parameters(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                before = parameter.detach()
                if (converted := convert(before)) is not before:
                    part._parameters[name] = nn.Parameter(converted, parameter.requires_grad)
        return module

    def copy_parameter(parameter: FakeTensor, memo: dict) -> nn.Parameter:
        return nn.Parameter(parameter.detach().clone(), parameter.requires_grad)

    with (
        patch.object(nn.Module, "_apply", replace_parameters),
        patch.object(FakeTensor, "__deepcopy__", copy_parameter, create=True),
        FakeTensorMode(allow_non_fake_inputs=True),
        Count() as count,
    ):
        yield count


class PretendedRun(Run):
    """A run of one step, on no device and in no folder."""

    def __init__(self, args: Namespace):
        self.args, self.folder, self.device = args, args.output_dir, torch.device("cpu")
        self.rank, self.processes, self.writes, self.step, self.history = 0, 1, True, 0, []

    def distribute(self, model: nn.Module) -> nn.Module:
        return model

    def steps(self) -> range:
        return range(1, 2)

    def due(self, every: int) -> bool:
        return False

    def log(self) -> None:
        pass


class PretendedPairs:
    """Pairs of a training, and its held-out ones: each picture is met for the first time."""

    def __init__(self, count: int, resolution: int, latent_channels: int, counter: Count):
        self.prompts, self.resolution, self.counter = [""] * count, resolution, counter
        self.latent_shape, self.encoding = (latent_channels, resolution // 8, resolution // 8), 0

    def __len__(self) -> int:
        return len(self.prompts)

    def hint(self, index: int) -> Tensor:
        return torch.zeros(3, self.resolution, self.resolution)

    image = other_hint = hint

    def batches(self, run: Run) -> Iterator[Batch]:
        size = run.args.train_batch_size
        while True:
            hint, images = torch.stack([self.hint(0)] * size), [self.image(0) for _ in range(size)]
            yield Batch(0, [0] * size, [""] * size, [""] * size, hint, images)

    @torch.no_grad()
    def moments(self, batch: Batch, encode: Callable[[Tensor], Tensor]) -> Tensor:
        before = self.counter.flop
        moments = torch.cat([encode(image[None]).float() for image in batch.images])
        self.encoding += self.counter.flop - before
        return moments


def count_training(
    args: Namespace, make_base: Callable, assemble: Callable, train: Callable, generate: Callable
) -> dict:
    """The bytes at the peak of each phase, and what else a training takes, by train.py's own parts."""
    peaks, args = {}, copy.copy(args)
    args.controlnet = None  # which takes what a fresh copy takes
    previews, args.validation_steps = args.validation_steps > 0, 0  # sampled here, in one step, and not written
    if args.mixed_precision == "auto":
        args.mixed_precision = "bf16"
    run, sd = PretendedRun(args), make_base(args.base).requires_grad_(False)
    with pretending() as count:
        sd.to_empty(device=run.device)
        sd.tokenizer = lambda prompts: torch.zeros(len(prompts), sd.text_encoder.config.max_length, dtype=torch.int64)
        pairs, held_out_pairs = (
            PretendedPairs(number, args.resolution, sd.vae.config.latent_channels, count)
            for number in (args.train_batch_size, args.validation_hints)
        )

        def preview(*controlnets: nn.Module) -> None:
            hints = torch.stack([held_out_pairs.hint(0)] * len(held_out_pairs))
            generate(
                sd, list(controlnets), [hints] * len(controlnets), held_out_pairs.prompts, control_mode="conditional",
                steps=1, size=hints.shape[2:], guidance_scale=args.preset.guidance_scale,
            )  # fmt: skip

        with count.phase(peaks, "before the first step"):
            training = assemble(args, run, sd, None, pairs, held_out_pairs)
            if previews:
                preview()
        parameters = training.denoiser.trainable_parameters()
        for parameter in parameters:  # as after the first step, which makes the optimizer's state
            parameter.grad = torch.zeros_like(parameter)
        training.optimizer.step()
        training.optimizer.zero_grad()
        with count.phase(peaks, "in a step"):
            flop = count.flop
            train(training, run)
            flop = count.flop - flop
        if previews:
            with count.phase(peaks, "in a preview"):
                preview(training.denoiser.controlnet)
        saved = [tensor for part in training.denoiser.trained.values() for tensor in part.state_dict().values()]
        with count.phase(peaks, "while saving"):  # snapshots are rounded on the card; all else leaves it as it is
            snapshot = [tensor.half() for tensor in saved] if args.snapshot_steps else []
        del snapshot
    numbers = {"saved": sum(map(Tensor.numel, saved)), "trained": sum(map(Tensor.numel, parameters))}
    record = CHECKSUM + 2 * 2 * torch.Size(pairs.latent_shape).numel()
    return {"peaks": peaks, "flop": flop, "encoding": pairs.encoding, "record": record} | numbers


def dry_run(args: Namespace, make_base: Callable, open_pairs: Callable, *parts: Callable) -> None:
    """Say what a training takes that train.py would do by these parts of it."""
    sd = make_base(args.base)
    args = with_defaults(args, sd.preset)
    number, fetched = FILL50K, {}
    if args.base == "sd15" or on_hub(args.base):
        fetched["the base"] = 4 * sum(map(Tensor.numel, sd.parameters()))
    if args.data == "fill50k" and not Path(args.data, "prompt.json").is_file():
        fetched["fill50k"] = FILL50K_ZIP
    else:
        number = len(open_pairs(args.data, args.resolution, args.seed, args.validation_hints)[0])
    taken = count_training(args, make_base, *parts)
    say_memory(args, taken["peaks"], lambda args: count_training(args, make_base, *parts)["peaks"])
    say_disk(args, taken, number, fetched)
    flop, encoding = taken["flop"] / TERA, taken["encoding"] / TERA
    print(f"TFLOP a step: {flop:.3g}, {encoding:.3g} of them to encode pictures that are met for the first time")
    seconds = ", ".join(f"{card} {flop / (REACHED * peak):.2g}" for card, peak in PEAKS.items())
    print(f"seconds a step, estimated at {REACHED:.0%} of the card's peak: {seconds}")


def say_memory(args: Namespace, peaks: dict[str, int], count_peaks: Callable[[Namespace], dict[str, int]]) -> None:
    """Print the peaks, on which cards they fit, and the option that saves most."""
    print("GB on the card: " + ", ".join(f"{peak / GB:.1f} {name}" for name, peak in peaks.items()))
    peak = max(peaks.values())
    fits = [f"{card}" for card in CARDS if peak + GB <= card * GB]
    told = f"with a GB to spare it fits in {', '.join(fits) or 'none of 8, 12, 16, 24'} GB"
    if len(fits) < len(CARDS):
        lighter = {}
        if peaks.get("in a preview") == peak:
            lighter["--validation-steps 0"] = max(size for name, size in peaks.items() if name != "in a preview")
        size = args.train_batch_size * args.gradient_accumulation_steps
        for option, changes in (
            ("--gradient-checkpointing", {"gradient_checkpointing": True}),
            (f"--train-batch-size 1 --gradient-accumulation-steps {size}",
             {"train_batch_size": 1, "gradient_accumulation_steps": min(size, 2)}),  # more take no more memory
        ):  # fmt: skip
            if vars(args) != (changed := vars(args) | changes):
                step = count_peaks(Namespace(**changed | {"validation_steps": 0}))["in a step"]
                lighter[option] = max(step, *(peak for name, peak in peaks.items() if name != "in a step"))
        best = min(lighter, key=lighter.get, default=None)
        if best and lighter[best] < peak:
            told += f"; what saves most is {best}: {lighter[best] / GB:.1f}"
        else:
            told += "; only a lower --resolution saves more"
    print(told)


def say_disk(args: Namespace, taken: dict, pairs: int, fetched: dict[str, int]) -> None:
    """Print what is fetched, and what a run of so many pairs leaves."""
    told = ", ".join(f"{what} {size / GB:.1f} GB" for what, size in fetched.items())
    print(f"fetched, unless it was before: {told or 'nothing'}")
    weights, checkpoint = 4 * taken["saved"], 4 * taken["saved"] + 8 * taken["trained"]  # float32; Adam's two moments
    kept = min(args.checkpoints_total_limit, math.ceil(args.max_train_steps / args.checkpointing_steps))
    met = min(pairs, args.max_train_steps * args.train_batch_size * args.gradient_accumulation_steps)
    disk = {f"{kept} checkpoints and one that is being written": (kept + 1) * checkpoint, "the result": weights,
            f"{met} targets": met * taken["record"]}  # fmt: skip
    if args.snapshot_steps:
        snapshots = 1 + args.max_train_steps // args.snapshot_steps
        disk[f"{snapshots} snapshots"] = snapshots * weights // 2
    told = ", ".join(f"{what} {size / GB:.2g}" for what, size in disk.items())
    print(f"GB of disk for the run: {sum(disk.values()) / GB:.2g} ({told})")
