"""Stable Diffusion as a folder in diffusers' layout, written by diffusers itself."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from standin import CONFIGS, deviation, golden, make_up_merges, same_state

from stable_diffusion import StableDiffusion
from support.diffusers_format import text_settings, unet_settings, vae_settings
from support.errors import UserError
from weights import DIFFUSERS, load_controlnet


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """The small stand-in, loaded into diffusers' and transformers' classes and saved by them."""
    import diffusers
    import transformers

    sd = StableDiffusion.load(checkpoint("small"))
    unet, vae, text = CONFIGS["small"]
    theirs = {
        "unet": diffusers.UNet2DConditionModel.from_config(unet_settings(unet)),
        "vae": diffusers.AutoencoderKL.from_config(vae_settings(vae, sd.latent_scale)),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**text_settings(text))),
    }
    folder = tmp_path_factory.mktemp("base")
    for (name, model), ours in zip(theirs.items(), (sd.unet, sd.vae, sd.text_encoder), strict=True):
        layouts, tensors = DIFFUSERS[type(ours)], model.state_dict()
        layout = next(layout for layout in layouts if layout.mark in tensors)
        state = {layout.theirs(name): tensor for name, tensor in ours.state_dict().items()}
        used = {key: tensor.reshape(tensors[key].shape) for key, tensor in state.items()}  # 1x1 convolutions there
        assert used.keys() == tensors.keys() - {f"{layout.prefix}embeddings.position_ids"}
        model.load_state_dict(used, strict=False)
        model.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir()
    make_up_merges(folder / "tokenizer" / "merges.txt", text.vocab_size)
    diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the folder, to be spoiled."""
    return shutil.copytree(folder, tmp_path / "copy")


def change(path, **settings):
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps(content))


def rename(path, **names):
    """Rename parts of tensor names."""
    tensors = load_file(path)
    for old, new in names.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, path)


def test_the_folder_is_the_file(folder, checkpoint):
    a, b = StableDiffusion.load(folder), StableDiffusion.load(checkpoint("small"))
    assert (a.unet.config, a.vae.config, a.text_encoder.config) == CONFIGS["small"]
    assert a.latent_scale == b.latent_scale == 0.18215
    assert same_state(a, b)


@torch.no_grad()
def test_the_numbers_are_diffusers_own(folder):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    sd, arrays = StableDiffusion.load(folder), golden("small")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
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
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    text.unlink()
    assert same_state(StableDiffusion.load(copied), StableDiffusion.load(checkpoint("small")))


SPOILED = [  # a file, settings that replace its own, what the line must say
    ("unet/config.json", {"use_linear_projection": True}, "use_linear_projection is True"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
    ("unet/config.json", {"attention_head_dim": [5, 10, 20, 20]}, "attention_head_dim is [5, 10, 20, 20]"),
    ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "a UNet3DConditionModel, not a UNet2DConditionModel"),
    ("unet/config.json", {"some_new_option": 3}, "some_new_option is 3, which this program does not know"),
    ("vae/config.json", {"shift_factor": 0.1}, "shift_factor is 0.1"),
    ("vae/config.json", {"scaling_factor": 0}, "make no model"),
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
