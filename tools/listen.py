"""Does a ControlNet hear its hint? `python convergence.py --controlnet FILE` measures it without sampling.

For pairs of hint and picture, at eight bands of noise, the loss of equation (5) with the pair's own hint, another
pair's, an empty one, and without a ControlNet; how far apart the first two predictions are; and what follows from it.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from controlnet import ControlNet
from data import DRAWN_PAIRS, PairedImages, Pairs, open_pairs
from diffusion import NoiseSchedule
from formats.networks import read_controlnet
from formats.sizes import own_metadata
from sample import locate_controlnet
from stable_diffusion import StableDiffusion
from support import options
from support.devices import choose_device, describe, place_for_sampling, sampling_precision, warn_if_slow
from support.errors import UserError
from support.files import read_json, write_atomically
from support.randomness import HELD_OUT, generator_for
from vae import sample_latent
from weights import load_controlnet, load_decoders

BANDS = 8  # of the time steps, each as wide as the others
HINTS = ("own", "other", "empty", "none")  # that the loss is measured with
FEWEST = 8  # pairs for a verdict: of fewer, standard errors say too little
SURE = 3.0  # standard errors
FOLLOWS = 1.0  # share that another hint adds to the loss
MOVED = 0.1  # mean square of own - other, as a share of the loss


@dataclass(frozen=True)
class Heard:
    """What was measured, each [pairs, bands]: the losses by hint, and the mean square of own - other."""

    loss: dict[str, Tensor]
    moved: Tensor

    @property
    def gap(self) -> Tensor:
        return self.loss["other"] - self.loss["own"]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of one value a pair, and its standard error. Not known for one pair."""
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), float(error)


@dataclass(frozen=True)
class Noised:
    """A pair, noised once in each band, and what does not depend on the ControlNet. Tensors of [bands, ...]."""

    z: Tensor
    eps: Tensor
    t: Tensor
    context: Tensor
    hints: dict[str, Tensor]  # own, other, empty [1, 3, H, W]
    base: Tensor  # the prediction without a ControlNet


@torch.no_grad()
def noise_pairs(sd: StableDiffusion, pairs: Pairs, seed: int = 0) -> list[Noised]:
    """Each pair at one time of each band. Raises UserError if all have the same hint."""
    schedule, noised = NoiseSchedule(device=sd.device), []
    width = schedule.steps // BANDS
    for i in range(len(pairs)):
        generator = generator_for(seed, HELD_OUT, i)
        t = (torch.arange(BANDS) * width + torch.randint(width, (BANDS,), generator=generator)).to(sd.device)
        moments = sd.vae.encode(pairs.image(i)[None].to(sd.device))
        shape = (BANDS, moments.shape[1] // 2, *moments.shape[2:])
        noise, eps = (torch.randn(shape, generator=generator).to(sd.device) for _ in range(2))
        z = schedule.add_noise(sd.latent_scale * sample_latent(moments.expand(BANDS, -1, -1, -1), noise), eps, t)
        context = sd.encode_prompts([pairs.prompts[i]]).expand(BANDS, -1, -1)
        own, other = pairs.hint(i)[None], pairs.other_hint(i)[None]
        if torch.equal(own, other):
            raise UserError(f"{pairs.name(i)}: all {len(pairs)} pairs have the same hint: pass others with --data")
        hints = {"own": own, "other": other, "empty": torch.zeros_like(own)}
        with sd.autocast():
            base = sd.unet(z, t, context).cpu().double()
        noised.append(Noised(z, eps, t, context, hints, base))
    return noised


@torch.no_grad()
def listen(sd: StableDiffusion, controlnet: ControlNet, noised: list[Noised]) -> Heard:
    """Measure on all pairs."""
    rows: dict[str, list[Tensor]] = {name: [] for name in (*HINTS, "moved")}
    for pair in noised:
        predicted = {}
        with sd.autocast():
            for name, hint in pair.hints.items():
                condition = controlnet.hint_encoder(hint.to(sd.device)).expand(BANDS, -1, -1, -1)
                residuals = controlnet.residuals(pair.z, condition, pair.t, pair.context)
                predicted[name] = sd.unet(pair.z, pair.t, pair.context, residuals).cpu().double()
        for name, prediction in (predicted | {"none": pair.base}).items():
            rows[name].append((prediction - pair.eps.cpu()).square().mean(dim=(1, 2, 3)))
        rows["moved"].append((predicted["own"] - predicted["other"]).square().mean(dim=(1, 2, 3)))
    *losses, moved = (torch.stack(row) for row in rows.values())
    return Heard(dict(zip(HINTS, losses, strict=True)), moved)


def verdict(heard: Heard) -> str:
    """What the figures say, in a sentence."""
    pairs, loss = len(heard.gap), heard.loss["own"].mean().item()
    if not math.isfinite(heard.gap.sum()):
        return "its predictions are not finite: try --precision fp32, or it is broken"
    if not heard.moved.any():
        return "it does not hear its hint: its residuals are the same whatever the hint"
    if pairs < FEWEST:
        return f"{pairs} pairs are too few for a verdict: take {FEWEST} or more"
    mean, error = mean_and_error(heard.gap.mean(dim=1))
    if mean < -SURE * error:
        return "its own hint makes the predictions worse than another's: is it inverted, or of another kind?"
    if mean < SURE * error:
        moved = heard.moved.mean().item()
        if moved > MOVED * loss and mean + error < moved / 2:  # a right prediction's gap is what its hint moves
            return (f"its hint moves the predictions, but not towards these {pairs} pictures: is this the kind of hint "
                    "that it was trained with?")  # fmt: skip
        return f"it does not hear its hint yet, as far as {pairs} pairs can tell"
    share, error, band = loudest(heard)
    told = f"another pair's hint raises the loss by {share:.0%} ± {error:.0%} at t = {band}"
    if share < FOLLOWS:
        return f"it hears its hint, but samples hardly show it: {told}"
    return f"it follows its hint: {told}"


def loudest(heard: Heard) -> tuple[float, float, str]:
    """The largest share that another hint adds to a band's loss, its standard error, and the band.

    The largest: under little noise the picture needs no hint, and under much of it none can help. Bands whose gap is
    not surely above 0 do not count; if none is, it is the share of all bands together.
    """
    found = (0.0, 0.0, "")
    for i in range(BANDS):
        (gap, error), loss = mean_and_error(heard.gap[:, i]), heard.loss["own"][:, i].mean().item()
        if gap > max(SURE * error, found[0] * loss):
            found = gap / loss, error / loss, band_name(i)
    (gap, error), loss = mean_and_error(heard.gap.mean(dim=1)), heard.loss["own"].mean().item()
    return found if found[2] else (gap / loss, error / loss, "0 to 999")


def band_name(i: int) -> str:
    width = NoiseSchedule().steps // BANDS
    return f"{i * width} to {(i + 1) * width - 1}"


def table(heard: Heard) -> list[str]:
    """A line for each band, and one for their mean: losses, the gap, the sensitivity, with their standard errors."""
    names = [*(f"loss, {hint}" for hint in HINTS), "gap", "sensitivity"]
    lines = [f"{'t':>10} {' '.join(f'{name:>16}' for name in names)}"]
    for i in [*range(BANDS), None]:
        rows = [values if i is None else values[:, [i]] for values in (*heard.loss.values(), heard.gap, heard.moved)]
        *figures, (square, error) = (mean_and_error(values.mean(dim=1)) for values in rows)
        root = math.sqrt(square)
        figures.append((root, error / (2 * root) if root else 0.0))  # the error of a mean's root
        forms = ("{:.4f} ± {:.4f}",) * len(HINTS) + ("{:.1e} ± {:.0e}",) * 2
        words = " ".join(f"{form.format(*figure):>16}" for form, figure in zip(forms, figures, strict=True))
        lines.append(f"{'all' if i is None else band_name(i):>10} {words}")
    return lines


def steps_in_folder(folder: Path) -> dict[int, Path]:
    """The snapshots and checkpoints of a run, ours (of a step that has both, the checkpoint) or diffusers'."""
    found = {}
    for places in ("snapshots/step-*", "step-*", "checkpoints/step-*", "checkpoint-*/controlnet"):
        for path in folder.glob(places):
            if match := re.search(r"(?:step|checkpoint)-(\d+)(?:/controlnet|\.safetensors)?$", path.as_posix()):
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def readable(path: Path) -> bool:
    """Whether it was written to its end; says so if it is not."""
    try:
        read_controlnet(path)
        return True
    except UserError as error:
        print(f"warning: left out, {error}", file=sys.stderr)
        return False


def plot(figures: dict[int, Heard], path: Path) -> None:
    """Sensitivity, and what another hint adds to the loss, over the checkpoints, with two standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = list(figures)
    moved = [mean_and_error(heard.moved.mean(dim=1)) for heard in figures.values()]
    roots = [math.sqrt(mean) for mean, _ in moved]
    upper.errorbar(steps, roots, [error / max(root, 1e-12) for (_, error), root in zip(moved, roots)], fmt="o-", ms=3)
    upper.set_yscale("log" if min(roots) > 0 else "symlog", **({} if min(roots) > 0 else {"linthresh": 1e-6}))
    upper.set_ylabel("hint sensitivity")
    shares, errors, _ = zip(*(loudest(heard) for heard in figures.values()))
    lower.errorbar(steps, shares, [2 * error for error in errors], fmt="o-", ms=3)
    lower.axhline(FOLLOWS, color="0.5", linestyle="--", linewidth=0.8)
    lower.set(xlabel="optimizer step", ylabel="share that another hint\nadds to the loss")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))


def parse_arguments():
    parser = options.ArgumentParser(prog="convergence.py", description="Measure whether a ControlNet hears its hint.")
    add = parser.add_argument
    add("--base", help="as for sample.py (default: the one that it was trained on, if it is from train.py; else tiny)")
    add("--controlnet", required=True, help="as for sample.py, or a training's folder, with snapshots or checkpoints")
    add("--data", help="as for train.py; of a folder, its last pairs (default: what it was trained on, or the base's)")
    add("--pairs", type=options.number(int, lambda n: n > 1, "a whole number above 1"), default=32, help="default: 32")
    options.add_placing(parser)  # --precision, --resolution, --device
    add("--seed", type=options.seed, default=0, help="of noise and times")
    add("--output", type=options.png, default=Path("convergence.png"), help="the curve over a folder's checkpoints")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = choose_device(args.device)
    folder = Path(args.controlnet)
    found = steps_in_folder(folder)
    paths = {step: path for step, path in found.items() if readable(path)}
    training = read_json(folder / "config.json") if found and (folder / "config.json").is_file() else {}
    if not found:
        paths = {0: locate_controlnet(args.controlnet)}
        metadata = read_controlnet(paths[0]).metadata  # raises UserError before anything else is loaded
        training = own_metadata(metadata, "config")
    if not paths:
        raise UserError(f"{args.controlnet}: none of its checkpoints can be read: train on, or pass another folder")
    for name in ("base", "data", "resolution"):
        if getattr(args, name) is None:
            setattr(args, name, training.get(name))
    sd = StableDiffusion.load(args.base or "tiny")
    args = options.with_defaults(args, sd.preset)
    if args.data in (*DRAWN_PAIRS, "fill50k"):
        _, pairs = open_pairs(args.data, args.resolution, 0, args.pairs)
        most = len(pairs)
    else:
        all_pairs = PairedImages(args.data, args.resolution)
        pairs, most = all_pairs.select(slice(-args.pairs, None)), len(all_pairs) // 10
    if len(pairs) < 2:
        raise UserError(f"{args.data} has one pair only: another pair's hint is needed too")
    same = "data" in training and Path(training["data"]).resolve() == Path(args.data).resolve()
    if same and args.data not in DRAWN_PAIRS:
        unseen = min(training["validation_hints"], most)  # see data.open_pairs
        if unseen < len(pairs):
            print(f"warning: it was trained on these pairs but for the last {unseen}, and looks better than it is: "
                  "train with more --validation-hints, or take fewer --pairs", file=sys.stderr)  # fmt: skip
    warn_if_slow(sd.unet, device)
    if load_decoders(sd.unet, list(paths.values())):
        print("its decoder was trained too: the column none is the base with that decoder")
    precision = sampling_precision(args.precision, device)
    print(f"{len(pairs)} pairs of {args.data} on {describe(device)}, precision {precision}")
    place_for_sampling(sd, [], device, precision)
    noised, figures = noise_pairs(sd, pairs, args.seed), {}
    for step, path in paths.items():
        controlnet = load_controlnet(path, sd.unet).requires_grad_(False)
        place_for_sampling(sd, [controlnet], device, precision)
        heard = figures[step] = listen(sd, controlnet, noised)
        if found:
            sensitivity, (gap, error) = heard.moved.mean().sqrt().item(), mean_and_error(heard.gap.mean(dim=1))
            print(f"step {step}: sensitivity {sensitivity:.1e}, gap {gap:.1e} ± {error:.0e}; {verdict(heard)}")
        else:
            print(*table(heard), sep="\n")
            print(f"{path}: {verdict(heard)}")
    if found:
        plot(figures, args.output)
        print(f"wrote {args.output}")
