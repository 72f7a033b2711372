import shutil
from pathlib import Path

import pytest
from standin import CONFIGS, NANO, make_up_merges, stand_in

from clip_text import Tokenizer
from stable_diffusion import TINY_FILE, StableDiffusion
from support.diffusers_format import BETAS
from support.files import save_tensors
from support.sizes import config_metadata
from tools.versus_diffusers import base_models
from weights import DIFFUSERS, official_state_dict

FULL_SIZE_EXTRAS = {  # what real files hold beside the four parts
    "betas": (1000,),
    "alphas_cumprod": (1000,),
    "sqrt_one_minus_alphas_cumprod": (1000,),
    "model_ema.decay": (),
    "model_ema.diffusion_modelinput_blocks00weight": (8,),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
}


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    """A folder for large files, gone when the tests are."""
    folder = tmp_path_factory.mktemp("scratch")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def checkpoint(scratch):
    """checkpoint("small" or "sd15") -> a stand-in Stable Diffusion as one float32 file, merges.txt beside it.

    The full-size one has no metadata, like the real file: 1,130 tensors, the ignorable ones, 4.3 GB.
    """

    def make(size: str) -> Path:
        import torch

        path = scratch / size / "model.safetensors"
        if not path.exists():
            tensors, metadata = stand_in(size, "unet", "vae", "clip"), {}
            unet, vae, text = CONFIGS[size]
            path.parent.mkdir()
            tokenizer = make_up_merges(path.parent / "merges.txt", text.vocab_size)
            if size == "small":
                with torch.device("meta"):
                    metadata = config_metadata(StableDiffusion(tokenizer, text, vae, unet, 0.18215))
            else:
                assert len(tensors) == 1130
                tensors |= {name: torch.zeros(shape) for name, shape in FULL_SIZE_EXTRAS.items()}
            save_tensors(tensors, path, metadata)
        return path

    return make


@pytest.fixture(scope="session")
def nano(scratch):
    """The path of a complete Stable Diffusion of 125,000 weights, random but sane, which trains a step in some 50 ms.

    `--base FILE --resolution 64 --train-batch-size 2`, for example; its other defaults and its merges are the
    miniature's.
    """
    import torch

    path = scratch / "nano" / "nano.safetensors"
    path.parent.mkdir()
    merges = shutil.copy(TINY_FILE.parent / "merges.txt", path.parent)
    unet, vae, text = NANO
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sd = StableDiffusion(Tokenizer.from_merges(merges), text, vae, unet, latent_scale=1.0)
    tensors = {}
    for network in (sd.unet, sd.vae, sd.text_encoder):
        tensors |= official_state_dict(network)
    save_tensors(tensors, path, config_metadata(sd))
    return path


@pytest.fixture(scope="session")
def control_checkpoint(scratch):
    """control_checkpoint("small" or "sd15") -> a stand-in ControlNet in the official layout."""

    def make(size: str) -> Path:
        path = scratch / f"control-{size}.safetensors"
        if not path.exists():
            save_tensors(stand_in(size, "control"), path)
        return path

    return make


@pytest.fixture(scope="session")
def diffusers_base(checkpoint, scratch):
    """The small stand-in as a folder, loaded into diffusers' and transformers' classes and saved by them."""
    import diffusers

    sd = StableDiffusion.load(checkpoint("small"))
    unet, vae, text = CONFIGS["small"]
    folder = scratch / "diffusers"
    for name, model, ours in zip(
        ("unet", "vae", "text_encoder"), base_models(unet, vae, text, sd.latent_scale),
        (sd.unet, sd.vae, sd.text_encoder), strict=True,
    ):  # fmt: skip
        layouts, tensors = DIFFUSERS[type(ours)], model.state_dict()
        layout = next(layout for layout in layouts if layout.mark in tensors)
        state = {layout.theirs(name): tensor for name, tensor in ours.state_dict().items()}
        model.load_state_dict({key: tensor.reshape(tensors[key].shape) for key, tensor in state.items()})  # all of them
        model.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir()
    make_up_merges(folder / "tokenizer" / "merges.txt", text.vocab_size)
    diffusers.DDIMScheduler(**BETAS).save_pretrained(folder / "scheduler")
    return folder
