"""train.py --dry-run: what a training will take, counted on tensors that have shape and type but no data.

The networks, the loop and the optimizer are the training's own. The device is a pretended CPU; what is counted there is
what a card holds but for CUDA's own context, its kernels' workspaces and fragmentation.
"""

import contextlib
import copy
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from support.batches import CHECKSUM, Batch
from support.run import Run

GB, TERA = 1e9, 1e12
CARDS = 8, 12, 16, 24  # GB
PEAKS = {"RTX 3090": 71, "RTX 4090": 165, "H100": 989}  # TFLOP/s of dense bf16 products summed in float32, by NVIDIA
REACHED = 0.4  # of a card's peak: an estimate
LIGHTER = {  # options that need less memory, and what they change
    "--gradient-checkpointing": {"gradient_checkpointing": True},
    "--mixed-precision auto": {"mixed_precision": "auto"},
    "--train-batch-size 1 with --gradient-accumulation-steps": {"train_batch_size": 1},
}
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
    previews, args.validation_steps = args.validation_steps > 0, 0  # sampled here, in one step, and not written
    if args.mixed_precision == "auto":
        args.mixed_precision = "bf16"
    run, sd = PretendedRun(args), make_base().requires_grad_(False)
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


def report(args: Namespace, pairs: int, fetched: dict[str, float], parts: tuple) -> Iterator[str]:
    """What `python train.py --dry-run` says, of a training with that many pairs; `fetched`: GB by what it is."""
    taken = count_training(args, *parts)
    peaks, size = taken["peaks"], 4 * taken["weights"]
    yield "GB on a card: " + ", ".join(f"{peak / GB:.1f} {name}" for name, peak in peaks.items())
    peak = max(peaks.values()) / GB
    fits = [card for card in CARDS if peak + 1 <= card]
    told = f"with a GB to spare, fits in {', '.join(map(str, fits))} GB" if fits else f"fits in none of {CARDS} GB"
    if len(fits) < len(CARDS):
        lighter = {}
        for option, change in LIGHTER.items():
            if any(getattr(args, name) != value for name, value in change.items()):
                changed = count_training(Namespace(**vars(args) | change), *parts)["peaks"]
                lighter[option] = max(changed.values()) / GB
        best = min(lighter, key=lighter.get, default="a lower --resolution")
        told += f"; what saves most is {best}" + (f": {lighter[best]:.1f} GB" if lighter else "")
    yield told
    yield "fetched, unless it was before: " + (", ".join(f"{k} {v:.1f} GB" for k, v in fetched.items()) or "nothing")
    checkpoint = (size + 8 * taken["optimized"]) / GB
    kept = min(args.checkpoints_total_limit, -(-args.max_train_steps // args.checkpointing_steps))
    met = min(pairs, args.max_train_steps * args.train_batch_size * args.gradient_accumulation_steps)
    disk = {f"{kept} checkpoints": kept * checkpoint, "one more while it is written": checkpoint,
            "the result": size / GB, f"{met} targets": met * taken["record"] / GB}  # fmt: skip
    if args.snapshot_steps:
        snapshots = 1 + args.max_train_steps // args.snapshot_steps
        disk[f"{snapshots} snapshots"] = snapshots * size / 2 / GB
    yield f"GB of disk: {sum(disk.values()):.2f} (" + ", ".join(f"{k} {v:.2f}" for k, v in disk.items()) + ")"
    flop, encoding = taken["flop"] / TERA, taken["encoding"] / TERA
    yield f"TFLOP a step: {flop:.3g}, {encoding:.3g} of them to encode pictures that are met for the first time"
    seconds = ", ".join(f"{card} {flop / (REACHED * peak):.2g}" for card, peak in PEAKS.items())
    yield f"seconds a step at {REACHED:.0%} of a card's peak, an estimate: {seconds}"
