import json
import os
import shutil
import signal
from pathlib import Path

import support.command  # noqa: F401  before torch, so that the suite is not twenty times as slow beside another program

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch: two tests run at once

import pytest
import torch
from capture_page import served
from standin import CONFIGS, HINT_CHANNELS, JUMP, NANO, QUICK, STEPS, make_up_merges, run_main, stand_in

from clip_text import Tokenizer
from controlnet import ControlNet
from draw import SHIPPED
from formats.diffusers import BETAS, LAYOUTS
from formats.networks import config_metadata
from stable_diffusion import TINY_FILE, StableDiffusion
from support.errors import warn
from support.files import save_tensors
from tools.versus_diffusers import base_models
from weights import official_state_dict, save_controlnet

FULL_SIZE_EXTRAS = {  # what real files hold beside the four parts
    "betas": (1000,), "alphas_cumprod": (1000,), "model_ema.decay": (),
    "model_ema.diffusion_modelinput_blocks00weight": (8,),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
}  # fmt: skip


def pytest_collection_modifyitems(items):
    """A file's tests run in one process, as they share fixtures; those of full size in one, for their memory."""
    for item in items:
        group = "full size" if item.get_closest_marker("slow") else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def warnings_are_new():
    """What one test was warned of does not go unsaid in the next."""
    warn.cache_clear()


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
                tensors |= {name: torch.zeros(shape) for name, shape in FULL_SIZE_EXTRAS.items()}
            save_tensors(tensors, path, metadata)
        return path

    return make


@pytest.fixture(scope="session")
def quick(nano):
    """Options for a short training on `nano`."""
    return ["--base", nano, *QUICK]


@pytest.fixture(scope="session")
def trained_in(quick):
    """trained_in(folder, *options): a short training in this process. Its curves are drawn if they are looked at."""
    import train

    def run(folder: Path, *options, curves: bool = False) -> Path:
        with pytest.MonkeyPatch.context() as context:
            if not curves:
                context.setattr(train, "plot_convergence", lambda histories, path: path.touch())
            run_main(context, train, *quick, "--output-dir", folder, *options)
        return folder

    return run


@pytest.fixture(scope="session")
def four_steps(trained_in, scratch):
    """The folder of a finished run, with checkpoints at steps 2 and 4. Not to be changed."""
    return trained_in(scratch / "four-steps", "--checkpointing-steps", "2", "--max-train-steps", "4")


@pytest.fixture
def trained(trained_in, tmp_path):
    """trained(*options) -> the folder of a run with them, tmp_path / "run" if no other is given."""
    return lambda *options, folder=tmp_path / "run", **curves: trained_in(folder, *options, **curves)


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
def nano(scratch):
    """The path of a complete Stable Diffusion of 125,000 weights, random but sane, which trains a step in some 50 ms.

    `--base FILE --resolution 64 --train-batch-size 2`, for example; its other defaults and its merges are the
    miniature's.
    """
    path = scratch / "nano" / "nano.safetensors"
    path.parent.mkdir()
    merges = shutil.copy(TINY_FILE.parent / "merges.txt", path.parent)
    unet, vae, text = NANO
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sd = StableDiffusion(Tokenizer.from_merges(merges), text, vae, unet, latent_scale=1.0).requires_grad_(False)
        for parameter in sd.parameters():  # norms are not all ones and zeros
            parameter += 0.05 * torch.randn_like(parameter)
    networks = sd.unet, sd.vae, sd.text_encoder
    save_tensors({k: v for n in networks for k, v in official_state_dict(n).items()}, path, config_metadata(sd))
    return path


@pytest.fixture(scope="session")
def tiny():
    """The Stable Diffusion that ships here. Not to be changed."""
    return StableDiffusion.load("tiny").requires_grad_(False)


@pytest.fixture(scope="session")
def unet(nano):
    return StableDiffusion.load(nano).unet


@pytest.fixture(scope="session")
def controlnet(unet):
    """A ControlNet for the nano base, of which no two tensors are alike."""
    torch.manual_seed(0)
    made = ControlNet.from_unet(unet, HINT_CHANNELS).requires_grad_(False)
    for parameter in made.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return made


@pytest.fixture(scope="session")
def diffusers_base(nano, scratch):
    """The nano base as a folder, loaded into diffusers' and transformers' classes and saved by them."""
    import diffusers

    sd, folder = StableDiffusion.load(nano), scratch / "diffusers"
    models = base_models(*NANO, sd.latent_scale)
    networks = sd.unet, sd.vae, sd.text_encoder
    for name, model, ours in zip(("unet", "vae", "text_encoder"), models, networks, strict=True):
        tensors = model.state_dict()
        layout = next(layout for layout in LAYOUTS[type(ours)] if layout.mark in tensors)
        state = {layout.theirs(name): tensor for name, tensor in ours.state_dict().items()}
        model.load_state_dict({key: tensor.reshape(tensors[key].shape) for key, tensor in state.items()})  # all of them
        model.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir()
    shutil.copy(nano.parent / "merges.txt", folder / "tokenizer")
    diffusers.DDIMScheduler(**BETAS).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def snapshots(tiny, tmp_path_factory):
    """A run's folder as the page needs it: snapshots that jump, and a log."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text('{"base": "tiny", "resolution": 128}')
    untrained = ControlNet.from_unet(tiny.unet, tiny.preset.hint_channels)
    for step in STEPS:
        path = folder / "snapshots" / f"step-{step}.safetensors"
        save_controlnet(untrained, path, dtype=torch.float16)
        if step >= JUMP:
            shutil.copy(SHIPPED, path)
    entries = [{"step": step, "hint_sensitivity": 1e-6 * (step + 1), "followed": step / 40} for step in STEPS]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


@pytest.fixture(scope="session")
def server(snapshots, tmp_path_factory):
    """The page's address: behind a proxy that is not there, and with a folder for temporary files that stays empty."""
    folder = tmp_path_factory.mktemp("temporary")
    variables = {"http_proxy": "socks5://127.0.0.1:9", "TMPDIR": str(folder)}
    with open(folder.with_suffix(".log"), "w") as log, served(snapshots, log, **variables) as (address, process):
        yield address
        process.send_signal(signal.SIGHUP)
        assert process.wait(120) == -signal.SIGHUP
    assert "Traceback" not in folder.with_suffix(".log").read_text() and not [*folder.iterdir()]
