"""Files that are no base, no ControlNet or damaged: each is refused by name; a VAE, or a repository, of one's own."""

import json
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from standin import NANO, SAMPLE, equal, in_layout, refusal, run_main, same_state

import sample
from controlnet import ControlNet
from formats.diffusers import CONTROLNET_FILES, FILE
from formats.layouts import BARE, OFFICIAL
from formats.networks import LAYOUTS, read_tokenizer, sizes_in_metadata
from stable_diffusion import SD15_REPO, StableDiffusion
from support.files import read_tensors, save_tensors
from support.hub import locate
from unet import UNet
from weights import load_controlnet, load_official, official_state_dict, save_controlnet

DIFFUSERS = LAYOUTS[ControlNet][1]
UNET = "model.diffusion_model."
WRONG_BASES = [  # shapes of tensors, what the metadata says, what the line must say
    ({f"{UNET}label_emb.0.0.weight": (3,)}, {}, "[3] is no part of the model; .* SDXL or made for it"),
    ({f"{UNET}input_blocks.0.0.weight": (8, 9, 3, 3)}, {}, "an inpainting or InstructPix2Pix model"),
    ({f"{UNET}input_blocks.0.0.weight": (0, 4, 3, 3)}, {}, f"{UNET}input_blocks.0.0.weight has shape [0, 4, 3, 3]"),
    ({f"{UNET}input_blocks.4.0.out_layers.3.weight": (16, 8, 3, 3)}, {}, "has shape [8, 8, 3, 3], expected [16, 8, 3"),
    ({f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 1024)}, {}, "Stable Diffusion 2.x"),
    ({}, {"unet": 3}, "norm_groups is 32, but must be a whole number that divides 8"),  # of another program
    *[({}, {"unet": {"norm_groups": odd}}, f"norm_groups is {odd}, but") for odd in (7, True, {"a": []})],
    *[({}, {"latent_scale": scale}, "scale of latents is ") for scale in (0, "nan")],
]  # fmt: skip


@pytest.mark.parametrize("shapes, said, fragment", WRONG_BASES)
def test_wrong_base_is_named(shapes, said, fragment, nano, tmp_path):
    tensors, metadata = read_tensors(nano)
    config = {"config": json.dumps(json.loads(metadata["config"]) | said)}
    shutil.copy(nano.parent / "merges.txt", tmp_path)
    wrong = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_tensors(tensors | wrong, tmp_path / "a.safetensors", config)
    message = refusal(StableDiffusion.load, tmp_path / "a.safetensors")
    assert message.startswith(f"{tmp_path / 'a.safetensors'}: ")
    assert all(part in message for part in fragment.split(".* "))


def test_metadata_of_other_programs_says_nothing():
    for text in ("sd15", "[1]", '{"unet": 3}', "[" * 100_000):
        assert not any(sizes_in_metadata({"config": text}, UNet).values())


@pytest.mark.parametrize("layout", [OFFICIAL[ControlNet], BARE, DIFFUSERS])
def test_errors_call_a_tensor_what_its_file_calls_it(layout, controlnet, unet, tmp_path):
    path, good = tmp_path / "bad.safetensors", in_layout(controlnet, layout)
    name, hint = layout.theirs("encoder.11.resnet.conv2.bias"), layout.theirs("hint_encoder.0.weight")
    unknown = name.replace(".bias", ".extra")
    wrong = {
        f"{name} [8] is missing": {other: tensor for other, tensor in good.items() if other != name},
        f"{name} has shape [2], expected [8]": good | {name: torch.zeros(2)},
        f"{name} holds torch.int8 numbers, not weights": good | {name: torch.zeros(8, dtype=torch.int8)},
        f"{name} has NaN or infinity in it; such": good | {name: torch.tensor([0, -float("inf")] * 4).half()},
        f"{unknown} [2] is no part of the model": good | {unknown: torch.zeros(2)},
        f"{hint} takes 6 hint channels, only 3 are read": good | {hint: torch.zeros(4, 6, 3, 3)},
        f"{hint} has shape [4]": good | {hint: torch.zeros(4)},
    }
    for message, tensors in wrong.items():
        save_file(tensors, path)
        assert refusal(load_controlnet, path, unet).startswith(f"{path}: {message}")


def test_large_weights_in_half_precision_are_finite(unet):
    """Their sum would overflow in fp16."""
    tensors = {name: tensor.half() for name, tensor in official_state_dict(unet).items()}
    tensors["model.diffusion_model.out.2.weight"].fill_(60_000)
    with torch.device("meta"):
        copy = UNet(unet.config)
    load_official(copy, tensors)
    assert copy.conv_out.weight.max() == 60_000


WRONG_FILES = [  # shapes of tensors, what they are
    ({"lora_controlnet": ()}, "a Control-LoRA"),
    ({"adapter.body.0.block1.weight": (320, 256, 3, 3)}, "a T2I-Adapter"),
    ({"x.lora_up.weight": (4, 4)}, "a LoRA, which only modifies a base model"),
    ({"control_model.x": (4, 4), "ctrl_to_base.x": (4, 4)}, "a ControlNet-XS"),
    ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "add_embedding.linear_1.weight": (4, 4)}, "SDXL"),
    ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
      "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}, "Stable Diffusion 2.x"),
    ({"zero_convs.0.0.weight": (320, 320, 1, 1)}, "pass a whole ControlNet for Stable Diffusion 1.x"),
    ({"model.diffusion_model.out.2.bias": (4,)}, "a base model, not a ControlNet: pass it as the base"),
    ({"control_model.zero_convs.0.0.weight": (320, 320, 1, 1), "difference": (1,)}, "differences to a base's weights"),
]  # fmt: skip


def test_files_that_are_no_controlnet(unet, tmp_path):
    for shapes, kind in WRONG_FILES:
        save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
        assert kind in (told := refusal(load_controlnet, tmp_path / "a.safetensors", unet))
        assert "pass it as a ControlNet" not in told


def test_files_that_are_no_base(controlnet, nano, tmp_path):
    path, (tensors, metadata) = tmp_path / "a.safetensors", read_tensors(nano)
    for prefix in (UNET, "first_stage_model.", "cond_stage_model."):
        save_tensors({name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}, path)
        assert "with all of UNet, VAE and text encoder" in refusal(StableDiffusion.load, path)
    save_controlnet(controlnet, path)
    assert "not a base model: pass it as a ControlNet" in refusal(StableDiffusion.load, path)
    shutil.copy(nano.parent / "merges.txt", tmp_path)
    save_tensors({name.replace(".text_model.", "."): tensor for name, tensor in tensors.items()}, path, metadata)
    assert same_state(StableDiffusion.load(path), StableDiffusion.load(nano))  # old merges have these names


@pytest.mark.parametrize("form", ["of a trainer", "a whole base", "a folder"])
def test_a_vae_of_ones_own(form, nano, diffusers_base, tmp_path):
    """It is taken for the base's, which may lack one."""
    prefix, path, (tensors, metadata) = "first_stage_model.", tmp_path / "vae.safetensors", read_tensors(nano)
    other = {name: tensor + 0.125 * name.startswith(prefix) for name, tensor in tensors.items()}
    said = {"config": json.dumps(json.loads(metadata["config"]) | {"latent_scale": 0.5})}  # the base's counts
    if form == "a folder":
        path = shutil.copytree(diffusers_base / "vae", tmp_path / "vae")
        saved = {name: tensor + 0.125 for name, tensor in read_tensors(path / FILE)[0].items()}
        save_file(saved, path / FILE)
    elif form == "a whole base":
        save_tensors(other, path, said)
    else:
        alone = {name.removeprefix(prefix): tensor for name, tensor in other.items() if name.startswith(prefix)}
        save_tensors(alone | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}, path, said)
    base = tmp_path / "base.safetensors"
    save_tensors({name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}, base, metadata)
    shutil.copy(nano.parent / "merges.txt", tmp_path)
    assert "first_stage_model.encoder.conv_in.weight is missing" in refusal(StableDiffusion.load, base)
    sd, whole = StableDiffusion.load(base, path), StableDiffusion.load(nano)
    assert sd.latent_scale == whole.latent_scale == 1
    assert same_state(sd.unet, whole.unet) and same_state(sd.text_encoder, whole.text_encoder)
    assert equal(sd.vae.state_dict(), {name: tensor + 0.125 for name, tensor in whole.vae.state_dict().items()})
    assert same_state(StableDiffusion.load(diffusers_base, path).vae, sd.vae)


def test_two_decoders_are_refused(controlnet, nano, unet, tmp_path, monkeypatch):
    """What one decoder does is tested where it is trained."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save_controlnet(controlnet, path, metadata={"unlock_decoder": "true"})
    options = ["--base", nano, "--controlnet", paths[0], "--controlnet", paths[1]]
    options += ["--hint", SAMPLE / "source" / "0.png"] * 2
    assert "bring a decoder of their own" in refusal(run_main, monkeypatch, sample, *options)
    other = UNet(replace(NANO[0], num_heads=2))
    assert "copied from a base with num_heads 1, this one has 2" in refusal(load_controlnet, paths[0], other)


def test_repositories(controlnet, nano, monkeypatch, tmp_path):
    """Of owner/repo the files in diffusers' layout are fetched, of "sd15" its file, and its merges if none are near."""
    asked, stored = [], {"v1-5-pruned-emaonly.safetensors": nano, "tokenizer/merges.txt": nano.parent / "merges.txt"}
    for name, stand_in_for in {
        "try_to_load_from_cache": lambda repo, file: str(tmp_path / "cached") if file == "cached" else None,
        "hf_hub_download": lambda repo, file: asked.append((repo, file)) or str(stored[file]),
        "snapshot_download": lambda repo, allow_patterns: asked.append((repo, allow_patterns)) or str(tmp_path / "a"),
    }.items():
        monkeypatch.setattr(huggingface_hub, name, stand_in_for)
    save_controlnet(controlnet, tmp_path / "a", layout="diffusers")
    assert locate("owner/sd-controlnet-canny", CONTROLNET_FILES, "") == tmp_path / "a"
    assert locate("owner/repo:cached", [], "") == tmp_path / "cached"
    assert asked == [("owner/sd-controlnet-canny", CONTROLNET_FILES)]
    (tmp_path / "a" / FILE).unlink()
    assert "owner/ControlNet-v1-1:FILE" in refusal(locate, "owner/ControlNet-v1-1", CONTROLNET_FILES, "")
    assert StableDiffusion.load("sd15").unet.config == NANO[0]
    assert len(read_tokenizer(tmp_path / "alone.safetensors", 866, SD15_REPO).ids) == 866
    assert asked[2:] == [(SD15_REPO, file) for file in stored]
    assert "put the merges.txt that belongs to it" in refusal(read_tokenizer, tmp_path / "alone", 867, SD15_REPO)
    stored.clear()
    message = refusal(StableDiffusion.load, "sd15")
    assert all(part in message for part in (*asked[2], "--base FILE"))
