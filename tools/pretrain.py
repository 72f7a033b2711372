"""How the shipped miniature was made: a Stable Diffusion trained from nothing on a world of coloured shapes.

`python -m tools.pretrain` runs all stages (merges, vae, text, unet, polish, measure) and writes models/tiny; with a
stage's name it runs that one. A stage that was stopped goes on where it was: empty its folder to make another base.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from support.command import run_command_line

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from clip_text import WORD, WORD_END, CLIPTextModel, Tokenizer, byte_symbols, join_pair
from controlnet import zero_weights
from data import COLOURS, SHAPES, draw_scene
from diffusion import NoiseSchedule
from formats.networks import config_metadata
from sample import generate
from stable_diffusion import TINY, TINY_FILE, StableDiffusion
from support.checkpoints import load_state, state_tensors
from support.errors import UserError
from support.files import read_tensors, save_tensors, write_atomically
from support.options import ArgumentParser
from support.pictures import save_picture, to_picture
from tools.shapes import judge, outline_error
from unet import ResBlock
from vae import AutoencoderKL, Downsample, SpatialAttention, Upsample, sample_latent
from weights import official_state_dict

SEED = 0
TRAIN, UNSEEN = 1, 2  # streams of scenes


class Plan(NamedTuple):
    """How a network is trained: a row of the table below."""

    steps: int
    batch: int
    learning_rate: float  # at its peak
    constant: float = 0.5  # share of the steps after which the learning rate falls to 0
    seed: int = SEED  # of the first step
    # Of `learn_to_paint`: the parts of Stable Diffusion that learn, and the range of a time's weight (1 / SNR), one
    # for each of as many equal parts of the steps.
    learning: tuple[str, ...] = ("unet",)
    weights: tuple[tuple[float, float], ...] = ((0.3, 4),)


PLANS = {
    "vae": Plan(4000, 16, 1e-3),
    "text": Plan(600, 128, 1e-3),
    # Stable Diffusion locks CLIP, but this text encoder was trained for a minute.
    "unet": Plan(7000, 32, 1e-3, learning=("unet", "text_encoder"), weights=((1, 25), (1, 8))),
    # For rounder circles and straighter edges: from the full learning rate down to 0, again and again.
    "polish-1": Plan(2300, 64, 5e-4, constant=0, seed=100_000),
    "polish-2": Plan(3000, 64, 5e-4, constant=0, seed=200_000),
}
CHECKPOINT_EVERY = 200
EMPTY_PROMPTS = 0.1  # so that the UNet knows both sides of guidance
LATENTS = 20_000  # scenes that the UNet is trained on


def draw_batch(stream: int, indices: range | list[int], size: int) -> tuple[Tensor, list[str]]:
    """Scenes of one stream: images [B, 3, size, size] in [-1, 1], and their captions."""
    scenes = [draw_scene(np.random.default_rng([SEED, stream, size, i]), size, SHAPES) for i in indices]
    images = torch.from_numpy(np.stack([np.asarray(target) for _, target, _ in scenes]))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1, [caption for _, _, caption in scenes]


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


def running_average(average: Tensor, value: Tensor, count: Tensor) -> Tensor:
    """The average over about the last 500 steps; over fewer at the start, so that the first weights fade soon."""
    return torch.lerp(value, average, min(0.998, ((1 + count) / (10 + count)).item()))


def fit(stage: str, folder: Path, module: nn.Module, loss_fn, show, plan: Plan) -> nn.Module:
    """Train `module` as planned; returns it with the running average of its weights, which is what ships.

    loss_fn(step, generator) -> (loss, values for the log). All randomness of a step comes from its generator, so that
    a resumed run goes on as if it had not stopped. show(averaged module, step) is called at each checkpoint.
    """
    path, start = folder / f"{stage}.safetensors", 0
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = AveragedModel(module, avg_fn=running_average)
    modules = {"average": average, "module": module}
    if path.exists():
        tensors, metadata = read_tensors(path)
        start = int(metadata["step"])
        load_state(tensors, modules, optimizer)
        print(f"{stage}: going on at step {start}")

    began, bar = time.monotonic(), tqdm(range(start, plan.steps), initial=start, total=plan.steps, desc=stage)
    with open(folder / f"{stage}.jsonl", "a") as log:
        for step in bar:
            rate = min(1.0, (step + 1) / 50) * min(1.0, (1 - step / plan.steps) / (1 - plan.constant))
            optimizer.param_groups[0]["lr"] = rate * plan.learning_rate
            loss, values = loss_fn(step, torch.Generator().manual_seed(plan.seed + step))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(module)
            if step % 20 == 0:
                entry = {"step": step, "loss": loss.item()} | {k: float(v) for k, v in values.items()}
                log.write(json.dumps(entry | {"seconds": round(time.monotonic() - began, 1)}) + "\n")
                log.flush()
                bar.set_postfix({k: f"{v:.4f}" for k, v in entry.items() if k != "step"})
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == plan.steps:
                tensors = {name: tensor.clone() for name, tensor in state_tensors(modules, optimizer).items()}
                save_tensors(tensors, path, {"step": str(step + 1)})
                show(average.module, step + 1)
    return average.module


def save_grid(path: Path, *rows: Tensor) -> None:
    """Rows of images [N, 3, H, W] in [-1, 1] as one picture."""
    save_picture(to_picture(torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)), path)


def pass_colours_through(vae: AutoencoderKL) -> None:
    """Initialise the VAE as a nearly linear map that keeps colours, so that it need not learn to.

    A group norm divides by its group's spread, so flat colours, all that this world has, would survive only as
    relations between channels. Here ResBlocks and attention start as identities, resamplers and 1x1 convolutions pass
    their channels on, and random biases at the entrances give each group a spread that does not depend on the picture.
    On two cores this reached 24 dB in 35 s, PyTorch's own initialisation 13 dB in 75 s.
    """
    for module in vae.modules():
        if isinstance(module, ResBlock):
            zero_weights(module.conv2)
            if isinstance(module.shortcut, nn.Conv2d):
                nn.init.orthogonal_(module.shortcut.weight)
        elif isinstance(module, SpatialAttention):
            zero_weights(module.to_out)
        elif isinstance(module, (Downsample, Upsample)):
            nn.init.dirac_(module.conv.weight)
            nn.init.zeros_(module.conv.bias)
    for conv in (vae.encoder.conv_in, vae.encoder.conv_out, vae.decoder.conv_in, vae.decoder.conv_out):
        nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
        nn.init.zeros_(conv.bias)
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        nn.init.normal_(conv.bias)
    for conv in (vae.to_moments, vae.from_latent):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    with torch.no_grad():
        vae.to_moments.bias[4:] = -5  # little noise at the start


def reconstruct(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """The images, encoded (to the latent's mean) and decoded again, and the mean PSNR in dB."""
    decoded = torch.cat([vae.decode(vae.encode(part)[:, :4]) for part in images.split(16)]).clamp(-1, 1)
    return decoded, -10 * torch.log10(((decoded - images) / 2).square().mean((1, 2, 3))).mean()


def train_vae(folder: Path) -> None:
    torch.manual_seed(SEED)
    vae = AutoencoderKL(TINY.vae).to(memory_format=torch.channels_last)
    pass_colours_through(vae)
    unseen, _ = draw_batch(UNSEEN, range(64), TINY.resolution)
    steps, batch, *_ = PLANS["vae"]

    def loss_fn(step, generator):
        # Small scenes first: the same edges and colours at a sixteenth of the work.
        size = 32 if step < 0.35 * steps else 64 if step < 0.85 * steps else 128
        images, _ = draw_batch(TRAIN, range(batch * step, batch * (step + 1)), size)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encode(images).float()
            mean, log_variance = moments[:, :4], moments[:, 4:].clamp(-30, 20)
            z = sample_latent(moments, torch.randn(mean.shape, generator=generator))
            error = vae.decode(z).float() - images
        pixels = error.abs().mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / images.numel()
        loss = pixels + 0.5 * error.square().mean() + min(1.0, step / 300) * edges + 2e-4 * kl
        return loss, {"pixels": pixels.detach(), "edges": edges.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def show(average, step):
        decoded, psnr = reconstruct(average, unseen)
        tqdm.write(f"vae step {step}: PSNR {psnr:.2f} dB on {len(unseen)} unseen pictures")
        save_grid(folder / "vae.png", unseen[:8], decoded[:8])

    fit("vae", folder, vae, loss_fn, show, PLANS["vae"])


def load_trained(path: Path, module: nn.Module, inside: str = "") -> None:
    """Load an earlier stage's averaged weights into `module`: all of them, or those whose names begin with `inside`."""
    tensors, prefix = read_tensors(path)[0], f"average.module.{inside}"
    module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


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


def train_text(folder: Path) -> None:
    torch.manual_seed(SEED)
    tokenizer, clip, batch = Tokenizer.from_merges(folder / "merges.txt"), TinyCLIP(), PLANS["text"].batch

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

    fit("text", folder, clip, loss_fn, show, PLANS["text"])


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


def train_unet(folder: Path) -> None:
    torch.manual_seed(SEED)
    sd = StableDiffusion(Tokenizer.from_merges(folder / "merges.txt"), TINY.text, TINY.vae, TINY.unet, 1.0)
    load_trained(folder / "vae.safetensors", sd.vae)
    load_trained(folder / "text.safetensors", sd.text_encoder, "text.")
    moments, captions = encode_scenes(folder / "latents.safetensors", sd.vae, LATENTS)
    noise = torch.randn(1000, *moments[0, :4].shape, generator=torch.Generator().manual_seed(SEED))
    sd.latent_scale = round(1 / sample_latent(moments[:1000], noise).std().item(), 5)
    print(f"latent scale {sd.latent_scale}")
    learn_to_paint("unet", folder, sd, moments, captions, PLANS["unet"])
    pack(sd, TINY_FILE, folder)


def polish(folder: Path) -> None:
    """Train what ships on, by every plan of this name."""
    sd = StableDiffusion.load("tiny")
    moments, captions = encode_scenes(folder / "latents.safetensors", sd.vae, LATENTS)
    for stage, plan in PLANS.items():
        if stage.startswith("polish"):
            learn_to_paint(stage, folder, sd, moments, captions, plan)
    pack(sd, TINY_FILE, TINY_FILE.parent)


def learn_to_paint(
    stage: str, folder: Path, sd: StableDiffusion, moments: Tensor, captions: list[str], plan: Plan
) -> None:
    """Train the planned parts of `sd` on latents and captions, as encode_scenes gives them.

    Colours are decided where z_t is nearly pure noise. But there ε is nearly z_t itself, and the squared error of the
    picture is only SNR times as large in ε. So those steps weigh more, as in a loss on z_0; less so once the colours
    are right, for the shapes.
    """
    sd.to(memory_format=torch.channels_last).requires_grad_(False)
    ids, empty, schedule = sd.tokenizer(captions), sd.tokenizer([""])[0], NoiseSchedule()
    weights = (1 / schedule.alphas_cumprod - 1).float()  # 1 / SNR
    learning = nn.ModuleDict({part: getattr(sd, part) for part in plan.learning}).requires_grad_(True)
    _, unseen = draw_batch(UNSEEN, range(16), 8)

    def loss_fn(step, generator):
        chosen = torch.randint(len(moments), (plan.batch,), generator=generator)
        prompts = ids[chosen]
        prompts[torch.rand(len(prompts), generator=generator) < EMPTY_PROMPTS] = empty
        noise, eps = (torch.randn(len(chosen), *moments[0, :4].shape, generator=generator) for _ in range(2))
        z0 = sd.latent_scale * sample_latent(moments[chosen], noise).contiguous(memory_format=torch.channels_last)
        # One t from each of as many equal parts: a batch's loss depends on its times more than on anything else.
        t = ((torch.arange(len(z0)) + torch.rand(len(z0), generator=generator)) * schedule.steps / len(z0)).long()
        # float32: at 16x16 pixels autocast costs more than bfloat16 saves
        predicted = sd.unet(schedule.add_noise(z0, eps, t), t, sd.text_encoder(prompts))
        errors = (predicted - eps).square().mean((1, 2, 3))  # equation (5) without a hint, for each picture
        limits = plan.weights[step * len(plan.weights) // plan.steps]
        return (weights[t].clamp(*limits) * errors).mean(), {"eps": errors.detach().mean()}

    @torch.no_grad()
    def show(average, step):
        trained = StableDiffusion(sd.tokenizer, TINY.text, TINY.vae, TINY.unet, sd.latent_scale)
        for name, part in {**dict(sd.named_children()), **average}.items():
            setattr(trained, name, part)
        size = (TINY.resolution, TINY.resolution)
        images = generate(trained, [], [], unseen, size=size, guidance_scale=TINY.guidance_scale)
        save_grid(folder / f"{stage}.png", images[:8], images[8:])

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
    decoded, psnr = reconstruct(sd.vae, images)
    print(f"VAE: PSNR {psnr:.2f} dB on {len(images)} unseen scenes")
    settings = {"size": (TINY.resolution,) * 2, "steps": TINY.sampling_steps, "guidance_scale": TINY.guidance_scale}
    parts = range(0, len(captions), 32)
    samples = torch.cat([generate(sd, [], [], captions[i : i + 32], seed=i, **settings) for i in tqdm(parts)])
    judged = np.mean([judge(sample, caption) for sample, caption in zip(samples, captions)], axis=0)
    print("UNet: colour error {:.3f} (shape), {:.3f} (background), right shape {:.3f}".format(*judged))
    for label, pictures in {"true": images, "after the VAE": decoded, "painted": samples}.items():
        ragged = np.array([outline_error(picture) for picture in pictures])
        print(f"outlines, {label}: {ragged.mean():.3f} px from a true shape in the mean, "
              f"95th percentile {np.percentile(ragged, 95):.3f}")  # fmt: skip
    save_grid(TINY_FILE.parent / "samples.png", *samples[:64].split(16))
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
        stages[stage](args.output_dir)


if __name__ == "__main__":
    run_command_line(main)
