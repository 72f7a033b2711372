"""How the shipped miniature was made: a Stable Diffusion trained from nothing on a world of coloured shapes.

`python -m tools.pretrain` runs all stages (merges, vae, text, unet, polish, measure) and writes models/tiny; with a
stage's name it runs that one. A stage that was stopped goes on where it was: empty its folder to make another base.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from support.command import run_command_line

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clip_text import WORD, WORD_END, CLIPTextModel, Tokenizer, byte_symbols, join_pair
from data import COLOURS, SHAPES
from diffusion import NoiseSchedule, guided_noise
from formats.networks import config_metadata
from sample import generate
from stable_diffusion import TINY, TINY_FILE, StableDiffusion
from support.errors import UserError
from support.files import read_tensors, save_tensors, write_atomically
from support.options import ArgumentParser
from support.pictures import save_picture
from tools.fit import SEED, TRAIN, UNSEEN, Plan, draw_batch, fit, grid, load_trained
from tools.pretrain_round import Wrong, forgive, paint_midway, slightly_wrong
from tools.pretrain_vae import reconstruct, train_vae
from tools.shapes import judge, outline_error, unevenness
from vae import AutoencoderKL, sample_latent
from weights import official_state_dict

PLANS = {
    "vae": Plan(4000, 16, 1e-3),
    "text": Plan(600, 128, 1e-3),
    # Stable Diffusion locks CLIP, but this text encoder was trained for a minute.
    "unet": Plan(7000, 32, 1e-3, learning=("unet", "text_encoder"), weights=((1, 25), (1, 8))),
    # For rounder circles and straighter edges: from the full learning rate down to 0, again and again.
    "polish-1": Plan(2300, 64, 5e-4, constant=0, seed=100_000),
    "polish-2": Plan(3000, 64, 5e-4, constant=0, seed=200_000),
    "forgive": Plan(1500, 16, 6e-4, constant=0.25, seed=700_000),
    "polish-3": Plan(1250, 64, 5e-4, constant=0.99, seed=800_000, weights=((1, 2),)),
    "repair-1": Plan(3600, 64, 5e-4, constant=0, seed=900_000, weights=((1, 2),)),
    "repair-2": Plan(1400, 64, 4e-4, constant=0, seed=1_000_000, weights=((1, 2),)),
}
EMPTY_PROMPTS = 0.1  # so that the UNet knows both sides of guidance
LATENTS = 20_000  # scenes that the UNet is trained on
WRONG = 9_984  # of them, the first ones, are also drawn slightly wrong
SLIGHTLY = {"dented": {"cells": [6, 8, 12, 16, 24], "most": 1.4}, "bent": {"cells": [2, 3, 4], "most": 2.5}}
MIDWAY = 2560  # captions of which repair-2 sees what the UNet itself predicts


def learn_merges(folder: Path) -> None:
    """Join the commonest pair of symbols, again and again, until every word of the captions is one token."""
    captions = [f"{a} {shape} with {b} background" for a in COLOURS for b in COLOURS for shape in SHAPES]
    counts = Counter(word for caption in captions for word in WORD.findall(caption))
    symbols = byte_symbols()
    words = {word: [symbols[b] for b in word.encode()] for word in counts}
    for parts in words.values():
        parts[-1] += WORD_END
    merges = []
    while any(len(parts) > 1 for parts in words.values()):
        pairs = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for parts in words.values():
            join_pair(parts, best)
    text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    write_atomically(folder / "merges.txt", lambda path: path.write_text(text, encoding="utf-8"))
    print(f"{len(merges)} merges, {len(Tokenizer(merges).ids)} tokens")


class TinyCLIP(nn.Module):
    """The text encoder and, as in CLIP, what it is trained against: a picture encoder into the same space."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 128)
        self.text = CLIPTextModel(TINY.text)
        self.text_proj = nn.Linear(TINY.text.width, 64, bias=False)
        self.picture = nn.Sequential(  # [B, 3, 32, 32] -> [B, 64]
            *(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GELU()) for a, b in zip(widths, widths[1:])),
            nn.Flatten(),
            nn.Linear(16 * widths[-1], 64),
        )
        self.log_scale = nn.Parameter(torch.tensor(2.66))  # log(1 / 0.07), CLIP's start

    def forward(self, ids: Tensor, pictures: Tensor) -> Tensor:
        """Similarities [B, B] of B captions (rows) with B pictures."""
        ends = (ids == ids[0, -1]).int().argmax(dim=1)  # the first end token has seen the whole caption
        texts = self.text_proj(self.text(ids)[torch.arange(len(ids)), ends])
        similarity = F.normalize(texts, dim=1) @ F.normalize(self.picture(pictures), dim=1).T
        return self.log_scale.exp().clamp(max=100) * similarity


def train_text(folder: Path, plan: Plan) -> None:
    torch.manual_seed(SEED)
    tokenizer, clip, batch = Tokenizer.from_merges(folder / "merges.txt"), TinyCLIP(), plan.batch

    def similarities(model, stream, first, count):
        images, captions = draw_batch(stream, range(first, first + count), 32)
        return model(tokenizer(captions), images)

    def loss_fn(step, generator):
        logits = similarities(clip, TRAIN, batch * step, batch)
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2, {}

    @torch.no_grad()
    def show(average, step):
        logits = similarities(average, UNSEEN, 0, 128)
        right = (logits.argmax(dim=1) == torch.arange(len(logits))).float().mean()
        tqdm.write(f"text step {step}: {right:.0%} of captions find their own among {len(logits)} unseen pictures")

    fit("text", folder, clip, loss_fn, show, plan)


@torch.no_grad()
def encode_scenes(
    path: Path, vae: AutoencoderKL, count: int, change: Callable[[Tensor, list[str]], Tensor] = lambda images, _: images
) -> tuple[Tensor, list[str]]:
    """Moments [count, 8, 16, 16] and captions of the scenes that the UNet is trained on, kept in a file."""
    if not path.exists():
        moments, captions = [], []
        for first in tqdm(range(0, count, 32), desc="encode"):
            images, texts = draw_batch(TRAIN, range(first, min(first + 32, count)), TINY.resolution)
            moments.append(vae.encode(change(images, texts).contiguous(memory_format=torch.channels_last)))
            captions += texts
        save_tensors({"moments": torch.cat(moments)}, path, {"captions": json.dumps(captions)})
    tensors, metadata = read_tensors(path)
    if len(tensors["moments"]) != count:
        raise UserError(f"{path} has {len(tensors['moments'])} scenes, not {count}: delete it")
    return tensors["moments"], json.loads(metadata["captions"])


def train_unet(folder: Path, plan: Plan) -> None:
    torch.manual_seed(SEED)
    sd = StableDiffusion(Tokenizer.from_merges(folder / "merges.txt"), TINY.text, TINY.vae, TINY.unet, 1.0)
    load_trained(folder / "vae.safetensors", sd.vae)
    load_trained(folder / "text.safetensors", sd.text_encoder, "text.")
    moments, captions = encode_scenes(folder / "latents.safetensors", sd.vae, LATENTS)
    noise = torch.randn(1000, *moments[0, :4].shape, generator=torch.Generator().manual_seed(SEED))
    sd.latent_scale = round(1 / sample_latent(moments[:1000], noise).std().item(), 5)
    print(f"latent scale {sd.latent_scale}")
    learn_to_paint("unet", folder, sd, moments, captions, plan)
    pack(sd, TINY_FILE, folder)


def polish(folder: Path) -> None:
    """Train what ships on, by the plans from polish-1 on: the UNet, then the VAE, then the UNet on its new latents."""
    sd, latents = StableDiffusion.load("tiny"), folder / "latents.safetensors"
    for stage, plan in PLANS.items():
        if stage == "forgive":
            forgive(sd, folder, plan)
            latents = folder / "forgiving-latents.safetensors"
        elif stage.startswith(("polish", "repair")):
            moments, captions = encode_scenes(latents, sd.vae, LATENTS)
            wrong, rows = [], 10
            if stage == "repair-2":
                wrong, rows = [Wrong(*paint_midway(sd, MIDWAY), rows=12)], 4
            for kind, least in (("dented", 0.2), ("bent", 1.0)) if stage.startswith("repair") else ():
                change = partial(slightly_wrong, **SLIGHTLY[kind], generator=torch.Generator().manual_seed(SEED))
                pictures, _ = encode_scenes(folder / f"{kind}.safetensors", sd.vae, WRONG, change)
                wrong.append(Wrong(moments[:WRONG], captions[:WRONG], pictures[:, :4], rows, least))
            learn_to_paint(stage, folder, sd, moments, captions, plan, wrong)
    pack(sd, TINY_FILE, TINY_FILE.parent)


def learn_to_paint(
    stage: str, folder: Path, sd: StableDiffusion, moments: Tensor, captions: list[str], plan: Plan,
    wrong: Sequence[Wrong] = (),
) -> None:  # fmt: skip
    """Train the planned parts of `sd` on latents and captions, as encode_scenes gives them.

    Colours are decided where z_t is nearly pure noise. But there ε is nearly z_t itself, and the squared error of the
    picture is only SNR times as large in ε. So those steps weigh more, as in a loss on z_0; less so once the colours
    are right, for the shapes.

    Scenes slightly wrong, rows of each batch, are to be painted as they should be: the target is the ε that leads from
    z_t to the right scene. It is compared with what guidance makes of both sides, as there the picture is to be seen
    already, the prompt says nothing new, and guidance would only multiply errors.
    """
    sd.to(memory_format=torch.channels_last).requires_grad_(False)
    ids, empty, schedule = sd.tokenizer(captions), sd.tokenizer([""])[0], NoiseSchedule()
    weights = (1 / schedule.alphas_cumprod - 1).float()  # 1 / SNR
    learning = nn.ModuleDict({part: getattr(sd, part) for part in plan.learning}).requires_grad_(True)

    wrong_ids, rows_of = [sd.tokenizer(kind.captions) for kind in wrong], [kind.rows for kind in wrong]
    _, unseen = draw_batch(UNSEEN, range(16), 8)

    def loss_fn(step, generator):
        def uniform(*shape):
            return torch.rand(*shape, generator=generator)

        chosen = torch.randint(len(moments), (plan.batch,), generator=generator)
        right, prompts = moments[chosen], ids[chosen]
        prompts[uniform(plan.batch) < EMPTY_PROMPTS] = empty
        noise, eps = (torch.randn(right[:, :4].shape, generator=generator) for _ in range(2))
        # One t from each of as many equal parts: a batch's loss depends on its times more than on anything else.
        t = ((torch.arange(plan.batch) + uniform(plan.batch)) * schedule.steps / plan.batch).long()

        off = 2 + torch.randperm(40, generator=generator)[: sum(rows_of)]  # of 64 rows: 31 <= t < 656
        for kind, own_ids, rows in zip(wrong, wrong_ids, off.split(rows_of)):
            chosen = torch.randint(len(kind.latents), (len(rows),), generator=generator)
            right[rows], prompts[rows] = kind.moments[chosen], own_ids[chosen]
            share = kind.least + (1 - kind.least) * uniform(len(rows), 1, 1, 1)
            delta = share * sd.latent_scale * (kind.latents[chosen] - right[rows, :4])
            eps[rows] += delta / weights[t[rows], None, None, None].sqrt()  # z_t is then that of z_0 + delta
        z_t = schedule.add_noise(sd.latent_scale * sample_latent(right, noise), eps, t)
        z_t = torch.cat([z_t, z_t[off]]).contiguous(memory_format=torch.channels_last)
        context = sd.text_encoder(torch.cat([prompts, empty.expand(len(off), -1)]))
        # float32: at 16x16 pixels autocast costs more than bfloat16 saves
        predicted, blind = sd.unet(z_t, torch.cat([t, t[off]]), context).split([plan.batch, len(off)])
        guided = guided_noise(blind, predicted[off], 1 + 3 * uniform(len(off), 1, 1, 1))
        predicted = predicted.index_put((off,), guided)

        errors = (predicted - eps).square().mean((1, 2, 3))  # equation (5) without a hint, for each picture
        weight = weights[t].clamp(*plan.weights[step * len(plan.weights) // plan.steps])
        weight[off] = (weights[t[off]] / weights[51]).clamp(max=1)
        return (weight * errors).mean(), {"eps": errors.detach().mean()}

    @torch.no_grad()
    def show(average, step):
        trained = StableDiffusion(sd.tokenizer, TINY.text, TINY.vae, TINY.unet, sd.latent_scale)
        for name, part in {**dict(sd.named_children()), **average}.items():
            setattr(trained, name, part)
        size = (TINY.resolution, TINY.resolution)
        images = generate(trained, [], [], unseen, size=size, guidance_scale=TINY.guidance_scale)
        save_picture(grid(images[:8], images[8:]), folder / f"{stage}.png")

    for part, trained in fit(stage, folder, learning, loss_fn, show, plan).items():
        setattr(sd, part, trained)


def pack(sd: StableDiffusion, path: Path, merges: Path) -> None:
    """Write a miniature as it ships: in half precision, under official names, its sizes in the metadata."""
    tensors = {k: v.half() for part in (sd.unet, sd.vae, sd.text_encoder) for k, v in official_state_dict(part).items()}
    save_tensors(tensors, path, config_metadata(sd))
    text = (merges / "merges.txt").read_bytes()
    write_atomically(path.parent / "merges.txt", lambda temporary: temporary.write_bytes(text))
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


@torch.no_grad()
def measure(folder: Path) -> None:
    """The model card's figures of the shipped miniature, and its picture: the first unseen captions, none picked."""
    sd = StableDiffusion.load("tiny")
    images, captions = draw_batch(UNSEEN, range(256), TINY.resolution)
    contrast = (images.amax((2, 3)) - images.amin((2, 3))).mean(dim=1)
    low = (contrast <= contrast.quantile(0.1)).numpy()

    def outlines(label, pictures):
        off = np.array([outline_error(picture) for picture in pictures])
        print(f"outlines, {label}: {off.mean():.3f} px from a true shape in the mean, median {np.median(off):.3f}, "
              f"95th percentile {np.percentile(off, 95):.3f}; {off[low].mean():.3f} in the tenth with the lowest "
              f"contrast, {off[~low].mean():.3f} in the rest")  # fmt: skip

    outlines("true", images)
    for sigma in (0, 0.1, 0.2):  # of the latents' standard deviation
        decoded, psnr = reconstruct(sd.vae, images, sigma / sd.latent_scale)
        outlines(f"after the VAE, noise {sigma} on its latents, PSNR {psnr:.2f} dB", decoded)
    settings = {"size": (TINY.resolution,) * 2, "steps": TINY.sampling_steps, "guidance_scale": TINY.guidance_scale}
    parts = range(0, len(captions), 32)
    samples = torch.cat([generate(sd, [], [], captions[i : i + 32], seed=i, **settings) for i in tqdm(parts)])
    outlines("painted", samples)
    judged = np.mean([judge(sample, caption) for sample, caption in zip(samples, captions)], axis=0)
    print("colour error {:.4f} (shape), {:.4f} (background), right shape {:.3f}".format(*judged))
    print(f"unevenness of the shapes' colour {np.nanmean([unevenness(sample) for sample in samples]):.4f}")
    picture, path = grid(*samples[:64].split(8)), TINY_FILE.parent / "samples.webp"
    write_atomically(path, lambda temporary: picture.save(temporary, format="WEBP", lossless=True, method=6))
    print("; ".join(captions[:16]))


def main() -> None:
    stages = {
        "merges": learn_merges, "vae": train_vae, "text": train_text, "unet": train_unet, "polish": polish,
        "measure": measure,
    }  # fmt: skip
    parser = ArgumentParser(prog="python -m tools.pretrain", description="Make the miniature from nothing.")
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"{', '.join(stages)}; by default all")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/pretrain"), help="checkpoints, logs and previews")
    args = parser.parse_args()
    if unknown := [stage for stage in args.stages if stage not in stages]:
        raise UserError(f"no stage {unknown[0]!r}: choose from {', '.join(stages)}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for stage in args.stages or stages:
        stages[stage](args.output_dir, *([PLANS[stage]] if stage in PLANS else []))


if __name__ == "__main__":
    run_command_line(main)
