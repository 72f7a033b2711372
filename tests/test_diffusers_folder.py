"""Stable Diffusion as a folder in diffusers' layout, written by diffusers itself."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from standin import NANO, refusal, same_state

from stable_diffusion import StableDiffusion
from weights import load_controlnet

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(diffusers_base, tmp_path):
    """A copy of the folder, to be spoiled."""
    return shutil.copytree(diffusers_base, tmp_path / "copy")


def change(path, without=(), **settings):
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in without}))


def test_the_folder_is_the_file(diffusers_base, nano, capsys):
    """tools.verify finds that its numbers are diffusers' own (tests/test_verify.py)."""
    sd = StableDiffusion.load(diffusers_base)
    assert "warning" not in capsys.readouterr().err  # all that they write is known
    assert (sd.unet.config, sd.vae.config, sd.text_encoder.config, sd.latent_scale) == (*NANO, 1.0)
    assert same_state(sd, StableDiffusion.load(nano))


def test_old_names(copied, nano):
    """The VAE of Stable Diffusion 1.5's own folder has these, and files in fp16 are called so."""
    vae, text = copied / "vae" / WEIGHTS, copied / "text_encoder" / "model.safetensors"
    tensors = load_file(vae)
    for old, new in {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    vae.unlink()
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in load_file(text).items()}
    tensors |= {"embeddings.position_ids": torch.arange(77)[None], "text_projection.weight": torch.zeros(2, 2)}
    torch.save(tensors, text.with_name("pytorch_model.bin"))
    save_file({"no": torch.zeros(1)}, text.with_name("model.fp16.safetensors"))  # not where there is a whole one
    text.unlink()
    assert same_state(StableDiffusion.load(copied), StableDiffusion.load(nano))


SPOILED = [  # a file, a setting that replaces its own, what the line must say beside the setting's name and value
    ("unet/config.json", {"use_linear_projection": True}, "takes False alone"),
    ("unet/config.json", {"attention_head_dim": [5, 10, 20, 20]}, "num_heads is [5, 10, 20, 20], but must be a whole"),
    ("unet/config.json", {"norm_num_groups": 5}, "norm_groups is 5, but must be a whole number that divides 8, 8"),
    ("vae/config.json", {"shift_factor": 0.1}, "takes None alone"),
    ("vae/config.json", {"scaling_factor": "nan"}, "the scale of latents is 'nan': correct it"),
    ("text_encoder/config.json", {"num_attention_heads": 5}, "num_heads is 5, but"),
    ("text_encoder/config.json", {"hidden_act": "gelu"}, "takes 'quick_gelu' alone"),
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "takes 'epsilon' alone"),
]


@pytest.mark.parametrize("file, setting, fragment", SPOILED)
def test_settings_that_are_not_stable_diffusion_1(file, setting, fragment, copied):
    change(copied / file, **setting)
    told, ((name, value),) = refusal(StableDiffusion.load, copied), setting.items()
    assert fragment in told and (f"{name} is {value!r}, " if "alone" in fragment else "") in told
    assert told.startswith(str(copied / file.split("/")[0]))


def test_settings_that_are_missing_unknown_or_in_other_words(copied, unet, capsys):
    change(copied / "unet" / "config.json", some_new_option=3, another="x", off=False, _name="x", act_fn="silu",
           num_attention_heads=1, attention_head_dim=5)  # fmt: skip
    change(copied / "text_encoder" / "config.json", without=["num_attention_heads"])
    sd = StableDiffusion.load(copied)
    assert sd.unet.config == unet.config
    assert sd.text_encoder.config.num_heads == 8  # transformers' default; Stable Diffusion 1.5 has 12
    unknown = f"{copied / 'unet' / 'config.json'}: not known here, so ignored: some_new_option, another\n"
    assert capsys.readouterr().err == f"warning: {unknown}"
    (copied / "unet" / "config.json").unlink()
    assert "norm_groups is 32, but must" in refusal(StableDiffusion.load, copied)  # Stable Diffusion 1.5's
    change(copied / "scheduler" / "scheduler_config.json", without=["beta_schedule"])  # then it is diffusers' default
    assert "beta_schedule is 'linear'" in refusal(StableDiffusion.load, copied)


def test_the_tokenizer_of_transformers_5(copied):
    merges = (copied / "tokenizer" / "merges.txt").read_text().splitlines()[1:]
    (copied / "tokenizer" / "merges.txt").unlink()
    for pairs in (merges, [line.split() for line in merges]):
        (copied / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"merges": pairs}}))
        assert len(StableDiffusion.load(copied).tokenizer.ids) == NANO[2].vocab_size
    for content in ({"model": 3}, {"model": {"merges": [["a", "b", "c"], [1, 2]]}}):
        (copied / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
        assert "tokenizer.json" in refusal(StableDiffusion.load, copied)


def test_parts_that_are_missing(copied, unet):
    assert "has no unet/ in it" in refusal(StableDiffusion.load, copied / "unet")
    assert "is a base model's folder: pass it as the base" in refusal(load_controlnet, copied, unet)
    (copied / "vae" / WEIGHTS).rename(copied / "vae" / "other.safetensors")
    told = refusal(StableDiffusion.load, copied)
    assert f"no {WEIGHTS} in this folder; pass " in told and told.endswith(": other.safetensors")
