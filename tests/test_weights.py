"""Names in both directions, the layouts of other programs."""

import json

import pytest
import torch
from safetensors.torch import save_file
from standin import CONFIGS, MANIFEST, equal, in_layout, refusal, run_main, same_state, same_tensors, stand_in

from clip_text import CLIPTextModel
from controlnet import ControlNet
from formats.diffusers import FILE, controlnet_settings
from formats.layouts import BARE, OFFICIAL, OWN
from formats.networks import LAYOUTS, base_sizes, pick
from names import pattern
from support.files import read_tensors
from tools import convert
from unet import UNet
from vae import AutoencoderKL
from weights import load_controlnet, load_official, official_state_dict, save_controlnet

DIFFUSERS = LAYOUTS[ControlNet][1]


def networks(size: str) -> dict[str, torch.nn.Module]:
    """All networks of a size by their names in the manifest, without memory."""
    unet, vae, text = CONFIGS[size]
    with torch.device("meta"):
        base = {"unet": UNet(unet), "vae": AutoencoderKL(vae), "clip": CLIPTextModel(text)}
        return base | {"control": ControlNet.from_unet(base["unet"])}


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


def test_a_folder_and_a_file_in_it_have_its_settings(controlnet, unet, tmp_path):
    config, other = tmp_path / "config.json", tmp_path / "canny.safetensors"
    save_controlnet(controlnet, tmp_path, layout="diffusers")
    settings = json.loads(config.read_text())
    for path in (tmp_path, tmp_path / FILE):
        assert same_state(load_controlnet(path, unet), controlnet)
        for changed, told in (
            ({"global_pool_conditions": True}, "global_pool_conditions is True"),
            ({"controlnet_conditioning_channel_order": "bgr"}, "channel_order is 'bgr'"),
            ({"num_attention_heads": 2}, "num_heads 2, this one has 1"),
        ):
            config.write_text(json.dumps(settings | changed))
            assert told in refusal(load_controlnet, path, unet)
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
    lite = ControlNet.from_unet(unet, copy="lite")
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
    both = zip(residuals, [*down, middle], strict=True)
    assert all((a - b).abs().max() <= 6e-5 * b.abs().max() for a, b in both)


def test_converting_there_and_back(controlnet, tmp_path, monkeypatch, capsys):
    """Tensor by tensor; the sizes that no shape shows go along in the metadata and in config.json."""
    first, folder, back = tmp_path / "first.safetensors", tmp_path / "folder", tmp_path / "shuffle.safetensors"
    decoder = {"model.diffusion_model.out.2.bias": torch.ones(4)}
    save_controlnet(controlnet, first, metadata={"license": "x", "unlock_decoder": "true"}, others=decoder)
    run_main(monkeypatch, convert, first, back, "--layout", "official")
    assert same_tensors(first, back)
    run_main(monkeypatch, convert, first, folder, "--layout", "diffusers")
    assert "the decoder that was trained with it stays behind" in capsys.readouterr().err
    run_main(monkeypatch, convert, folder, back, "--layout", "official")
    assert equal(read_tensors(first)[0], read_tensors(back)[0] | decoder)
    assert f"{folder}: ControlNet in the diffusers layout, 336 tensors" in capsys.readouterr().out
    run_main(monkeypatch, convert, back, folder, "--layout", "diffusers", "--dtype", "fp16")
    assert capsys.readouterr().err.count("averaged over the picture") == 1  # as its name says
    theirs = in_layout(controlnet, DIFFUSERS)
    assert equal({name: tensor.half() for name, tensor in theirs.items()}, read_tensors(folder / FILE)[0])
    config = json.loads((folder / "config.json").read_text())
    assert config == controlnet_settings(controlnet.config, (4, 4, 8, 8))
