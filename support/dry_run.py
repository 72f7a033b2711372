"""train.py --dry-run: what a training will take, counted on tensors that have shape and type but no data.

The networks, the loop and the optimizer are the training's own. The device is a pretended CPU; what is counted there is
what a card holds but for CUDA's own context, its kernels' workspaces and fragmentation.
"""

import contextlib
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
from torch.utils.flop_counter import flop_registry

from support.batches import CHECKSUM, Batch
from support.hub import on_hub
from support.options import with_defaults
from support.run import Run

GB, TERA = 1e9, 1e12
CARDS = 8, 12, 16, 24  # GB
PEAKS = {"RTX 3090": 71, "RTX 4090": 165, "H100": 989}  # TFLOP/s of dense bf16 products summed in float32, by NVIDIA
REACHED = 0.4  # of a card's peak: an estimate
FILL50K, FILL50K_ZIP = 50_000, 200_000_000  # pairs, bytes
ATEN, ATTENTION = torch.ops.aten, "_scaled_dot_product_flash_attention"
FORMULAS = flop_registry | {  # PyTorch's own, which leave the CPU's attention out
    getattr(ATEN, f"{ATTENTION}_for_cpu{way}"): flop_registry[getattr(ATEN, ATTENTION + way)]
    for way in ("", "_backward")
}


class Count(TorchDispatchMode):
    """Adds up the bytes of all storages that are alive, and the arithmetic of products and convolutions."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = self.flop = 0
        self.known, self.peaks = weakref.WeakSet(), {}

    def add(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def phase_ends(self, name: str) -> None:
        self.peaks[name], self.peak = self.peak, self.bytes

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, operator._overloadpacket
        if packet is ATEN._local_scalar_dense:
            return 0.5 if args[0].is_floating_point() else 1  # .item() and bool() of numbers that are not there
        out = operator(*args, **kwargs)
        if packet in FORMULAS:
            self.flop += FORMULAS[packet](*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out


@contextlib.contextmanager
def pretending() -> Iterator[Count]:
    """All tensors that are made here have no data. Modules that are moved or copied get new parameters: the data of
    one can't be swapped for another's, as Module.to does it, where there is none."""

    def replace_parameters(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                part._parameters[name] = nn.Parameter(convert(parameter.detach()), parameter.requires_grad)
        return module

    with (
        patch.object(nn.Module, "_apply", replace_parameters),
        patch.object(
            FakeTensor, "__deepcopy__", lambda p, _: nn.Parameter(p.detach().clone(), p.requires_grad), create=True
        ),
        FakeTensorMode(allow_non_fake_inputs=True),
        Count() as count,
    ):
        yield count


class PretendedPairs:
    """Pairs of a training, and its held-out ones: each picture is met for the first time."""

    def __init__(self, number: int, resolution: int, latent_channels: int, count: Count):
        self.prompts, self.resolution, self.count = [""] * number, resolution, count
        self.latent_shape, self.encoding = (latent_channels, resolution // 8, resolution // 8), 0

    def __len__(self) -> int:
        return len(self.prompts)

    def hint(self, index: int) -> Tensor:
        return torch.zeros(3, self.resolution, self.resolution)

    image = other_hint = hint

    def batches(self, run: Run) -> Iterator[Batch]:
        rows = range(len(self))
        while True:
            hint, images = torch.stack([self.hint(i) for i in rows]), [self.image(i) for i in rows]
            yield Batch(0, list(rows), self.prompts, self.prompts, hint, images)

    @torch.no_grad()
    def moments(self, batch: Batch, encode: Callable[[Tensor], Tensor]) -> Tensor:
        before = self.count.flop
        moments = torch.cat([encode(image[None]).float() for image in batch.images])
        self.encoding += self.count.flop - before
        return moments


def count_training(args: Namespace, make_base: Callable, assemble: Callable, train: Callable, generate: Callable):
    """The bytes at the peak of each phase, and what else a training takes, as a dict, by train.py's own parts."""
    previews, side = args.validation_steps > 0, args.resolution
    # To begin with a ControlNet takes what a fresh copy takes. Previews are sampled here, in one step, and not written.
    args = Namespace(**vars(args) | {"controlnet": None, "validation_steps": 0, "device": "cpu", "compile": False})
    args.mixed_precision = "bf16" if args.mixed_precision == "auto" else args.mixed_precision
    run, sd = Run(args), make_base(args.base).requires_grad_(False)
    run.rank, run.processes, run.writes = 0, 1, True
    run.steps, run.due, run.log = lambda: range(1, 2), lambda every: False, lambda: None  # one step, in no folder
    with pretending() as count:
        sd.to_empty(device=run.device)
        sd.tokenizer = lambda prompts: torch.zeros(len(prompts), sd.text_encoder.config.max_length, dtype=torch.int64)
        numbers, channels = (args.train_batch_size, args.validation_hints), sd.vae.config.latent_channels
        pairs, held_out = (PretendedPairs(number, side, channels, count) for number in numbers)

        def preview(*controlnets: nn.Module) -> None:
            hints, scale = [torch.zeros(len(held_out), 3, side, side)] * len(controlnets), args.preset.guidance_scale
            settings = {"control_mode": "conditional", "steps": 1, "size": (side, side), "guidance_scale": scale}
            generate(sd, list(controlnets), hints, held_out.prompts, **settings)

        denoiser, optimizer, *others = assemble(run, sd, None, held_out)
        if previews:
            preview()
        count.phase_ends("before the first step")
        parameters = denoiser.trainable_parameters()
        for parameter in parameters:  # as after the first step, which makes the optimizer's state
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        count.flop = 0
        train(run, sd, pairs, denoiser, optimizer, *others)
        flop = count.flop
        count.phase_ends("in a step")
        if previews:
            preview(denoiser.controlnet)
            count.phase_ends("in a preview")
        saved = [tensor for part in denoiser.trained.values() for tensor in part.state_dict().values()]
        _ = [tensor.half() for tensor in saved if args.snapshot_steps]  # on the card; all else leaves it as it is
        count.phase_ends("while saving")
    sizes = {"saved": sum(map(Tensor.numel, saved)), "trained": sum(map(Tensor.numel, parameters))}
    return {"peaks": count.peaks, "flop": flop, "encoding": pairs.encoding, "latent": pairs.latent_shape} | sizes


def dry_run(args: Namespace, make_base: Callable, open_pairs: Callable, *parts: Callable) -> None:
    """Say what a training takes that train.py would do by these parts of it."""
    sd = make_base(args.base)
    args = with_defaults(args, sd.preset)
    pairs, fetched, size = FILL50K, {}, args.train_batch_size * args.gradient_accumulation_steps
    if args.base == "sd15" or on_hub(args.base):
        fetched["the base"] = 4 * sum(map(Tensor.numel, sd.parameters()))
    if args.data == "fill50k" and not Path(args.data, "prompt.json").is_file():
        fetched["fill50k"] = FILL50K_ZIP
    else:
        pairs = len(open_pairs(args.data, args.resolution, args.seed, args.validation_hints)[0])

    taken = count_training(args, make_base, *parts)
    print("GB on the card: " + ", ".join(f"{size / GB:.1f} {phase}" for phase, size in taken["peaks"].items()))
    peak = max(taken["peaks"].values())
    fits = [str(card) for card in CARDS if peak + GB <= card * GB]
    told = f"with a GB to spare it fits in {', '.join(fits) or 'none of 8, 12, 16, 24'} GB"
    if len(fits) < len(CARDS):
        lighter = {"only a lower --resolution saves more": peak}
        for option, changes in (
            ("--validation-steps 0", {"validation_steps": 0}),
            ("--gradient-checkpointing", {"gradient_checkpointing": True}),
            (f"--train-batch-size 1 --gradient-accumulation-steps {size}",  # two of these take as much as more
             {"train_batch_size": 1, "gradient_accumulation_steps": min(size, 2)}),
        ):  # fmt: skip
            counted = max(count_training(Namespace(**vars(args) | changes), make_base, *parts)["peaks"].values())
            lighter[f"what saves most is {option}: {counted / GB:.1f}"] = counted
        told += f"; {min(lighter, key=lighter.get)}"
    print(told)

    weights, checkpoint = 4 * taken["saved"], 4 * taken["saved"] + 8 * taken["trained"]  # float32; Adam's two moments
    kept = min(args.checkpoints_total_limit, math.ceil(args.max_train_steps / args.checkpointing_steps))
    met = min(pairs, args.max_train_steps * size)
    snapshots = 1 + args.max_train_steps // args.snapshot_steps if args.snapshot_steps else 0
    disk = {
        f"{kept} checkpoints and one that is being written": (kept + 1) * checkpoint, "the result": weights,
        f"{met} targets": met * (CHECKSUM + 2 * 2 * math.prod(taken["latent"])),  # half precision; two moments
        f"{snapshots} snapshots": snapshots * weights // 2,
    }  # fmt: skip
    told = ", ".join(f"{what} {size / GB:.1f} GB" for what, size in fetched.items())
    print(f"fetched, unless it was before: {told or 'nothing'}")
    told = ", ".join(f"{what} {size / GB:.2g}" for what, size in disk.items() if size)
    print(f"GB of disk for the run: {sum(disk.values()) / GB:.2g} ({told})")
    flop, encoding = taken["flop"] / TERA, taken["encoding"] / TERA
    print(f"TFLOP a step: {flop:.3g}, {encoding:.3g} of them to encode pictures that are met for the first time")
    seconds = ", ".join(f"{card} {flop / (REACHED * peak):.2g}" for card, peak in PEAKS.items())
    print(f"seconds a step, estimated at {REACHED:.0%} of the card's peak: {seconds}")
