"""One training run on its machines and in its folder, so that train.py can be read as one process on one device."""

import contextlib
import math
import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

from support.errors import UserError

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from support.cache import STOPPED_BY_TERMINAL, CachedPairs, cache_latents, fingerprints, ignore_interrupt
from support.checkpoints import check_config, find_checkpoint, load_checkpoint, save_checkpoint, set_aside, steps_in
from support.devices import choose_device, describe, fast_precision
from support.files import PARTIAL, clear, read_json, save_json
from support.lock import owned
from support.log import Log
from support.randomness import index_batches

WHAT_A_RUN_LEAVES = ("config.json", "log.jsonl", "checkpoints", "controlnet.safetensors")


class Batch(NamedTuple):
    """This process's share of batch `number` of the training, on its device."""

    number: int
    size: int  # of the batch of all processes
    names: list[str]
    hint: Tensor
    moments: Tensor
    context: Tensor

    @property
    def latent_shape(self) -> tuple[int, ...]:
        channels, *sides = self.moments.shape[1:]
        return channels // 2, *sides


class Run:
    """The run that train.py's options describe: its device, processes, signals, log and checkpoints.

    Under torchrun there are several processes, each with its own device and its share of every batch. One of them
    `writes`: it does all that is done once. The results do not depend on their number, up to rounding.
    Raises UserError when the folder holds a run that is not to be resumed, or one of other options.
    """

    def __init__(self, args: Namespace):
        self.folder, self.resuming = args.output_dir, args.resume_from_checkpoint
        self.device = choose_device(args.device)
        self.rank, self.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.writes = self.rank == 0
        self.checkpoint, self.start, self.step = None, 0, 0
        self.log_book, self.history, self.bar, self.shown = None, [], None, {}
        self.signals, self.stopping, self.skipped, self.whole = [], False, False, True
        self.exits = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        """Take hold of the folder, then join the other processes."""
        with self.exits:  # if anything goes wrong here
            if self.writes:
                self.exits.enter_context(owned(self.folder))
            if self.resuming:
                self.checkpoint = find_checkpoint(self.folder / "checkpoints", self.resuming)
            elif any((self.folder / name).exists() for name in WHAT_A_RUN_LEAVES):
                raise UserError(f"{self.folder} holds a run already: add --resume-from-checkpoint latest, or choose "
                                "another --output-dir")  # fmt: skip
            if self.processes > 1:
                self.join_processes()
            self.exits = self.exits.pop_all()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Whatever ended the run, keep its last whole step."""
        with self.exits:
            if isinstance(error, Exception) and self.writes and self.whole and self.step > self.start:
                self.keep()
            if error is None and self.processes > 1:  # after an error, the others would be waited for
                distributed.destroy_process_group()

    def keep(self) -> None:
        """Save after an error. A second error, here, is only reported."""
        try:
            if self.step not in steps_in(self.folder / "checkpoints"):
                self.save()
                self.say(f"saved step {self.step}: go on with --resume-from-checkpoint latest")
            self.log_book.repair(self.entry)
        except Exception as error:
            self.say(f"after the error below, this too: {error}")

    def join_processes(self) -> None:
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            distributed.init_process_group(backend, timeout=timedelta(hours=6))  # the others wait while one encodes
        except ValueError as error:  # RANK is set, but not MASTER_ADDR or MASTER_PORT
            raise UserError(f"several processes are started with torchrun, not by hand ({error})") from None

    def begin(self, args: Namespace) -> None:
        """Take the options, now that the base has filled them in, and find the step to go on from.

        Raises UserError when a run is resumed with options that change its result.
        """
        if args.mixed_precision == "auto":
            args.mixed_precision = self.agree(fast_precision(self.device))
        # fp16 has no numbers below 6e-8: the loss is scaled up, so that small gradients are not rounded to 0.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.mixed_precision == "fp16")
        self.say(f"training on {describe(self.device)}, mixed precision: {args.mixed_precision}")
        self.args, self.config = args, {name: getattr(args, name) for name in args.deciding}
        self.config["train_batch_size"] *= self.processes
        if self.resuming:
            self.start = check_config((self.checkpoint or self.folder) / "config.json", self.config, self.processes)
            if self.start > args.max_train_steps:
                raise UserError(
                    f"{self.checkpoint} is beyond --max-train-steps {args.max_train_steps}: ask for more steps"
                )
            none = f"{self.folder} has no checkpoint yet: starting at step 0"
            self.say(f"resuming from {self.checkpoint}" if self.checkpoint else none)
        self.step = self.start

    def agree(self, precision: str) -> str:
        """One precision for all processes, though their cards differ: one that none of them is slow in."""
        words = [precision] * self.processes
        if self.processes > 1:
            distributed.all_gather_object(words, precision)
        return max(words, key=("bf16", "fp16", "no").index)

    def say(self, *lines: str) -> None:
        for line in lines if self.writes else ():
            tqdm.write(line)

    # Before the first step

    @contextlib.contextmanager
    def one_process_first(self) -> Iterator[None]:
        """What is inside is done by the writing process, then by the others, who find it done: fetching, encoding."""
        if not self.writes:
            distributed.barrier()
        yield
        if self.writes and self.processes > 1:
            distributed.barrier()

    def encode(self, sd, pairs, held_out) -> CachedPairs:
        """Encode targets and prompts, once for all processes, and clear the folder of what was left half done.

        Raises UserError when a run is resumed with anything else than it began with.
        """
        folder, record, device = self.folder / "cache", self.folder / "inputs.json", describe(self.device)
        if self.writes:
            inputs = fingerprints(sd, pairs, held_out)
            if self.checkpoint and record.exists():
                known = read_json(record, "delete it, and these are taken for the same")
                if (before := known.pop("device", device)) != device:
                    self.say(f"warning: so far it was trained on {before}; on {device} the last bits can differ")
                if other := next((name for name in known | inputs if known.get(name) != inputs.get(name)), None):
                    raise UserError(f"{other} is not what {self.folder} was trained with: restore it, or start another "
                                    "--output-dir")  # fmt: skip
            for part in (".", "cache", "checkpoints", "previews", "snapshots"):
                clear(self.folder / part, PARTIAL)
            cache_latents(sd, pairs, held_out, folder, inputs, self.args.num_workers)
            save_json(inputs | {"device": device}, record)
            if self.start == 0:
                self.drop_after(-1)  # of a run that died before its first checkpoint
        return CachedPairs(pairs, folder)

    def drop_after(self, last: int) -> None:
        """Remove the previews and snapshots of steps that are going to be done again."""
        for folder, suffix in (("previews", ".png"), ("snapshots", ".safetensors")):
            for step, path in steps_in(self.folder / folder, suffix).items():
                if step > last:
                    path.unlink()

    def resume(self, trained: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Load the checkpoint, if there is one, and open the log where it left off."""
        self.trained, self.optimizer = trained, optimizer
        if self.checkpoint:
            load_checkpoint(self.checkpoint, trained, optimizer, self.scaler)
        if self.writes:
            if later := set_aside(self.folder / "checkpoints", self.start):
                self.say(f"the checkpoints of steps {', '.join(map(str, later))} go when the next one is written")
            self.drop_after(self.start)
            save_json(self.config, self.folder / "config.json")
            self.log_book = Log(self.folder, self.start, self.args.report_to == "tensorboard")
            self.exits.callback(self.log_book.close)
            self.history = self.log_book.history

    def distribute(self, model: nn.Module) -> nn.Module:
        """The model as it is trained: compiled if asked for, its gradients averaged over the processes."""
        if self.args.compile:
            model = torch.compile(model)
        # Gradients live where they are exchanged, not beside it: 1.4 GB less on each card at SD 1.5's size.
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if self.processes > 1 else model

    def batches(self, pairs: CachedPairs) -> Iterator[Batch]:
        """Batches of shuffled pairs without end, from the one that the next step needs."""
        size = self.args.train_batch_size
        first = self.start * self.args.gradient_accumulation_steps
        order = index_batches(len(pairs), size * self.processes, self.args.seed, first, self.slice(size))
        on_cuda = self.device.type == "cuda"
        loader = DataLoader(
            pairs, batch_sampler=order, num_workers=self.args.num_workers, pin_memory=on_cuda,
            worker_init_fn=ignore_interrupt,
        )  # fmt: skip
        for number, (indices, *tensors) in enumerate(loader, start=first):
            names = [pairs.pairs.name(i) for i in indices.tolist()]
            hint, *encoded = (tensor.to(self.device, non_blocking=True) for tensor in tensors)
            yield Batch(number, size * self.processes, names, hint.float() / 255, *encoded)

    # At each step

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to do, with a progress bar.

        Ctrl-C, SIGTERM and SIGHUP end them after the step in hand; a second Ctrl-C or SIGTERM stops at once.
        """
        for number in (signal.SIGTERM, *STOPPED_BY_TERMINAL):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                self.exits.callback(signal.signal, number, signal.signal(number, self.ask_to_stop))
        last = self.args.max_train_steps
        self.bar = tqdm(initial=self.start, total=last, desc="training", disable=not self.writes)
        with self.bar:
            for step in range(self.start + 1, last + 1):
                yield step
                self.bar.update()
                if self.stopping:
                    break

    def ask_to_stop(self, number, frame) -> None:
        self.signals.append(number)
        if number in (signal.SIGINT, signal.SIGTERM):  # a terminal's end is told twice
            signal.signal(number, signal.SIG_DFL)

    def slice(self, size: int) -> slice:
        return slice(self.rank * size, (self.rank + 1) * size)

    def share(self, drawn: Tensor) -> Tensor:
        """This process's rows, on its device, of numbers drawn for the batch of all processes.

        They are drawn on the CPU, so that neither the number of processes nor the device changes them.
        """
        return drawn[self.slice(len(drawn) // self.processes)].to(self.device, non_blocking=True)

    def accumulating(self, model: nn.Module, last: bool):
        """Around forward and backward: gradients are averaged over the processes after the `last` batch of a step."""
        return contextlib.nullcontext() if last or self.processes == 1 else model.no_sync()

    def mean(self, value: Tensor) -> float:
        """The mean over the processes."""
        if self.processes > 1:
            distributed.all_reduce(value)
        return value.item() / self.processes

    def check(self, step: int, loss: float, gradient_norm: float, names: list[str]) -> None:
        """Raise UserError before a loss or gradient that is not finite gets into the weights.

        In fp16 the scaler passes over a step whose gradients overflowed, and scales the next ones less.
        """
        self.skipped = math.isfinite(loss) and not math.isfinite(gradient_norm) and self.scaler.get_scale() > 1
        if not math.isfinite(loss + gradient_norm) and not self.skipped:
            raise UserError(
                f"step {step}: loss {loss}, gradient norm {gradient_norm}, with {', '.join(names)}; look at these "
                "pairs, lower --learning-rate or take --mixed-precision no"
            )
        self.whole = False  # from here to `finished` the weights are between two steps

    def finished(self, entry: dict) -> dict:
        """Note that the step of a log's entry is done; the entry, to which measurements may be added."""
        self.step, self.whole = entry["step"], True
        if self.skipped:
            entry = {name: value for name, value in entry.items() if name != "gradient_norm"} | {"skipped": True}
        self.entry = entry
        return entry

    def due(self, step: int, every: int) -> bool:
        """Whether this process has to do now what is done every `every` steps; never for 0."""
        return self.writes and every > 0 and step % every == 0

    def log(self, entry: dict) -> None:
        """Write a finished step to the log; `history` are the entries of all steps so far."""
        if self.writes:
            self.log_book.write(entry)
            formats = {"loss": ".4f", "lr": ".0e", "hint_sensitivity": ".1e"}
            self.shown |= {name: format(entry[name], form) for name, form in formats.items() if name in entry}
            self.bar.set_postfix(self.shown, refresh=False)

    def due_to_save(self, step: int) -> bool:
        """Whether this process has to save now: every --checkpointing-steps, at the end, and when a signal came.

        Every process calls this once a step: here they agree whether to stop, whichever of them got the signal.
        """
        if self.processes == 1:  # nothing to agree on, and no card to wait for
            self.stopping = bool(self.signals)
        else:
            self.stopping = self.mean(torch.tensor(float(len(self.signals)), device=self.device)) > 0
        last = self.stopping or step == self.args.max_train_steps
        return (self.writes and last) or self.due(step, self.args.checkpointing_steps)

    def save(self) -> None:
        """Write a checkpoint of the last finished step."""
        folder, limit, self.whole = self.folder / "checkpoints", self.args.checkpoints_total_limit, False
        save_checkpoint(folder, self.step, self.trained, self.optimizer, self.scaler, self.config, limit)
        self.whole = True  # else it would be tried once more

    def say_what_next(self, prompt: str) -> None:
        """The command that goes on with a stopped run, or samples what was learned."""
        result = self.folder / "controlnet.safetensors"
        self.say(f"wrote {result} and {self.folder / 'convergence.png'}")
        if self.step < self.args.max_train_steps:
            more = [] if self.args.resume_from_checkpoint == "latest" else ["--resume-from-checkpoint", "latest"]
            command = shlex.join(["python", *sys.argv, *more])
            if self.processes > 1:  # torchrun's own options are not known here
                command = "the same torchrun command and --resume-from-checkpoint latest"
            self.say(f"stopped at step {self.step}; go on with: {command}")
        else:
            hint = str(self.folder / "previews" / "hint.png") if self.args.validation_steps else "HINT.png"
            command = ["python", "sample.py", "--base", self.args.base, "--controlnet", str(result), "--hint", hint]
            command += ["--prompt", prompt, "--control-mode", "conditional"]  # as the previews are sampled
            if self.args.resolution != self.args.preset.resolution:
                command += ["--resolution", str(self.args.resolution)]
            self.say(f"now: {shlex.join(command)}")
            if (self.folder / "snapshots").is_dir():
                self.say(f"or draw hints and scrub through the training: python draw.py --run {self.folder}")
