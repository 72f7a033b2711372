"""On a GPU: the CPU's numbers, both half precisions, resuming, and memory as the docs state it. Skipped without one."""

import pytest
import torch
from standin import ROOT, SAMPLE, deviation, read_run, run_main, small_unet, stand_in
from test_dry_run import count

import sample
import train
from controlnet import ControlNet, Denoiser
from sample import generate, load_beside
from stable_diffusion import StableDiffusion
from support.devices import PRECISIONS, choose_device, place, place_for_sampling, sampling_precision
from support.files import read_tensors
from support.pictures import read_strip
from weights import load_official

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
# How far a prediction may be from float32's, over its largest value. bf16 has 8 significant bits, fp16 11; through 25
# blocks the roundings add up to some ten times one of them.
ROUNDING = {"no": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
TRAIN = ["--data", SAMPLE, "--resolution", "64", "--train-batch-size", "3", "--validation-steps", "2"]
TRAIN += ["--cooldown", "0"]
GB = 1e9


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    """TensorFloat-32 keeps 11 significant bits: float32 is to be compared with the CPU's float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def card():
    """The device, its peak memory reset, and uncapped again afterwards."""
    device = choose_device(DEVICE)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    yield device
    torch.cuda.set_per_process_memory_fraction(1.0, device)


def cap(device: torch.device, gigabytes: float) -> None:
    """Let the process have no more than that, as on a smaller card; skip the test on a card that has less."""
    total = torch.cuda.get_device_properties(device).total_memory
    if gigabytes * GB > total:
        pytest.skip(f"needs a card of {gigabytes} GB")
    torch.cuda.set_per_process_memory_fraction(gigabytes * GB / total, device)


def step(device: torch.device, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ε of the small stand-in with its ControlNet, and the gradient of the first zero convolution's bias."""
    unet = small_unet()
    controlnet = ControlNet.from_unet(unet)
    load_official(controlnet, stand_in("small", "control"))
    controlnet.requires_grad_(True)
    denoiser = place(Denoiser(unet, controlnet, precision=PRECISIONS[precision], checkpointing=True), device)
    generator = torch.Generator().manual_seed(0)
    z, hint, context = (torch.randn(2, *s, generator=generator) for s in ((4, 16, 16), (3, 128, 128), (77, 48)))
    t = torch.tensor([10, 700])
    eps = denoiser(z.to(device), t.to(device), context.to(device), hint.sigmoid().to(device))
    eps.square().mean().backward()
    assert eps.dtype == torch.float32
    assert {p.dtype for p in controlnet.parameters()} == {torch.float32}
    assert {p.dtype for p in unet.parameters()} == {PRECISIONS[precision]}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.trainable_parameters())
    return eps.detach().cpu(), controlnet.zero_convs[0].bias.grad.cpu()


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_step_is_the_cpu_s(card, precision):
    for ours, expected in zip(step(card, precision), step(torch.device("cpu"), "no")):
        assert deviation(ours, expected) < ROUNDING[precision]


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_training_and_resuming(card, precision, tmp_path, monkeypatch):
    options = [*TRAIN, "--mixed-precision", precision, "--device", DEVICE]
    run_main(monkeypatch, train, *options, "--output-dir", tmp_path / "whole", "--max-train-steps", "4")
    run_main(monkeypatch, train, *options, "--output-dir", tmp_path / "parts", "--max-train-steps", "2")
    resume = ["--max-train-steps", "4", "--resume-from-checkpoint", "latest"]
    run_main(monkeypatch, train, *options, "--output-dir", tmp_path / "parts", *resume)
    whole, parts = (read_run(tmp_path / name) for name in ("whole", "parts"))
    # Kernels that add in a chance order make the last bits differ, and half precision makes that visible.
    assert [e["loss"] for e in parts] == pytest.approx([e["loss"] for e in whole], rel=1e-2)
    assert (tmp_path / "whole" / "previews" / "step-4.png").exists()
    states = [read_tensors(tmp_path / name / "checkpoints/step-4/state.safetensors") for name in ("whole", "parts")]
    assert states[0][1] == states[1][1] and ("growth" in states[0][1]["scaler"]) == (precision == "fp16")
    run_main(monkeypatch, train, *TRAIN, "--device", "cpu", "--output-dir", tmp_path / "cpu", "--max-train-steps", "4")
    losses = [e["loss"] for e in read_run(tmp_path / "cpu")]
    assert [e["loss"] for e in whole] == pytest.approx(losses, rel=5e-2)  # in bf16 targets and prompts are encoded so


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "auto"])
def test_sample_is_the_cpu_s(card, precision, tmp_path, monkeypatch):
    options = ["--controlnet", ROOT / "models" / "fill50k" / "controlnet.safetensors"]
    options += ["--hint", SAMPLE / "source" / "0.png", "--prompt", "coral circle with blue background"]
    for device, chosen in ((DEVICE, precision), ("cpu", "fp32")):
        output = ["--output", tmp_path / f"{device}.png", "--device", device, "--precision", chosen]
        run_main(monkeypatch, sample, *options, *output)
    ours, expected = (read_strip(tmp_path / f"{name}.png", 2)[1] for name in (DEVICE, "cpu"))
    assert (ours - expected).abs().mean() < (0.02 if precision == "fp32" else 0.1)  # of a range of 2


# At Stable Diffusion 1.5's size, by card. What is counted is without kernels' workspaces and fragmentation; a tenth is
# left for those that PyTorch allocates.
FITS = [
    (24, ["--validation-steps", "1"]),
    (12, ["--gradient-checkpointing", "--validation-steps", "1"]),
    (24, ["--gradient-checkpointing", "--unlock-decoder", "--validation-steps", "0"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("gigabytes", "options"), FITS)
def test_memory_of_training(card, gigabytes, options, checkpoint, tmp_path, monkeypatch):
    """As train.py --dry-run counts it."""
    cap(card, gigabytes)
    counted = max(count(monkeypatch, "--base", "sd15", *options)["peaks"].values())
    base = ["--base", checkpoint("sd15"), "--data", SAMPLE, "--output-dir", tmp_path / "run", "--device", DEVICE]
    run_main(monkeypatch, train, *base, "--max-train-steps", "2", *options)
    assert 0.9 * counted < torch.cuda.max_memory_allocated(card) < 1.1 * counted


@pytest.mark.slow
@pytest.mark.parametrize(("size", "counted"), [(512, 4.1), (1024, 6.5)])
def test_memory_of_sampling(card, size, counted, checkpoint, control_checkpoint):
    cap(card, 6 if size == 512 else 12)
    sd = StableDiffusion.load(str(checkpoint("sd15")))
    place_for_sampling(sd, card, sampling_precision("auto", card))
    controlnet = load_beside(sd, control_checkpoint("sd15"))
    images = generate(sd, [controlnet], [torch.rand(1, 3, size, size)], ["a house"], steps=2)
    assert images.isfinite().all()
    assert torch.cuda.max_memory_allocated(card) < 1.1 * counted * GB
