"""One training run on its machines and in its folder, so that train.py can be read as one process on one device."""

import contextlib
import os
import shlex
import signal
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support import checkpoints, options
from support.checkpoints import CONFIG
from support.devices import choose_device, describe, fast_precision, usable_cpus
from support.errors import UserError, writing
from support.files import PARTIAL, append_entry, flush, read_log, remove, save_json, write_log

WHAT_A_RUN_LEAVES = (CONFIG, "log.jsonl", "checkpoints", "controlnet.safetensors")
# What a terminal sends to all processes of a program: Ctrl-C, and its own end, which Windows does not tell.
SENT_BY_TERMINAL = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
OUT_OF_TIME = [signal.SIGXCPU] if hasattr(signal, "SIGXCPU") else []  # of a processor's, by ulimit or a batch system


def ignore_terminal(worker: int) -> None:
    """For processes that load pictures: when to stop is the main process's decision."""
    for number in SENT_BY_TERMINAL:
        signal.signal(number, signal.SIG_IGN)


def try_to_compile(device: torch.device) -> None:
    """What torch.compile needs beside PyTorch is found missing here, not at the first step."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, the linker, Triton: each has its own
        reason = str(error).split("\n")[0]
        needed = "Triton" if device.type == "cuda" else "a C++ compiler (on Windows that of Visual Studio)"
        raise UserError(f"--compile does not work here ({reason}): install {needed}, or leave it out") from None


class Run:
    """A training's folder, device, processes, signals, log and checkpoints.

    Under torchrun there are several processes, each with its own device and its rows of every batch. One of them
    `writes`: it does all that is done once. The results do not depend on their number, up to rounding. `step` is the
    last one that is in the weights.
    """

    def __init__(self, args: Namespace):
        self.args, self.folder = args, args.output_dir
        self.device = choose_device(args.device)
        self.rank, self.processes = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
        self.writes = self.rank == 0
        self.checkpoint, self.step, self.history = None, 0, []
        self.unsaved = False  # whether the weights are those after a whole step and still to be saved
        self.signals, self.shown, self.exits = [], {}, contextlib.ExitStack()
        if args.compile:
            try_to_compile(self.device)

    def __enter__(self) -> "Run":
        """Take hold of the folder, then join the other processes."""
        with self.exits:  # if anything goes wrong here
            if self.writes:
                self.own_folder()
            if self.args.resume_from_checkpoint:
                self.checkpoint = checkpoints.newest(self.folder)
            elif any((self.folder / name).exists() for name in WHAT_A_RUN_LEAVES):
                raise UserError(f"{self.folder} holds a run already: add --resume-from-checkpoint latest, or choose "
                                "another --output-dir")  # fmt: skip
            if self.processes > 1:
                try:
                    distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
                except ValueError as error:  # RANK is set, but not MASTER_ADDR or MASTER_PORT
                    raise UserError(f"several processes are started with torchrun, not by hand ({error})") from None
            self.exits = self.exits.pop_all()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Whatever ended the run, keep its last whole step."""
        with self.exits:
            if isinstance(error, Exception) and self.unsaved:
                with contextlib.suppress(Exception):  # the error that ended the run is the one to tell
                    write_log(self.folder / "log.jsonl", self.history)  # the step may have no line yet
                    self.save()
                    self.say(f"saved step {self.step}: go on with --resume-from-checkpoint latest")
            if error is None and self.processes > 1:  # after an error, the others would be waited for
                distributed.destroy_process_group()

    @staticmethod
    def add_options(parser: options.ArgumentParser) -> None:
        """None of these decides the result."""
        add, workers = partial(parser.add_argument, decides=False), 0 if usable_cpus() <= 4 else 4
        add("--output-dir", type=Path, default=Path("runs/controlnet"), help="default: runs/controlnet")
        add("--resume-from-checkpoint", choices=("latest",), help="go on with the run in --output-dir")
        add("--checkpointing-steps", type=options.positive_int, default=500, help="default: 500, and at the end")
        add("--checkpoints-total-limit", type=options.positive_int, default=2, help="newest kept (default: 2)")
        add("--num-workers", type=options.count_or_zero, default=workers, help="processes that load pictures")
        add("--compile", action="store_true", help="torch.compile: takes minutes to start")
        add("--dry-run", action="store_true", help="say what memory, disk and time it takes, and end")
        options.add_device(parser)

    def own_folder(self) -> None:
        """Make the folder this process's own until the run ends, however it ends."""
        with writing(self.folder, "another --output-dir"):
            try:
                self.exits.enter_context(FileLock(self.folder / "lock", timeout=0))
            except Timeout:
                told = f"{self.folder} is in use by another run: wait for it, or choose another --output-dir"
                raise UserError(told) from None
        for part in (".", "cache", "checkpoints", "previews", "snapshots"):  # before other processes write there
            for path in (self.folder / part).glob(f"{PARTIAL}*"):  # what a killed one left
                remove(path)

    def say(self, *lines: str) -> None:
        for line in lines if self.writes else ():
            tqdm.write(line)

    # Before the first step

    def begin(self, preset) -> Namespace:
        """The options, filled in by the base's preset, which are refused if the run had others; and its folder tidy."""
        args = self.args = options.with_defaults(self.args, preset)
        if args.mixed_precision == "auto":
            args.mixed_precision = fast_precision(self.device)
        self.say(f"training on {describe(self.device)}, mixed precision: {args.mixed_precision}")
        self.config = {name: getattr(args, name) for name in args.deciding}
        self.config["train_batch_size"] *= self.processes
        if args.resume_from_checkpoint:
            saved = checkpoints.check_config((self.checkpoint or self.folder) / CONFIG, self.config)
            self.step = saved.get("step", 0)
            if self.step > args.max_train_steps:
                raise UserError(f"{self.checkpoint} is beyond --max-train-steps {args.max_train_steps}: ask for more")
            self.say(f"resuming from {self.checkpoint or 'step 0: there is no checkpoint yet'}")
            for name in checkpoints.TOLD_BY_CONTENT:
                before, now = saved.get(name, self.config[name]), self.config[name]
                if before != now:
                    self.say(f"--{name} was {before or None}, is {now or None}: what counts is that it holds the same")
        if self.writes and not self.checkpoint:  # what is there is of a run that died before its first one
            checkpoints.forget_later(self.folder, -1)
        return args

    def resume(
        self, trained: dict[str, nn.Module], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        """Load the checkpoint, if there is one, drop what came after it, and trim the log to it."""
        self.state = {f"trained.{name}": module for name, module in trained.items()}, optimizer, scaler
        if self.checkpoint:
            checkpoints.load_checkpoint(self.checkpoint, *self.state)
        optimizer.register_step_pre_hook(self.step_begins)
        optimizer.register_step_post_hook(self.step_is_done)
        if self.writes:
            checkpoints.forget_later(self.folder, self.step)
            save_json(self.config, self.folder / CONFIG)
            self.history = [entry for entry in read_log(self.folder / "log.jsonl") if entry["step"] <= self.step]
            write_log(self.folder / "log.jsonl", self.history)
            self.began = time.monotonic() - max((entry.get("seconds", 0) for entry in self.history), default=0)

    def distribute(self, model: nn.Module) -> nn.Module:
        """The model as it is trained: compiled if asked for, its gradients averaged over the processes."""
        if self.args.compile:
            model = torch.compile(model)
        # Gradients live where they are exchanged, not beside it: 1.4 GB less on each card at SD 1.5's size.
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if self.processes > 1 else model

    # At each step

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to do, with a progress bar.

        Ctrl-C, SIGTERM, SIGHUP and SIGXCPU end them after the step in hand; a second Ctrl-C or SIGTERM stops at once.
        """
        for number in (signal.SIGTERM, *OUT_OF_TIME, *SENT_BY_TERMINAL):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                self.exits.callback(signal.signal, number, signal.signal(number, self.ask_to_stop))
        last = self.args.max_train_steps
        with tqdm(initial=self.step, total=last, desc="training", disable=not self.writes) as bar:
            for step in range(self.step + 1, last + 1):
                yield step
                bar.set_postfix(self.shown, refresh=False)
                bar.update()
                # Whichever of the processes got the signal, all of them stop.
                if self.mean(torch.tensor(float(len(self.signals)), device=self.device)) > 0:
                    break

    def ask_to_stop(self, number, frame) -> None:
        self.signals.append(number)
        if number in (signal.SIGINT, signal.SIGTERM):  # a terminal's end is told twice
            signal.signal(number, signal.SIG_DFL)

    def step_begins(self, *_) -> None:
        self.unsaved = False  # until it is done the weights are between two steps

    def step_is_done(self, *_) -> None:
        self.step, self.unsaved = self.step + 1, self.writes

    def local_rows(self, size: int) -> slice:
        """Which rows of the batch of all processes are this one's, `size` of them.

        What is random is drawn for the whole batch, so that the number of processes does not change it.
        """
        return slice(self.rank * size, (self.rank + 1) * size)

    def mean(self, value: Tensor) -> float:
        """The mean over the processes."""
        if self.processes > 1:
            distributed.all_reduce(value)
        return value.item() / self.processes

    def due(self, every: int) -> bool:
        """Whether this process has to do now what is done every `every` steps; never for 0."""
        return self.writes and every > 0 and self.step % every == 0

    def log(self) -> None:
        """Write the last entry of `history` to the log, and show it beside the progress bar."""
        if self.writes:
            entry = self.history[-1]
            entry["seconds"] = round(time.monotonic() - self.began, 2)
            append_entry(self.folder / "log.jsonl", entry)
            self.shown |= {name: entry[name] for name in ("loss", "lr", "hint_sensitivity") if name in entry}

    def save(self) -> None:
        """Write a checkpoint of the last step."""
        self.unsaved = False  # if this fails it would fail again
        flush(self.folder / "log.jsonl")  # on the disk before a checkpoint that it has to lead to
        limit = self.args.checkpoints_total_limit
        checkpoints.save_checkpoint(self.folder / "checkpoints", self.step, *self.state, self.config, limit)

    def say_what_next(self, prompt: str) -> None:
        """The command that goes on with a stopped run, or samples what was learned as the previews were."""
        args, hint = self.args, self.folder / "previews" / "hint.png"
        if self.step < args.max_train_steps:
            self.say(f"stopped at step {self.step}: the same command and --resume-from-checkpoint latest go on from it")
        else:
            given = {
                "--base": args.base, "--vae": args.vae, "--controlnet": self.folder / "controlnet.safetensors",
                "--resolution": args.resolution, "--control-mode": "conditional", "--prompt": prompt,
                "--hint": hint if hint.exists() else "HINT.png",
            }  # fmt: skip
            words = [str(word) for option in given.items() if option[1] for word in option]
            self.say(f"now: python sample.py {shlex.join(words)}")
