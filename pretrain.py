"""How the shipped miniature was made: a Stable Diffusion trained from nothing on a world of coloured shapes.

`python pretrain.py` runs all stages (merges, vae, text, unet) and writes models/tiny; `python pretrain.py vae` runs
one. A stage that was stopped goes on where it was.
"""

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from clip_text import CLIPTextModel, Tokenizer, byte_symbols, split_words
from data import COLOURS, draw_scene
from diffusion import NoiseSchedule, ddim, denoising_loss, guided_noise
from errors import ArgumentParser, run
from stable_diffusion import TINY, TINY_FILE, StableDiffusion, config_metadata
from train import load_optimizer_tensors, optimizer_tensors
from unet import ResBlock, UNet
from vae import AutoencoderKL, Downsample, SpatialAttention, Upsample
from weights import official_state_dict, read_tensors, save_tensors, write_atomically

SHAPES = ("circle", "square", "triangle")
SEED = 0
TRAIN, UNSEEN = 1, 2  # streams of scenes
STEPS = {"vae": 4000, "text": 400, "unet": 8000}
CHECKPOINT_EVERY = 200
EMPTY_PROMPTS = 0.1  # so that the UNet knows both sides of guidance
LATENTS = 12_000  # scenes that the UNet is trained on


def draw_batch(stream: int, indices: range | list[int], size: int) -> tuple[Tensor, list[str]]:
    """Scenes of one stream as images [B, 3, size, size] in [-1, 1], and their captions."""
    scenes = [draw_scene(np.random.default_rng([SEED, stream, size, i]), size, SHAPES) for i in indices]
    images = torch.from_numpy(np.stack([np.asarray(target) for _, target, _ in scenes]))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1, [caption for _, _, caption in scenes]


# ---------------------------------------------------------------------------------------------------------------
# merges: byte-pair encoding, learned on the captions


def learn_merges(folder: Path) -> None:
    """Join the commonest pair of symbols again and again until every word of the captions is one token."""
    captions = [f"{a} {shape} with {b} background" for a in COLOURS for b in COLOURS for shape in SHAPES]
    counts = Counter(word for caption in captions for word in split_words(caption))
    symbols = byte_symbols()
    words = {word: [symbols[b] for b in word.encode()] for word in counts}
    for parts in words.values():
        parts[-1] += "</w>"
    merges = []
    while any(len(parts) > 1 for parts in words.values()):
        pairs = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, parts in words.items():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
    text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    write_atomically(folder / "merges.txt", lambda path: path.write_text(text, encoding="utf-8"))
    print(f"{len(merges)} merges, {len(Tokenizer(merges).ids)} tokens")


# ---------------------------------------------------------------------------------------------------------------
# The loop that the three networks share


def fit(stage: str, folder: Path, module: nn.Module, groups: list[dict], loss_fn, show) -> nn.Module:
    """Train `module` for the stage's steps; returns the running average of its weights, which is what ships.

    loss_fn(step, generator) -> (loss, values for the log). All randomness of a step comes from its generator, so a
    resumed run goes on as if it had not stopped.
    """
    steps, path = STEPS[stage], folder / f"{stage}.safetensors"
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    start = 0
    if path.exists():
        tensors, metadata = read_tensors(path)
        start = int(metadata["step"])
        average.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("average.")})
        module.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("module.")})
        load_optimizer_tensors(optimizer, tensors)
        print(f"{stage}: going on at step {start}")

    def save(step: int) -> None:
        tensors = {f"average.{k}": v for k, v in average.state_dict().items()}
        tensors |= {f"module.{k}": v for k, v in module.state_dict().items()} | optimizer_tensors(optimizer)
        save_tensors({k: v.clone() for k, v in tensors.items()}, path, {"step": str(step)})

    began = time.time()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage)
    with open(folder / f"{stage}.jsonl", "a") as log:
        for step in bar:
            rate = min(1.0, (step + 1) / 50) * min(1.0, 2 * (1 - step / steps) + 0.01)  # constant, then down to 0
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = rate * peak
            loss, values = loss_fn(step, torch.Generator().manual_seed(SEED + step))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(module)
            if step % 20 == 0:
                entry = {"step": step, "loss": loss.item()} | {k: float(v) for k, v in values.items()}
                log.write(json.dumps(entry | {"seconds": round(time.time() - began, 1)}) + "\n")
                log.flush()
                bar.set_postfix({k: f"{v:.4f}" for k, v in entry.items() if k != "step"})
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
                save(step + 1)
                show(average.module, step + 1)
    return average.module


def save_grid(path: Path, *rows: Tensor) -> None:
    """Rows of images [N, 3, H, W] in [-1, 1] as one picture."""
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    write_atomically(path, lambda temporary: Image.fromarray(pixels).save(temporary))


# ---------------------------------------------------------------------------------------------------------------
# vae


def pass_colours_through(vae: AutoencoderKL) -> None:
    """Start as a nearly linear map that keeps colours, instead of one that has to find them again.

    A group norm divides by its group's spread, so flat colours, which are all that this world has, would survive
    only as relations between channels. Here ResBlocks and attention start as identities, resamplers and 1x1
    convolutions pass channels on, and random biases at the entrances give each group a spread that does not depend
    on the picture. It reaches in one minute what the ordinary initialisation did not in twenty.
    """
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if isinstance(module.shortcut, nn.Conv2d):
                nn.init.orthogonal_(module.shortcut.weight)
        elif isinstance(module, SpatialAttention):
            nn.init.zeros_(module.to_out.weight)
            nn.init.zeros_(module.to_out.bias)
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


def train_vae(folder: Path) -> None:
    torch.manual_seed(SEED)
    vae = AutoencoderKL(TINY.vae).to(memory_format=torch.channels_last)
    pass_colours_through(vae)
    unseen, _ = draw_batch(UNSEEN, range(64), TINY.resolution)

    def loss_fn(step, generator):
        # Small scenes first: the same edges and colours at a sixteenth of the work.
        size = 32 if step < 0.35 * STEPS["vae"] else 64 if step < 0.85 * STEPS["vae"] else 128
        images, _ = draw_batch(TRAIN, range(16 * step, 16 * step + 16), size)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encode(images).float()
            mean, log_variance = moments[:, :4], moments[:, 4:].clamp(-30, 20)
            z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator)
            error = vae.decode(z).float() - images
        pixels = error.abs().mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / images.numel()
        loss = pixels + 0.5 * error.square().mean() + min(1.0, step / 300) * edges + 2e-4 * kl
        return loss, {"pixels": pixels.detach(), "edges": edges.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def show(average, step):
        decoded = torch.cat([average.decode(average.encode(part)[:, :4]) for part in unseen.split(16)]).clamp(-1, 1)
        psnr = -10 * torch.log10(((decoded - unseen) / 2).square().mean((1, 2, 3))).mean()
        tqdm.write(f"vae step {step}: PSNR {psnr:.2f} dB on {len(unseen)} unseen pictures")
        save_grid(folder / "vae.png", unseen[:8], decoded[:8])

    fit("vae", folder, vae, [{"params": vae.parameters(), "lr": 1e-3}], loss_fn, show)
