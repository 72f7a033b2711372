"""Sudden convergence (Fig. 4), made visible, and whether any ControlNet hears its hint.

The denoising loss hardly shows whether a ControlNet follows its hint. Samples of held-out hints do, and so does what
another pair's hint changes in the prediction: hint sensitivity and hint gap, which need no samples. train.py measures
all of them on HeldOut pairs; `python convergence.py --controlnet FILE|RUN` the latter two, of any ControlNet.
"""

import math
from itertools import accumulate
from pathlib import Path

from support.command import run_command_line

import torch
import torch.nn.functional as F
from torch import Tensor

from controlnet import ControlNet, Denoiser
from data import DRAWN_PAIRS, PairedImages, Pairs, open_pairs
from diffusion import NoiseSchedule
from formats.networks import own_metadata, read_controlnet
from metrics import circle_iou, colour_error, is_circle_task
from sample import generate, load_beside, load_to_sample, locate_controlnet
from stable_diffusion import StableDiffusion
from support import options
from support.checkpoints import steps_in
from support.devices import choose_device, describe
from support.errors import UserError, warn
from support.files import read_json
from support.pictures import contact_sheet, read_strip, save_picture, side_by_side, to_picture
from support.plot import plot_logs
from support.randomness import HELD_OUT, generator_for
from support.verdict import BANDS, HINTS, WIDTH, Measurement, print_table, summary, verdict
from vae import sample_latent
from weights import load_decoder

PREVIEWED = 8  # columns of a preview
RESPONSE_TIMES = (200, 400, 600, 800)  # at which train.py measures hint sensitivity and gap, one held-out pair each
FOLLOWED = 0.7  # IoU from which on a sample counts as following its hint
GROWTH = 10  # times its smallest value so far: then the hint sensitivity is growing
JUMP = 0.5  # share of the held-out loss that another pair's hint adds when samples begin to follow their hints


def hint_response(own: Tensor, other: Tensor, eps: Tensor) -> tuple[float, float]:
    """How far the hint moves the prediction, and whether in the right direction: (hint sensitivity, hint gap).

    own, other [B, 4, h, w]: ε_θ of the same noised latents, times and prompts, once with each pair's own hint and once
    with another pair's; eps the true noise. The sensitivity is the root mean square of own - other. The gap is what the
    other hint adds to the loss of equation (5). With zero convolutions both are exactly 0 before the first step and
    after it: the hint encoder's moves in the second (notebook 1).
    """
    own, other, eps = (x.cpu().double() for x in (own, other, eps))  # to see a gap of 1e-9 beside a loss of 0.02
    sensitivity = (own - other).square().mean().sqrt()
    gap = F.mse_loss(other, eps) - F.mse_loss(own, eps)
    return sensitivity.item(), gap.item()


class HeldOut:
    """Held-out pairs, and all that stays fixed from one measurement to the next: noise, time steps, prompts.

    Make it before the first step: the samples of step 0 are the base's own (equation 3; Gaussian connections would
    change them at once). They are kept in `folder`/step-0.png, and read from there when a run is resumed. With
    `previews` False nothing is ever sampled.
    """

    @torch.no_grad()
    def __init__(self, sd: StableDiffusion, pairs: Pairs, seed: int, folder: Path, previews: bool = True):
        self.seed, self.folder, self.prompts = seed, folder, pairs.prompts
        self.hints, self.targets = (torch.stack([f(i) for i in range(len(pairs))]) for f in (pairs.hint, pairs.image))
        # What `response` feeds the model: one pair at each of RESPONSE_TIMES, and another pair's hint for it.
        generator, chosen = generator_for(seed, HELD_OUT), [i % len(pairs) for i in range(len(RESPONSE_TIMES))]
        z0 = sd.encode_images(self.targets[chosen].to(sd.device), generator)
        self.eps = torch.randn(z0.shape, generator=generator).to(sd.device)
        self.t = torch.tensor(RESPONSE_TIMES, device=sd.device)
        self.z = NoiseSchedule(device=sd.device).add_noise(z0, self.eps, self.t)
        self.own = self.hints[chosen].to(sd.device)
        self.other = torch.stack([pairs.other_hint(i) for i in chosen]).to(sd.device)
        self.context = sd.encode_prompts([self.prompts[i] for i in chosen])
        if previews:
            self.sd, self.scored = sd, is_circle_task(self.hints, self.prompts)
            if not (step_0_file := folder / "step-0.png").exists():
                save_picture(to_picture(self.hints[0] * 2 - 1), folder / "hint.png")
                save_picture(side_by_side([to_picture(image) for image in self.sample()]), step_0_file)
            self.step_0 = read_strip(step_0_file, len(pairs))
            self.base_scores = {f"base_{name}": score for name, score in self.scores(self.step_0).items()}

    @torch.no_grad()
    def response(self, denoiser: Denoiser) -> dict[str, float]:
        """hint_sensitivity, hint_gap, and heldout_loss with the pairs' own hints. Empty if no two hints differ."""
        if torch.equal(self.own, self.other):
            return {}
        own, other = (denoiser(self.z, self.t, self.context, hint) for hint in (self.own, self.other))
        sensitivity, gap = hint_response(own, other, self.eps)
        heldout_loss = F.mse_loss(own.cpu().double(), self.eps.cpu().double()).item()
        return {"hint_sensitivity": sensitivity, "hint_gap": gap, "heldout_loss": heldout_loss}

    def sample(self, *controlnets: ControlNet) -> Tensor:
        """The held-out hints as pictures, from the same noise each time; the hint on the conditional side alone."""
        preset, hints, size = self.sd.preset, [self.hints] * len(controlnets), tuple(self.hints.shape[2:])
        return generate(
            self.sd, list(controlnets), hints, self.prompts, control_mode="conditional", size=size, seed=self.seed,
            steps=preset.sampling_steps, guidance_scale=preset.guidance_scale,
        ).cpu()  # fmt: skip

    def scores(self, images: Tensor) -> dict[str, float | list[float]]:
        """Each hint's IoU and their mean, the share that is followed, and the colour error, if the task is circles."""
        if not self.scored:
            return {}
        iou, errors = circle_iou(images, self.hints), colour_error(images, self.hints, self.prompts)
        followed = (iou >= FOLLOWED).double()
        scores = {"iou": iou.mean(), "followed": followed.mean(), "colour_error": errors.mean()}
        return {name: score.item() for name, score in scores.items()} | {"ious": [round(x, 3) for x in iou.tolist()]}

    def preview(self, controlnet: ControlNet, step: int) -> dict[str, float | list[float]]:
        """Write previews/step-N.png; returns the scores, the base's beside them."""
        images = self.sample(controlnet)
        rows = {"hint": self.hints * 2 - 1, "base": self.step_0, f"step {step}": images, "target": self.targets}
        sheet = contact_sheet({label: row[:PREVIEWED] for label, row in rows.items()}, self.prompts[:PREVIEWED])
        save_picture(sheet, self.folder / f"step-{step}.png")
        return self.scores(images) | self.base_scores


def measurements(history: list[dict]) -> list[dict]:
    """The entries with a hint gap; none if the hint moved the prediction from the start, as then nothing can jump."""
    heard = history and history[0]["step"] == 0 and history[0].get("hint_sensitivity", 0) > 0  # train.py --controlnet
    return [] if heard else [entry for entry in history if "hint_gap" in entry]


def growth_step(history: list[dict]) -> int | None:
    """The first logged step, up to the jump, at which the hint sensitivity is seen to grow, or None.

    Seen: in three measurements running it was at least 10 times its smallest value so far, so that neither rounding
    noise nor a single spike passes for growth.
    """
    jump = jump_step(history) or math.inf
    entries = [entry for entry in measurements(history) if entry["hint_sensitivity"] > 0]
    values = [entry["hint_sensitivity"] for entry in entries]
    grown = [value >= GROWTH * smallest for value, smallest in zip(values, accumulate(values, min))]
    threes = zip(entries[2:], grown, grown[1:], grown[2:])
    return next((entry["step"] for entry, *three in threes if all(three) and entry["step"] <= jump), None)


def jump_step(history: list[dict]) -> int | None:
    """The first logged step by which another pair's hint raises the held-out loss by half, or None.

    That is of the mean of three measurements, as single ones fluctuate. About then samples begin to follow their
    hints: docs/convergence.md has how exactly, and in which trainings.
    """
    entries = measurements(history)
    for three in zip(entries, entries[1:], entries[2:]):
        if sum(entry["hint_gap"] for entry in three) >= JUMP * sum(entry["heldout_loss"] for entry in three):
            return three[-1]["step"]
    return None


def milestones(history: list[dict]) -> list[str]:
    """What the last entry of a log tells the user on the console, a line each."""
    entry, lines = history[-1], []
    if entry["step"] == 0 and "hint_gap" in entry:  # it goes on from a ControlNet
        lines.append(f"hint sensitivity {entry['hint_sensitivity']:.1e}")
    if growth_step(history) == entry["step"]:
        lines.append(f"the hint sensitivity is growing: {entry['hint_sensitivity']:.1e}")
    if jump_step(history) == entry["step"]:
        lines.append("the jump: another pair's hint raises the held-out loss by half")
    if "iou" in entry:
        lines.append(f"IoU of samples and hints {entry['iou']:.2f} (the base's: {entry['base_iou']:.2f}), "
                     f"{entry['followed']:.0%} of hints followed")  # fmt: skip
    return [f"step {entry['step']}: {line}" for line in lines]


def plot_convergence(histories: dict[str, list[dict]], path: Path) -> None:
    """Plot the logs of one or more runs as a PNG. Dotted: the sensitivity is seen to grow. Dashed: the jump."""
    marks = {label: {":": growth_step(history), "--": jump_step(history)} for label, history in histories.items()}
    plot_logs(histories, marks, path)


@torch.no_grad()
def measure(sd: StableDiffusion, controlnet: ControlNet, pairs: Pairs, seed: int = 0) -> Measurement:
    """Each pair at one time of each band, with the same times and noise for every ControlNet."""
    schedule, bands, losses, moved = NoiseSchedule(device=sd.device), len(BANDS), [], []
    for i in range(len(pairs)):
        generator, own, other = generator_for(seed, HELD_OUT, i), pairs.hint(i), pairs.other_hint(i)
        if torch.equal(own, other):
            raise UserError(f"{pairs.name(i)}: all {len(pairs)} pairs have the same hint: pass others with --data")
        t = (torch.arange(bands) * WIDTH + torch.randint(WIDTH, (bands,), generator=generator)).to(sd.device)
        moments = sd.vae.encode(pairs.image(i)[None].to(sd.device)).expand(bands, -1, -1, -1)
        noise, eps = (torch.randn(moments[:, :4].shape, generator=generator).to(sd.device) for _ in range(2))
        z = schedule.add_noise(sd.latent_scale * sample_latent(moments, noise), eps, t)
        context = sd.encode_prompts([pairs.prompts[i]]).expand(bands, -1, -1)
        with sd.autocast():
            predicted = {"none": sd.unet(z, t, context)}
            for name, hint in {"own": own, "other": other, "empty": torch.zeros_like(own)}.items():
                condition = controlnet.hint_encoder(hint[None].to(sd.device)).expand(bands, -1, -1, -1)
                predicted[name] = sd.unet(z, t, context, controlnet.residuals(z, condition, t, context))
        errors = {name: predicted[name].cpu().double() - eps.cpu() for name in HINTS}
        losses.append([error.square().mean(dim=(1, 2, 3)) for error in errors.values()])
        moved.append((errors["own"] - errors["other"]).square().mean(dim=(1, 2, 3)))
    return Measurement({name: torch.stack(rows) for name, rows in zip(HINTS, zip(*losses))}, torch.stack(moved))


def find_checkpoints(source: str) -> tuple[dict[int, Path], dict]:
    """The ControlNets that --controlnet means, by step, and the options of train.py that made them, if they are known.

    A training's snapshots and checkpoints, ours or diffusers'; or a single ControlNet, of step 0.
    """
    folder = Path(source)
    found = steps_in(folder / "snapshots", ".safetensors") | steps_in(folder / "checkpoints")
    theirs = {path.parent.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*/controlnet")}
    found |= {int(step): path for step, path in theirs.items() if step.isdecimal()}
    found = dict(sorted(found.items())) or {0: locate_controlnet(source)}
    if (folder / "config.json").is_file():
        return found, read_json(folder / "config.json")
    return found, own_metadata(read_controlnet(found[max(found)]).metadata, "config")


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
    checkpoints, trained_with = find_checkpoints(args.controlnet)
    args.base, args.vae = args.base or trained_with.get("base", "tiny"), trained_with.get("vae", "")
    args.data = args.data or trained_with.get("data")
    args.resolution = args.resolution or trained_with.get("resolution")
    sd = load_to_sample(args, device)
    args = options.with_defaults(args, sd.preset)
    if args.data in (*DRAWN_PAIRS, "fill50k"):
        pairs = open_pairs(args.data, args.resolution, 0, args.pairs)[1]
        spared = len(pairs)
    else:
        folder = PairedImages(args.data, args.resolution)
        pairs, spared = folder.select(slice(-args.pairs, None)), len(folder) // 10  # at most: data.open_pairs
    trained_on = trained_with.get("data", "drawn")
    if trained_on not in DRAWN_PAIRS and Path(trained_on).resolve() == Path(args.data).resolve():
        unseen = min(trained_with["validation_hints"], spared)
        if unseen < len(pairs):
            warn(f"it was trained on these pairs but for the last {unseen}, and looks better than it is: train with "
                 "more --validation-hints, or take fewer --pairs")  # fmt: skip
    print(f"{len(pairs)} pairs of {args.data} on {describe(device)}, precision {args.precision}")
    history = []
    for step, path in checkpoints.items():
        controlnet = load_beside(sd, path)
        if load_decoder(sd.unet, path) and not history:
            print("its decoder was trained too: the column none is the base with that decoder")
        measured = measure(sd, controlnet, pairs, args.seed)
        if step == max(checkpoints):
            print_table(measured)
        print(f"{path}: {summary(measured)}; {verdict(measured)}")
        loss, sensitivity, gap = map(measured.figures().get, ("own", "sensitivity", "gap"))
        history.append({"step": step, "heldout_loss": loss[0], "hint_sensitivity": sensitivity[0], "hint_gap": gap[0]})
    if len(history) > 1:
        plot_convergence({args.controlnet: history}, args.output)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command_line(main, "a lower --resolution")
