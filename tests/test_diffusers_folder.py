"""Stable Diffusion as a folder in diffusers' layout, written by diffusers itself."""

import json
import shutil

from support.errors import UserError

import pytest
import torch
from safetensors.torch import load_file, save_file
from standin import CONFIGS, deviation, golden, same_state

from stable_diffusion import StableDiffusion
from weights import load_controlnet


@pytest.fixture
def copied(diffusers_base, tmp_path):
    """A copy of the folder, to be spoiled."""
    return shutil.copytree(diffusers_base, tmp_path / "copy")


def change(path, **settings):
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps(content))


def rename(path, **names):
    """Rename parts of tensor names."""
    tensors = load_file(path)
    for old, new in names.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, path)


def test_the_folder_is_the_file(diffusers_base, checkpoint):
    a, b = StableDiffusion.load(diffusers_base), StableDiffusion.load(checkpoint("small"))
    assert (a.unet.config, a.vae.config, a.text_encoder.config) == CONFIGS["small"]
    assert a.latent_scale == b.latent_scale == 0.18215
    assert same_state(a, b)


@torch.no_grad()
def test_the_numbers_are_diffusers_own(diffusers_base):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    sd, arrays = StableDiffusion.load(diffusers_base), golden("small")
    unet = UNet2DConditionModel.from_pretrained(diffusers_base / "unet")
    vae = AutoencoderKL.from_pretrained(diffusers_base / "vae")
    text = CLIPTextModel.from_pretrained(diffusers_base / "text_encoder")
    x, t, context = arrays["x"], arrays["t"], arrays["text"]
    ids = sd.tokenizer(["a", "some more words"])
    image = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    pairs = {
        "unet": (sd.unet(x, t, context), unet(x, t, context).sample),
        "encoder": (sd.vae.encode(image), vae.encode(image).latent_dist.parameters),
        "decoder": (sd.vae.decode(x[:1]), vae.decode(x[:1]).sample),
        "text": (sd.text_encoder(ids), text(ids).last_hidden_state),
    }
    for name, (ours, theirs) in pairs.items():
        assert deviation(ours, theirs) <= 1e-4, name


def test_old_names(copied, checkpoint):
    """The VAE of Stable Diffusion 1.5's own folder has these, and files in fp16 are called so."""
    vae, text = copied / "vae" / "diffusion_pytorch_model.safetensors", copied / "text_encoder" / "model.safetensors"
    rename(vae, **{".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."})
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in load_file(text).items()}
    save_file(tensors | {"embeddings.position_ids": torch.arange(77)[None]}, text)
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    save_file(load_file(text), text.with_name("model.fp16.safetensors"))  # not looked at where there is a whole one
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    text.unlink()
    assert same_state(StableDiffusion.load(copied), StableDiffusion.load(checkpoint("small")))


SPOILED = [  # a file, settings that replace its own, what the line must say
    ("unet/config.json", {"use_linear_projection": True}, "use_linear_projection is True"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
    ("unet/config.json", {"attention_head_dim": [5, 10, 20, 20]}, "attention_head_dim is [5, 10, 20, 20]"),
    (
        "unet/config.json",
        {"_class_name": "UNet3DConditionModel"},
        "UNet3DConditionModel, not UNet2DConditionModel",
    ),
    ("unet/config.json", {"some_new_option": 3}, "some_new_option is 3, which this program lacks"),
    ("vae/config.json", {"shift_factor": 0.1}, "shift_factor is 0.1"),
    ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0: correct it"),
    ("vae/config.json", {"scaling_factor": None}, "scaling_factor is None: correct it"),
    ("unet/config.json", {"attention_head_dim": 5}, "32 channels make no 5 heads"),
    ("unet/config.json", {"attention_head_dim": -4}, "attention_head_dim is -4, but must be a whole number above 0"),
    ("unet/config.json", {"norm_num_groups": True}, "norm_num_groups is True, but must be"),
    ("text_encoder/config.json", {"num_attention_heads": 5}, "48 channels make no 5 heads"),
    (
        "scheduler/scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        "another diffusion process",
    ),
    ("vae/config.json", {"norm_num_groups": 5}, "make no model"),
    ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
]


@pytest.mark.parametrize("file, settings, fragment", SPOILED)
def test_settings_that_are_not_stable_diffusion_1(file, settings, fragment, copied):
    change(copied / file, **settings)
    with pytest.raises(UserError) as raised:
        StableDiffusion.load(copied)
    assert fragment in str(raised.value) and "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(copied))


def test_settings_in_other_words(copied, checkpoint):
    """A list for all levels, 4.0 for 4, SiLU's other name, and what transformers adds."""
    change(copied / "unet" / "config.json", attention_head_dim=[4, 4, 4, 4], layers_per_block=[2] * 4, act_fn="swish")
    change(copied / "vae" / "config.json", norm_num_groups=32.0)
    change(copied / "text_encoder" / "config.json", use_cache=True, tie_word_embeddings=True)
    assert StableDiffusion.load(copied).unet.config == StableDiffusion.load(checkpoint("small")).unet.config


@pytest.mark.parametrize("name", ["beta_start", "beta_schedule"])
def test_a_scheduler_that_does_not_say(name, copied):
    """Then it is diffusers' default, which is not Stable Diffusion's."""
    path = copied / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))
    with pytest.raises(UserError, match=f"{name} is"):
        StableDiffusion.load(copied)


def test_missing_heads_are_those_of_the_library(copied):
    """8 in transformers, 12 in Stable Diffusion 1.5; 8 in diffusers, where a ControlNet's base may have others."""
    path = copied / "text_encoder" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "num_attention_heads"}))
    assert StableDiffusion.load(copied).text_encoder.config.num_heads == 8


def test_the_tokenizer_of_transformers_5(copied):
    merges = (copied / "tokenizer" / "merges.txt").read_text().splitlines()[1:]
    (copied / "tokenizer" / "merges.txt").unlink()
    for pairs in (merges, [line.split() for line in merges]):
        (copied / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"merges": pairs}}))
        assert len(StableDiffusion.load(copied).tokenizer.ids) == 600


def test_settings_may_be_missing(copied, checkpoint):
    """Then they are Stable Diffusion 1.5's: 8 heads, where the stand-in has 4."""
    for config in copied.glob("*/*config.json"):
        config.unlink()
    sd = StableDiffusion.load(copied)
    assert sd.unet.config.num_heads == 8 and sd.unet.config.context_dim == CONFIGS["small"][0].context_dim


def test_parts_that_are_missing(copied, control_checkpoint):
    shutil.move(copied / "vae", copied.parent / "vae")
    with pytest.raises(UserError, match=r"has no vae/ in it"):
        StableDiffusion.load(copied)
    with pytest.raises(UserError, match="has no unet/ in it"):
        StableDiffusion.load(copied / "unet")
    with pytest.raises(UserError, match="is a base model's folder: pass it as the base"):
        load_controlnet(copied, StableDiffusion.load("tiny").unet)
    shutil.move(copied.parent / "vae", copied / "vae")
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    (copied / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="split over several files"):
        StableDiffusion.load(copied)
