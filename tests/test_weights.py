"""Names in both directions, the layouts of other programs, and what a file that does not fit says."""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

from support.errors import UserError

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from standin import (
    CONFIGS,
    MANIFEST,
    HostilePickle,
    deviation,
    golden,
    make_up_merges,
    run_main,
    same_tensors,
    small_unet,
    stand_in,
)

from clip_text import CLIPTextModel
from controlnet import HINT_CHANNELS, ControlNet
from stable_diffusion import SD15_REPO, TINY_FILE, StableDiffusion
from support.diffusers_format import CONTROLNET_FILES, controlnet_settings
from support.diffusers_format import FILE as DIFFUSERS_FILE
from support.files import read_tensors
from support.formats import Layout, pattern
from support.hub import fetch, locate
from support.sizes import read_sizes, read_tokenizer
from tools import convert
from unet import UNet
from vae import AutoencoderKL
from weights import BARE, DIFFUSERS, OFFICIAL, load_controlnet, load_official, official_state_dict, save_controlnet

SD15_FILE = "v1-5-pruned-emaonly.safetensors"


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return equal(a.state_dict(), b.state_dict())


# ---------------------------------------------------------------------------------------------------------------
# Names


def networks(size: str) -> dict[str, torch.nn.Module]:
    """All networks of a size by their names in the manifest, without memory."""
    unet, vae, text = CONFIGS[size]
    with torch.device("meta"):
        return {
            "unet": UNet(unet),
            "control": ControlNet.from_unet(UNet(unet)),
            "vae": AutoencoderKL(vae),
            "clip": CLIPTextModel(text),
        }


@pytest.mark.parametrize("size", CONFIGS)
def test_names_are_the_official_ones(size):
    counts = {"unet": 686, "control": 340, "vae": 248, "clip": 196 if size == "sd15" else 52}
    for part, module in networks(size).items():
        official = official_state_dict(module)
        assert len(official) == len(module.state_dict()) == counts[part]
        assert {name: list(tensor.shape) for name, tensor in official.items()} == MANIFEST[size][part]


def test_every_rule_table_reads_both_ways():
    """At SD 1.5's size each name fits exactly one rule in either direction, and comes back as it went."""
    modules = networks("sd15")
    tables = [(module, OFFICIAL[type(module)]) for module in modules.values()]
    tables += [(modules["control"], BARE)]
    tables += [(module, layout) for module in modules.values() for layout in DIFFUSERS[type(module)]]
    for module, layout in tables:
        for ours in module.state_dict():
            theirs = layout.theirs(ours)
            assert layout.ours(theirs) == ours
            names = (ours.rpartition(".")[0], theirs.removeprefix(layout.prefix).rpartition(".")[0])
            for side, name in enumerate(names):
                fitting = [rule for rule in layout.rules if pattern(rule[side]).fullmatch(name)]
                assert len(fitting) == 1, (name, fitting)


def test_names_without_a_rule_stay_and_count_as_unknown():
    layout = OFFICIAL[UNet]
    for name in ("model.diffusion_model.label_emb.0.0.weight", "model.diffusion_model.output_blocks.2.2.conv.weight"):
        assert layout.theirs(layout.ours(name)) == name
        assert layout.ours(name) not in networks("small")["unet"].state_dict()


def test_sizes_are_read_off_shapes():
    """SD 1.5's files have no metadata of ours."""
    shapes = {name: shape for part in ("unet", "vae", "clip") for name, shape in MANIFEST["sd15"][part].items()}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    parts = [OFFICIAL[network].pick(tensors, "file") for network in (UNet, AutoencoderKL, CLIPTextModel)]
    sizes = read_sizes("file", {}, parts)
    assert (sizes["unet"], sizes["vae"], sizes["text"]) == CONFIGS["sd15"]


def test_loading_and_writing_are_inverse():
    assert equal(official_state_dict(small_unet()), stand_in("small", "unet"))


def test_loading_copies_into_real_parameters_and_shares_with_meta_ones():
    tensors, name = stand_in("small", "unet"), "model.diffusion_model.out.2.weight"
    unet = UNet(CONFIGS["small"][0])
    parameter = unet.conv_out.weight
    load_official(unet, tensors)
    assert unet.conv_out.weight is parameter
    parameter.data.zero_()
    assert tensors[name].count_nonzero() > 0
    shapes = networks("small")["unet"]
    load_official(shapes, tensors)
    assert shapes.conv_out.weight.data_ptr() == tensors[name].data_ptr()


# ---------------------------------------------------------------------------------------------------------------
# ControlNet's layouts


@pytest.fixture
def controlnet(control_checkpoint):
    return load_controlnet(control_checkpoint("small"), small_unet()).requires_grad_(False)


def renamed(module: torch.nn.Module, layout: Layout) -> dict:
    return {layout.theirs(name): tensor for name, tensor in module.state_dict().items()}


def test_controlnet_layouts_round_trip(controlnet, tmp_path):
    unet, official = small_unet(), stand_in("small", "control")
    in_all_of_sd = official | stand_in("small", "unet", "vae", "clip")  # as ControlNet 1.0 was released
    for tensors in (renamed(controlnet, BARE), in_all_of_sd):
        save_file(tensors, tmp_path / "in.safetensors")
        torch.save({"state_dict": tensors}, tmp_path / "in.pth")
        for name in ("in.safetensors", "in.pth"):
            assert same_weights(load_controlnet(tmp_path / name, unet), controlnet)
    save_controlnet(controlnet, tmp_path / "out.safetensors")
    written, _ = read_tensors(tmp_path / "out.safetensors")
    assert written.keys() == official.keys()
    save_controlnet(controlnet, tmp_path / "folder", layout="diffusers")
    for path in (tmp_path / "out.safetensors", tmp_path / "folder", tmp_path / "folder" / DIFFUSERS_FILE):
        assert same_weights(load_controlnet(path, unet), controlnet)


def test_lite_keeps_our_names_and_has_no_other_layout(tmp_path):
    unet, path = small_unet(), tmp_path / "lite.safetensors"
    lite = ControlNet.from_unet(unet, hint_channels=(8, 16, 24, 32), copy="lite")
    decoder = {"model.diffusion_model.out.2.bias": torch.ones(4)}
    save_controlnet(lite, path, others=decoder)
    tensors, metadata = read_tensors(path)
    assert metadata["copy"] == "lite" and tensors.keys() == lite.state_dict().keys() | decoder.keys()
    assert same_weights(load_controlnet(path, unet), lite)
    with pytest.raises(UserError, match="no diffusers layout"):
        save_controlnet(lite, tmp_path / "folder", layout="diffusers")


def test_diffusers_reads_ours_and_we_read_theirs(controlnet, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from diffusers import ControlNetModel

    arrays = golden("small")
    ours = controlnet(arrays["x"], arrays["hint"], arrays["t"], arrays["text"])
    save_controlnet(controlnet, tmp_path / "folder", layout="diffusers")
    decoder = {k: v for k, v in official_state_dict(small_unet()).items() if ".output_blocks." in k or ".out." in k}
    save_controlnet(controlnet, tmp_path / "single.safetensors", others=decoder)  # as train.py --unlock-decoder
    from_folder = ControlNetModel.from_pretrained(tmp_path / "folder")
    from_file = ControlNetModel.from_single_file(
        str(tmp_path / "single.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
    )
    for model in (from_folder, from_file):
        with torch.no_grad():
            down, middle = model(arrays["x"], arrays["t"], arrays["text"], arrays["hint"], return_dict=False)
        assert max(deviation(a, b) for a, b in zip(ours, [*down, middle], strict=True)) <= 1e-4
    from_folder.save_pretrained(tmp_path / "theirs")
    assert same_weights(load_controlnet(tmp_path / "theirs", small_unet()), controlnet)


def test_converting_there_and_back(controlnet, tmp_path, monkeypatch, capsys):
    """Tensor by tensor; the sizes that no shape shows go along in the metadata and in config.json."""
    first, folder = tmp_path / "first.safetensors", tmp_path / "folder"
    back, half = tmp_path / "back.safetensors", tmp_path / "half"
    save_controlnet(controlnet, first, metadata={"license": "x"})
    run_main(monkeypatch, convert, first, folder, "--layout", "diffusers")
    run_main(monkeypatch, convert, folder, back, "--layout", "official")
    run_main(monkeypatch, convert, back, half, "--layout", "diffusers", "--dtype", "fp16")
    assert f"{folder}: ControlNet in the diffusers layout, 340 tensors" in capsys.readouterr().out
    (original, metadata), (returned, _) = read_tensors(first), read_tensors(back)
    assert metadata["license"] == "x"
    assert equal(original, returned)
    (theirs, _), (halves, _) = read_tensors(folder / DIFFUSERS_FILE), read_tensors(half / DIFFUSERS_FILE)
    assert equal({name: tensor.half() for name, tensor in theirs.items()}, halves)
    for path in (folder, half):
        assert json.loads((path / "config.json").read_text()) == controlnet_settings(controlnet.config, HINT_CHANNELS)


def test_converting_keeps_a_trained_decoder_or_says_so(controlnet, tmp_path, monkeypatch, capsys):
    decoder = {"model.diffusion_model.out.2.bias": torch.ones(4)}
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_controlnet(controlnet, first, metadata={"unlock_decoder": "true"}, others=decoder)
    run_main(monkeypatch, convert, first, second, "--layout", "official")
    assert capsys.readouterr().err == ""
    assert same_tensors(first, second)
    run_main(monkeypatch, convert, first, tmp_path / "folder", "--layout", "diffusers")
    assert "the decoder that was trained with it stays behind" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------
# Files that don't fit. What fails before a tensor is compared, tests/test_errors.py has.


UNET = "model.diffusion_model."
NO_SIZES = {"config": json.dumps({"unet": 3})}
NO_MODEL = {
    "config": json.dumps({"unet": {"norm_groups": 7}, "vae": {}, "text": {"vocab_size": 600}, "latent_scale": 1})
}
WRONG_BASES = [  # shapes of tensors, the metadata, what the line must say
    ({f"{UNET}label_emb.0.0.weight": (3,)}, {}, f"{UNET}label_emb.0.0.weight [3] is no part of the model"),
    ({f"{UNET}input_blocks.12.0.op.bias": (3,)}, {}, f"{UNET}input_blocks.12.0.op.bias [3] is no part of the model"),
    ({f"{UNET}input_blocks.0.0.weight": (32, 9, 3, 3)}, {}, "an inpainting or InstructPix2Pix model"),
    ({f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, 1024)}, {}, "Stable Diffusion 2.x"),
    ({}, NO_SIZES, "make no model"),
    ({}, NO_MODEL, "make no model"),
]


@pytest.mark.parametrize("shapes, metadata, fragment", WRONG_BASES)
def test_wrong_base_is_named(shapes, metadata, fragment, tmp_path):
    wrong = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(stand_in("small", "unet", "vae", "clip") | wrong, tmp_path / "bad.safetensors", metadata)
    make_up_merges(tmp_path / "merges.txt", vocab_size=600)
    with pytest.raises(UserError) as raised:
        StableDiffusion.load(tmp_path / "bad.safetensors")
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'bad.safetensors'}: ") and "\n" not in message
    assert fragment in message


NAMES_IN_FILES = [
    (OFFICIAL[ControlNet], "control_model.input_blocks.11.0.out_layers.3.bias"),
    (BARE, "input_blocks.11.0.out_layers.3.bias"),
    (DIFFUSERS[ControlNet][0], "down_blocks.3.resnets.1.conv2.bias"),
]


@pytest.mark.parametrize("layout, name", NAMES_IN_FILES)
def test_errors_call_a_tensor_what_its_file_calls_it(layout, name, controlnet, tmp_path):
    path, unet, good = tmp_path / "bad.safetensors", small_unet(), renamed(controlnet, layout)
    unknown = name.replace(".bias", ".extra")
    wrong = {
        f"{name} [128] is missing": {other: tensor for other, tensor in good.items() if other != name},
        f"{name} has shape [2], expected [128]": good | {name: torch.zeros(2)},
        f"{unknown} [2] is no part of the model": good | {unknown: torch.zeros(2)},
    }
    for message, tensors in wrong.items():
        save_file(tensors, path)
        with pytest.raises(UserError) as raised:
            load_controlnet(path, unet)
        assert str(raised.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_objects_are_not_built(legacy, tmp_path):
    path, trap = tmp_path / "bad.ckpt", tmp_path / "trap"
    content = {"state_dict": {"a": torch.zeros(2)}, "callback": HostilePickle(trap)}
    if legacy:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    for load in (StableDiffusion.load, lambda path: load_controlnet(path, small_unet())):
        with pytest.raises(UserError, match=r"can run code: use its \.safetensors version"):
            load(path)
    assert not trap.exists()


# ---------------------------------------------------------------------------------------------------------------
# Download, against a stand-in for the hub


@pytest.fixture
def hub(monkeypatch, checkpoint):
    """A hub with the files of a small SD 1.5, nothing cached. Returns what has been asked of it, and the files."""
    small, asked = checkpoint("small"), []
    stored = {SD15_FILE: small, "tokenizer/merges.txt": small.parent / "merges.txt"}

    def download(repo, file):
        asked.append((repo, file))
        if file not in stored:
            raise LocalEntryNotFoundError("no connection\nand more lines")
        return str(stored[file])

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked, stored


def test_files_come_from_here_the_cache_or_the_hub(hub, monkeypatch, tmp_path):
    asked, stored = hub
    assert locate(tmp_path / "local.safetensors", [], "") == tmp_path / "local.safetensors"
    assert asked == []
    assert locate(f"owner/repo.name:{SD15_FILE}", [], "") == stored[SD15_FILE]
    assert asked == [("owner/repo.name", SD15_FILE)]
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: str(tmp_path / "cached"))
    assert fetch("owner/repo.name", SD15_FILE, "") == tmp_path / "cached"
    assert len(asked) == 1


def test_offline_names_repository_file_and_way_out(hub):
    asked, stored = hub
    stored.clear()
    with pytest.raises(UserError) as raised:
        StableDiffusion.load("sd15")
    message = str(raised.value)
    assert "\n" not in message
    for part in (SD15_REPO, SD15_FILE, "--base FILE"):
        assert part in message


def test_sd15_fetches_weights_and_merges(hub, tmp_path):
    """The stand-in's merges lie beside it; the hub's cache has them in tokenizer/, and a lone file has none."""
    asked, _ = hub
    assert StableDiffusion.load("sd15").unet.config == CONFIGS["small"][0]
    assert asked == [(SD15_REPO, SD15_FILE)]
    tokenizer = read_tokenizer(tmp_path / "alone.safetensors", 600, SD15_REPO)
    assert len(tokenizer.ids) == 600
    assert asked[-1] == (SD15_REPO, "tokenizer/merges.txt")


# ---------------------------------------------------------------------------------------------------------------
# Files that fit by their names


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value, controlnet, tmp_path):
    path, tensors = tmp_path / "bad.safetensors", renamed(controlnet, BARE)
    name = "input_blocks.4.0.in_layers.2.weight"
    for dtype in (torch.float32, torch.float16):
        broken = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        broken[name].view(-1)[-1] = value
        save_file(broken, path)
        with pytest.raises(UserError, match=rf"bad.safetensors: {name} has NaN or infinity in it"):
            load_controlnet(path, small_unet())


def test_large_weights_in_half_precision_are_finite():
    """Their sum would overflow in fp16."""
    unet = small_unet()
    tensors = {name: tensor.half() for name, tensor in official_state_dict(unet).items()}
    tensors["model.diffusion_model.out.2.weight"].fill_(60_000)
    load_official(unet, tensors)
    assert unet.conv_out.weight.max() == 60_000


def test_differences_are_no_weights(controlnet, tmp_path):
    """What sd-webui-controlnet extracts has every name of a ControlNet."""
    tensors = renamed(controlnet, OFFICIAL[ControlNet]) | {"difference": torch.ones(1)}
    for name in ("a.safetensors", "a.pth"):
        save_file(tensors, tmp_path / name) if name.endswith("s") else torch.save(tensors, tmp_path / name)
        with pytest.raises(UserError, match="holds differences to a base's weights"):
            load_controlnet(tmp_path / name, small_unet())


def test_shuffle_is_named(controlnet, tmp_path, capsys):
    save_controlnet(controlnet, tmp_path / "control_v11e_sd15_shuffle.safetensors")
    load_controlnet(tmp_path / "control_v11e_sd15_shuffle.safetensors", small_unet())
    assert "averaged over the picture" in capsys.readouterr().err


CONTROLNET_SETTINGS = [
    ({"global_pool_conditions": True}, "global_pool_conditions is True"),
    ({"controlnet_conditioning_channel_order": "gbr"}, "channel_order is 'gbr'"),
    ({"conditioning_channels": 5}, "conditioning_channels is 5"),
    ({"addition_embed_type": "text"}, "addition_embed_type is 'text'"),
    ({"num_attention_heads": 2}, "num_heads 2, this one has 4"),
    ({"_class_name": "SparseControlNetModel"}, "holds SparseControlNetModel, not ControlNetModel"),
    ({"_class_name": "T2IAdapter"}, "holds T2IAdapter, not ControlNetModel"),
]


@pytest.mark.parametrize("settings, fragment", CONTROLNET_SETTINGS)
def test_controlnet_settings(settings, fragment, controlnet, tmp_path):
    save_controlnet(controlnet, tmp_path / "folder", layout="diffusers")
    config = tmp_path / "folder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises(UserError, match=re.escape(fragment)):
        load_controlnet(tmp_path / "folder", small_unet())


def test_hints_in_another_order(controlnet, tmp_path):
    """A ControlNet for BGR gives for an RGB hint what diffusers gives, which turns the hint around."""
    from diffusers import ControlNetModel

    arrays, folder = golden("small"), tmp_path / "folder"
    save_controlnet(controlnet, folder, layout="diffusers")
    theirs = ControlNetModel.from_pretrained(folder, controlnet_conditioning_channel_order="bgr")
    theirs.save_pretrained(folder)
    ours = load_controlnet(folder, small_unet())
    inputs = arrays["x"], arrays["t"], arrays["text"]
    with torch.no_grad():
        down, middle = theirs(*inputs, arrays["hint"], return_dict=False)
        residuals = ours(arrays["x"], arrays["hint"], arrays["t"], arrays["text"])
    assert max(deviation(a, b) for a, b in zip(residuals, [*down, middle], strict=True)) <= 1e-4
    assert not torch.equal(ours.hint_encoder[0].weight, controlnet.hint_encoder[0].weight)


def test_a_file_inside_a_folder_has_its_settings(controlnet, tmp_path):
    save_controlnet(controlnet, tmp_path / "folder", layout="diffusers")
    config = tmp_path / "folder" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"global_pool_conditions": True}))
    with pytest.raises(UserError, match="global_pool_conditions is True"):
        load_controlnet(tmp_path / "folder" / DIFFUSERS_FILE, small_unet())
    del settings["attention_head_dim"]  # diffusers has 8 then
    config.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="num_heads 8, this one has 4"):
        load_controlnet(tmp_path / "folder", small_unet())


def test_metadata_of_other_programs(controlnet, checkpoint, tmp_path):
    tensors, _ = read_tensors(checkpoint("small"))
    make_up_merges(tmp_path / "merges.txt", vocab_size=600)
    for text in ("sd15", '{"model": "sd15"}', "[1]"):
        save_file(tensors, tmp_path / "base.safetensors", {"config": text})
        assert StableDiffusion.load(tmp_path / "base.safetensors").latent_scale == 0.18215
        save_controlnet(controlnet, tmp_path / "a.safetensors")
        own, _ = read_tensors(tmp_path / "a.safetensors")
        save_file(own, tmp_path / "b.safetensors", {"unet": text})
        assert same_weights(load_controlnet(tmp_path / "b.safetensors", small_unet()), controlnet)


def test_tensors_one_level_down(controlnet, tmp_path):
    torch.save({"network": controlnet.state_dict(), "step": 3}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds no named tensors: save its part 'network' alone"):
        load_controlnet(tmp_path / "a.pth", small_unet())


def test_names_in_folders(controlnet, tmp_path):
    folder, unet = tmp_path / "folder", small_unet()
    save_controlnet(controlnet, folder, layout="diffusers")
    whole = folder / DIFFUSERS_FILE
    whole.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert same_weights(load_controlnet(folder, unet), controlnet)
    (folder / "diffusion_pytorch_model.fp16.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="split over several files"):
        load_controlnet(folder, unet)
    save_controlnet(controlnet, tmp_path / "run" / "controlnet.safetensors")
    with pytest.raises(UserError, match="pass a single file or a network's own folder: controlnet.safetensors"):
        load_controlnet(tmp_path / "run", unet)


def test_a_controlnet_of_a_base_of_other_heads(controlnet, tmp_path):
    save_controlnet(controlnet, tmp_path / "a.safetensors")
    other = UNet(replace(CONFIGS["small"][0], num_heads=2))
    with pytest.raises(UserError, match="copied from a base with num_heads 4, this one has 2"):
        load_controlnet(tmp_path / "a.safetensors", other)


KINDS = [  # tensors, what they are
    ({"lora_controlnet": ()}, "a Control-LoRA"),
    ({"adapter.body.0.block1.weight": (320, 256, 3, 3)}, "a T2I-Adapter"),
    ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "add_embedding.linear_1.weight": (4, 4)}, "SDXL"),
    ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
      "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}, "Stable Diffusion 2.x"),
    ({"zero_convs.0.0.weight": (320, 320, 1, 1)}, "pass a whole ControlNet for Stable Diffusion 1.x"),
    ({"model.diffusion_model.out.2.bias": (4,)}, "a base model, not a ControlNet"),
]  # fmt: skip


@pytest.mark.parametrize("shapes, kind", KINDS)
def test_kinds_that_are_no_controlnet(shapes, kind, tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as raised:
        load_controlnet(tmp_path / "a.safetensors", small_unet())
    assert kind in str(raised.value) and "pass it as a ControlNet" not in str(raised.value)


def test_a_base_without_its_autoencoder(tmp_path):
    save_file(stand_in("small", "unet", "clip"), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="not all of UNet, VAE and text encoder are in this file"):
        StableDiffusion.load(tmp_path / "a.safetensors")


def test_text_encoders_without_text_model(checkpoint, tmp_path):
    tensors, metadata = read_tensors(checkpoint("small"))
    short = {name.replace(".text_model.", "."): tensor for name, tensor in tensors.items()}
    assert short.keys() != tensors.keys()
    save_file(short, tmp_path / "a.safetensors", metadata)
    make_up_merges(tmp_path / "merges.txt", vocab_size=600)
    assert same_weights(StableDiffusion.load(tmp_path / "a.safetensors"), StableDiffusion.load(checkpoint("small")))


@pytest.mark.parametrize("content, told", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a Git LFS pointer"),
    (b"\n<!DOCTYPE html><html></html>", "a web page"),
])  # fmt: skip
def test_what_is_saved_in_place_of_weights(content, told, tmp_path):
    for name in ("a.safetensors", "a.pth"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=told):
            load_controlnet(tmp_path / name, small_unet())


def test_a_repository_is_a_folder(hub, monkeypatch, tmp_path, controlnet):
    """Of a bare owner/repo the files in diffusers' layout are fetched; where it has none, a file must be named."""
    folder = tmp_path / "snapshot"
    save_controlnet(controlnet, folder, layout="diffusers")
    asked = []

    def snapshot(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("owner/sd-controlnet-canny", CONTROLNET_FILES, "") == folder
    assert asked == [("owner/sd-controlnet-canny", CONTROLNET_FILES)]
    (folder / DIFFUSERS_FILE).unlink()
    with pytest.raises(UserError, match="owner/ControlNet-v1-1:FILE"):
        locate("owner/ControlNet-v1-1", CONTROLNET_FILES, "")
    for missing in ("folder/file.safetensors", "./folder/file", "../folder", "a/b/c", "file.ckpt"):
        assert locate(missing, CONTROLNET_FILES, "") == Path(missing)
    assert len(asked) == 2


def test_numbers_that_are_no_weights():
    unet = small_unet()
    tensors = official_state_dict(unet)
    name = "model.diffusion_model.out.2.bias"
    with pytest.raises(UserError, match="out.2.bias holds torch.int8 numbers, not weights"):
        load_official(unet, tensors | {name: tensors[name].to(torch.int8)})


@pytest.mark.parametrize("scale", [0, "nan", -1])
def test_latents_need_a_scale(scale, tmp_path):
    tensors, metadata = read_tensors(TINY_FILE)
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | {"latent_scale": scale})
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(UserError, match=rf"a.safetensors: its latent_scale is {scale}, but must"):
        StableDiffusion.load(tmp_path / "a.safetensors")
