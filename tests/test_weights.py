"""Names in both directions, the layouts of other programs, and what a file that does not fit says."""

import json
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from standin import CONFIGS, MANIFEST, NANO, deviation, equal, run_main, same_state, same_tensors, stand_in

from clip_text import CLIPTextModel
from controlnet import ControlNet
from formats.diffusers import CONTROLNET_FILES, FILE, controlnet_settings
from formats.layouts import BARE, OFFICIAL, OWN
from formats.networks import LAYOUTS, base_sizes, pick, read_tokenizer, sizes_in_metadata
from names import pattern
from stable_diffusion import SD15_REPO, StableDiffusion
from support.errors import UserError
from support.files import read_tensors, save_tensors
from support.hub import locate
from tools import convert
from unet import UNet
from vae import AutoencoderKL
from weights import load_controlnet, load_decoders, load_official, official_state_dict, save_controlnet

DIFFUSERS = LAYOUTS[ControlNet][1]
HINT_CHANNELS = (4, 4, 8, 8)


def networks(size: str) -> dict[str, torch.nn.Module]:
    """All networks of a size by their names in the manifest, without memory."""
    unet, vae, text = CONFIGS[size]
    with torch.device("meta"):
        base = {"unet": UNet(unet), "vae": AutoencoderKL(vae), "clip": CLIPTextModel(text)}
        return base | {"control": ControlNet.from_unet(base["unet"])}


@pytest.fixture(scope="module")
def unet(nano):
    return StableDiffusion.load(nano).unet


@pytest.fixture(scope="module")
def controlnet(unet):
    """One for the nano base, of which no two tensors are alike."""
    torch.manual_seed(0)
    made = ControlNet.from_unet(unet, HINT_CHANNELS).requires_grad_(False)
    for parameter in made.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return made


def in_layout(module: torch.nn.Module, layout) -> dict:
    return {layout.theirs(name): tensor for name, tensor in module.state_dict().items()}


def refusal(read, *arguments) -> str:
    """The one line of a UserError."""
    with pytest.raises(UserError) as raised:
        read(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("size", CONFIGS)
def test_names_are_the_official_ones(size):
    """The UNet's, VAE's and text encoder's 1,130 and the ControlNet's 340: the manifest is of the authors' own code."""
    for part, module in networks(size).items():
        official = official_state_dict(module)
        assert len(official) == len(module.state_dict())
        assert {name: list(tensor.shape) for name, tensor in official.items()} == MANIFEST[size][part]


def test_every_rule_table_reads_both_ways():
    """At SD 1.5's size each name fits exactly one rule in either direction, and comes back as it went."""
    for module in networks("sd15").values():
        for layout in LAYOUTS[type(module)]:
            names = {ours: layout.theirs(ours) for ours in module.state_dict()}
            assert len(set(names.values())) == len(names)
            for ours, theirs in names.items():
                assert layout.ours(theirs) == ours
                stems = ours.rpartition(".")[0], theirs.removeprefix(layout.prefix).rpartition(".")[0]
                for side, stem in enumerate(stems):
                    fitting = [rule for rule in layout.rules if pattern(rule[side]).fullmatch(stem)]
                    assert len(fitting) == (layout is not OWN), (stem, fitting)
    for unknown in ("label_emb.0.0.weight", "output_blocks.2.2.conv.weight"):  # has no rule, so it stays
        assert OFFICIAL[UNet].ours(OFFICIAL[UNet].prefix + unknown) == OFFICIAL[UNet].prefix + unknown


def test_sizes_are_read_off_shapes():
    """SD 1.5's files have no metadata of ours."""
    shapes = {name: shape for part in ("unet", "vae", "clip") for name, shape in MANIFEST["sd15"][part].items()}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    sizes = base_sizes(*(pick(tensors, network, "file") for network in (UNet, AutoencoderKL, CLIPTextModel)))
    assert sizes == dict(zip(("unet", "vae", "text"), CONFIGS["sd15"]))


def test_loading_and_writing_are_inverse():
    """Into real parameters tensors are copied; those on the meta device share their memory."""
    tensors, name = stand_in("small", "unet"), "model.diffusion_model.out.2.weight"
    copied, shared = UNet(CONFIGS["small"][0]), networks("small")["unet"]
    parameter = copied.conv_out.weight
    for module in (copied, shared):
        load_official(module, tensors)
        assert equal(official_state_dict(module), tensors)
    assert copied.conv_out.weight is parameter and parameter.data_ptr() != tensors[name].data_ptr()
    assert shared.conv_out.weight.data_ptr() == tensors[name].data_ptr()


def test_controlnet_files_that_are_read(controlnet, unet, nano, tmp_path):
    own, bare = controlnet.state_dict(), in_layout(controlnet, BARE)
    in_all_of_sd = official_state_dict(controlnet) | read_tensors(nano)[0]  # as ControlNet 1.0 was released
    contents = {
        "own.safetensors": own,
        "bare.safetensors": bare,
        "all.safetensors": in_all_of_sd,
        "renamed.safetensors": in_layout(controlnet, DIFFUSERS),
        "prefixed.safetensors": {f"_orig_mod.module.controlnet.{name}": tensor for name, tensor in own.items()},
        "all.pth": {"state_dict": in_all_of_sd, "global_step": 3},
    }
    (tmp_path / "config.json").write_text("[]")  # of something else in a folder with many files
    for name, content in contents.items():
        write = save_file if name.endswith(".safetensors") else torch.save
        write(content, tmp_path / name)
        assert same_state(load_controlnet(tmp_path / name, unet), controlnet), name
    save_controlnet(controlnet, tmp_path / FILE)  # the official layout under diffusers' name
    assert read_tensors(tmp_path / FILE)[0].keys() == official_state_dict(controlnet).keys()
    assert same_state(load_controlnet(tmp_path / FILE, unet), controlnet)


SETTINGS = [  # of a ControlNet's folder, changed; what the line must say
    ({"global_pool_conditions": True}, "global_pool_conditions is True"),
    ({"controlnet_conditioning_channel_order": "bgr"}, "channel_order is 'bgr'"),
    ({"num_attention_heads": 2}, "num_heads 2, this one has 1"),
    ({"attention_head_dim": [4, 4]}, "num_heads [4, 4], this one has 1"),
]


def test_a_folder_and_a_file_in_it_have_its_settings(controlnet, unet, tmp_path):
    config, other = tmp_path / "config.json", tmp_path / "canny.safetensors"
    save_controlnet(controlnet, tmp_path, layout="diffusers")
    settings = json.loads(config.read_text())
    for path in (tmp_path, tmp_path / FILE):
        assert same_state(load_controlnet(path, unet), controlnet)
        for changed, fragment in SETTINGS:
            config.write_text(json.dumps(settings | changed))
            assert fragment in refusal(load_controlnet, path, unet)
        config.write_text(json.dumps(settings))
    config.write_text(json.dumps({name: value for name, value in settings.items() if name != "attention_head_dim"}))
    assert "num_heads 8, this one has 1" in refusal(load_controlnet, tmp_path, unet)  # diffusers' default
    (tmp_path / FILE).rename(other)  # a name of its own: the settings may be another file's
    assert same_state(load_controlnet(other, unet), controlnet)
    assert "own folder or a single file: canny.safetensors" in refusal(load_controlnet, tmp_path, unet)
    config.unlink()
    (tmp_path / "checkpoint-500" / "controlnet").mkdir(parents=True)  # as diffusers' trainer writes it
    other.rename(tmp_path / "checkpoint-500" / "controlnet" / "diffusion_pytorch_model.fp16.safetensors")
    assert same_state(load_controlnet(tmp_path / "checkpoint-500", unet), controlnet)


def test_lite_keeps_our_names_and_has_no_other_layout(unet, tmp_path):
    path, decoder = tmp_path / "lite.safetensors", {"model.diffusion_model.out.2.bias": torch.ones(4)}
    lite = ControlNet.from_unet(unet, HINT_CHANNELS, copy="lite")
    save_controlnet(lite, path, others=decoder)
    tensors, metadata = read_tensors(path)
    assert metadata["copy"] == "lite" and tensors.keys() == lite.state_dict().keys() | decoder.keys()
    assert same_state(load_controlnet(path, unet), lite)
    assert "no diffusers layout" in refusal(save_controlnet, lite, tmp_path / "folder", "diffusers")


@torch.no_grad()
def test_diffusers_reads_ours_and_we_read_theirs(controlnet, unet, tmp_path, monkeypatch):
    """In a folder; of a single file tools.verify tells."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from diffusers import ControlNetModel

    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 8, 16), (2, 3, 64, 128), (2, 77, 16)
    x, hint, context = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    t, ours, theirs = torch.tensor([1, 981]), tmp_path / "ours", tmp_path / "theirs"
    save_controlnet(controlnet, ours, layout="diffusers")
    model = ControlNetModel.from_pretrained(ours)
    model.save_pretrained(theirs)
    residuals = load_controlnet(theirs, unet).double()(x, hint, t, context)
    down, middle = model.double()(x, t, context, hint, return_dict=False)
    # Both in float64, but for the sinusoids of time: up to 1000 * 2^-24 = 6e-5 radian.
    assert max(deviation(a, b) for a, b in zip(residuals, [*down, middle], strict=True)) <= 6e-5


def test_converting_there_and_back(controlnet, tmp_path, monkeypatch, capsys):
    """Tensor by tensor; the sizes that no shape shows go along in the metadata and in config.json."""
    first, copy, back = (tmp_path / f"{name}.safetensors" for name in ("first", "copy", "back"))
    folder, half = tmp_path / "folder", tmp_path / "half"
    decoder = {"model.diffusion_model.out.2.bias": torch.ones(4)}
    save_controlnet(controlnet, first, metadata={"license": "x", "unlock_decoder": "true"}, others=decoder)
    run_main(monkeypatch, convert, first, copy, "--layout", "official")
    assert capsys.readouterr().err == "" and same_tensors(first, copy)
    run_main(monkeypatch, convert, first, folder, "--layout", "diffusers")
    assert "the decoder that was trained with it stays behind" in capsys.readouterr().err
    run_main(monkeypatch, convert, folder, back, "--layout", "official")
    run_main(monkeypatch, convert, back, half, "--layout", "diffusers", "--dtype", "fp16")
    assert f"{folder}: ControlNet in the diffusers layout, 336 tensors" in capsys.readouterr().out
    assert equal(read_tensors(first)[0], read_tensors(back)[0] | decoder)
    theirs = in_layout(controlnet, DIFFUSERS)
    assert equal({name: tensor.half() for name, tensor in theirs.items()}, read_tensors(half / FILE)[0])
    for path in (folder, half):
        assert json.loads((path / "config.json").read_text()) == controlnet_settings(controlnet.config, HINT_CHANNELS)


UNET = "model.diffusion_model."
WRONG_BASES = [  # shapes of tensors, what the metadata says, what the line must say
    ({f"{UNET}label_emb.0.0.weight": (3,)}, {}, "[3] is no part of the model; .* SDXL or made for it"),
    ({f"{UNET}input_blocks.0.0.weight": (8, 9, 3, 3)}, {}, "an inpainting or InstructPix2Pix model"),
    ({f"{UNET}input_blocks.0.0.weight": (0, 4, 3, 3)}, {}, f"{UNET}input_blocks.0.0.weight has shape [0, 4, 3, 3]"),
    ({f"{UNET}input_blocks.4.0.out_layers.3.weight": (16, 8, 3, 3)}, {}, "has shape [8, 8, 3, 3], expected [16, 8, 3"),
    ({f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 1024)}, {}, "Stable Diffusion 2.x"),
    ({}, {"unet": 3}, "norm_groups is 32, but must be a whole number that divides 8"),
    *[({}, {"unet": {"norm_groups": odd}}, f"norm_groups is {odd}, but") for odd in (7, 0, True, 2.5, {"a": []})],
    *[({}, {"latent_scale": scale}, "scale of latents is ") for scale in (0, "nan", float("inf"))],
]  # fmt: skip


@pytest.mark.parametrize("shapes, said, fragment", WRONG_BASES)
def test_wrong_base_is_named(shapes, said, fragment, nano, tmp_path):
    tensors, metadata = read_tensors(nano)
    config = {"config": json.dumps(json.loads(metadata["config"]) | said)}
    shutil.copy(nano.parent / "merges.txt", tmp_path)
    wrong = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_tensors(tensors | wrong, tmp_path / "a.safetensors", config)
    message = refusal(StableDiffusion.load, tmp_path / "a.safetensors")
    assert message.startswith(f"{tmp_path / 'a.safetensors'}: ") and all(
        part in message for part in fragment.split(".* ")
    )


def test_metadata_of_other_programs_says_nothing():
    nested = "[" * 100_000
    for text in ("sd15", '{"model": "sd15"}', "[1]", "3", '{"unet": 3}', nested):
        assert not any(sizes_in_metadata({"config": text}, UNet).values())
        assert "num_heads" not in sizes_in_metadata({"unet": text}, ControlNet)


def test_a_bug_keeps_its_traceback(nano, monkeypatch):
    monkeypatch.setattr(UNet, "__init__", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        StableDiffusion.load(nano)


NAMES_IN_FILES = [
    (OFFICIAL[ControlNet], "control_model.input_blocks.11.0.out_layers.3.bias"),
    (BARE, "input_blocks.11.0.out_layers.3.bias"),
    (DIFFUSERS, "down_blocks.3.resnets.1.conv2.bias"),
]


@pytest.mark.parametrize("layout, name", NAMES_IN_FILES)
def test_errors_call_a_tensor_what_its_file_calls_it(layout, name, controlnet, unet, tmp_path):
    path, good, unknown = tmp_path / "bad.safetensors", in_layout(controlnet, layout), name.replace(".bias", ".extra")
    hint = layout.theirs("hint_encoder.0.weight")
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


@pytest.mark.parametrize("shapes, kind", WRONG_FILES)
def test_files_that_are_no_controlnet(shapes, kind, unet, tmp_path):
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


@pytest.mark.parametrize("form", ["alone", "of a trainer", "a whole base", "a folder"])
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
        trainers = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
        save_tensors(alone | (trainers if form == "of a trainer" else {}), path, said)
    base = tmp_path / "base.safetensors"
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    save_tensors(rest, base, metadata)
    shutil.copy(nano.parent / "merges.txt", tmp_path)
    assert "first_stage_model.encoder.conv_in.weight is missing" in refusal(StableDiffusion.load, base)
    sd, whole = StableDiffusion.load(base, path), StableDiffusion.load(nano)
    assert sd.latent_scale == whole.latent_scale == 1
    assert same_state(sd.unet, whole.unet) and same_state(sd.text_encoder, whole.text_encoder)
    for name, tensor in whole.vae.state_dict().items():
        assert torch.equal(sd.vae.state_dict()[name], tensor + 0.125)
    assert same_state(StableDiffusion.load(diffusers_base, path).vae, sd.vae)


@pytest.mark.parametrize("change", [lambda whole: whole + bytes(7), lambda whole: whole[:-5]], ids=["longer", "cut"])
def test_a_file_of_the_wrong_length(change, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3)}, path)
    path.write_bytes(change(path.read_bytes()))
    assert "a.safetensors is damaged or no safetensors file" in refusal(read_tensors, path)


def test_shuffle_is_named_once(controlnet, tmp_path, monkeypatch, capsys):
    path = tmp_path / "control_v11e_sd15_shuffle.safetensors"
    save_controlnet(controlnet, path)
    run_main(monkeypatch, convert, path, tmp_path / "folder", "--layout", "diffusers")
    assert capsys.readouterr().err.count("averaged over the picture") == 1


def test_two_decoders_are_refused(controlnet, unet, tmp_path):
    """What one decoder does is tested where it is trained."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save_controlnet(controlnet, path, metadata={"unlock_decoder": "true"})
    assert "both bring a decoder" in refusal(load_decoders, unet, paths)
    other = UNet(replace(NANO[0], num_heads=2))
    assert "copied from a base with num_heads 1, this one has 2" in refusal(load_controlnet, paths[0], other)


def test_repositories(controlnet, nano, monkeypatch, tmp_path):
    """Of owner/repo the files in diffusers' layout are fetched, of "sd15" its file, and its merges if none are near."""
    asked, stored = [], {"v1-5-pruned-emaonly.safetensors": nano, "tokenizer/merges.txt": nano.parent / "merges.txt"}
    hub = {
        "try_to_load_from_cache": lambda repo, file: str(tmp_path / "cached") if file == "cached" else None,
        "hf_hub_download": lambda repo, file: asked.append((repo, file)) or str(stored[file]),
        "snapshot_download": lambda repo, allow_patterns: asked.append((repo, allow_patterns)) or str(tmp_path / "a"),
    }
    for name, stand_in_for in hub.items():
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
