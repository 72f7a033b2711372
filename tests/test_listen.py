"""Whether a ControlNet hears its hint: verdicts on ControlNets whose answer is known, and the folders of a training."""

import shutil

import pytest
import torch
from standin import ROOT, SAMPLE, run_main
from torch import Tensor

from controlnet import ControlNet
from data import DRAWN_HELD_OUT, DrawnImages
from stable_diffusion import TINY, StableDiffusion
from support.errors import UserError
from tools import listen
from tools.listen import BANDS, Heard, mean_and_error, verdict
from weights import load_controlnet, save_controlnet

SHIPPED = ROOT / "models" / "fill50k" / "controlnet.safetensors"


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.load("tiny").requires_grad_(False)


def hear(sd, controlnet, pairs):
    return listen.listen(sd, controlnet, listen.noise_pairs(sd, pairs))


class MixedUp(DrawnImages):
    """Hints that do not belong to the pictures."""

    def hint(self, index):
        return super().hint((index + 2) % len(self))


def untrained(sd):
    return ControlNet.from_unet(sd.unet, TINY.hint_channels, "he").requires_grad_(False)


def test_known_answers(sd):
    pairs = DrawnImages(8, 64, DRAWN_HELD_OUT)
    trained = load_controlnet(SHIPPED, sd.unet)
    assert verdict(hear(sd, trained, pairs)).startswith("it follows its hint: another pair's hint raises")
    assert verdict(hear(sd, trained, MixedUp(8, 64, DRAWN_HELD_OUT))).startswith("its hint moves the predict")
    assert verdict(hear(sd, trained, DrawnImages(4, 64))).startswith("4 pairs are too few for a verdict")
    heard = hear(sd, untrained(sd), pairs)
    assert verdict(heard).startswith("it does not hear its hint: its residuals are the same")
    assert heard.loss["own"].shape == heard.moved.shape == (8, BANDS)
    assert all(torch.equal(heard.loss["own"], loss) for loss in heard.loss.values())  # equation (3)
    deaf = untrained(sd)
    torch.nn.init.normal_(deaf.middle_zero_conv.weight, std=1e-4)  # hears at most by chance
    torch.nn.init.normal_(deaf.hint_encoder[-1].weight, std=1e-4)
    assert verdict(hear(sd, deaf, pairs)).startswith("it does not hear its hint yet, as far as 8 pairs")


def test_a_broken_one(sd):
    trained = load_controlnet(SHIPPED, sd.unet)
    trained.middle_zero_conv.weight.data *= 1e38
    assert verdict(hear(sd, trained, DrawnImages(8, 64))).startswith("its predictions are not finite")


def test_another_hint_is_another(sd):
    """Pairs may share a hint, with other captions."""

    class Captions(DrawnImages):
        def hint(self, index):
            return super().hint(index // 2)

    pairs = Captions(6, 64)
    assert torch.equal(pairs.other_hint(0), pairs.hint(2))
    assert torch.equal(pairs.other_hint(5), pairs.hint(0))
    with pytest.raises(UserError, match="all 2 pairs have the same hint"):
        hear(sd, untrained(sd), Captions(2, 64))


def figures(added: Tensor, moved: float) -> Heard:
    """Of 8 pairs whose own loss is 1, and with another hint 1 + added."""
    loss = {name: torch.ones(8, BANDS) for name in listen.HINTS}
    noise = 0.01 * torch.randn(8, BANDS, generator=torch.Generator().manual_seed(0))
    loss["other"] = loss["own"] + added + noise
    return Heard(loss, torch.full((8, BANDS), moved))


def test_between_hearing_and_following():
    rising = torch.linspace(0, 0.4, BANDS)
    assert "samples hardly show it: another pair's hint raises the loss by 40% ± 0% at t = 875 to 999" in verdict(
        figures(rising, 0.2)
    )
    assert verdict(figures(3 * rising, 0.6)).startswith("it follows its hint")
    assert verdict(figures(-rising, 0.2)).startswith("its own hint makes the predictions worse")


def test_a_band_that_is_noise_does_not_count():
    heard = figures(torch.full((BANDS,), 0.1), 0.1)
    heard.loss["other"][0, 2] += 30  # one pair alone
    assert listen.loudest(heard)[2] != "250 to 374" and listen.loudest(heard)[0] == pytest.approx(0.1, abs=0.02)


def test_all_bands_together_can_be_surer_than_each():
    heard = figures(torch.full((BANDS,), 0.05), 0.1)
    heard.loss["other"] += 0.06 * torch.eye(8, BANDS) * BANDS - 0.06  # one band of each pair, always another one
    assert listen.loudest(heard) == (pytest.approx(0.05, abs=0.01), pytest.approx(0, abs=0.01), "0 to 999")
    assert "by 5% ± 0% at t = 0 to 999" in verdict(heard)


def test_standard_errors():
    """Of a mean over pairs: bands of one pair are no independent measurements."""
    assert mean_and_error(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx((2.0, 1 / 3**0.5))
    same = torch.tensor([[1.0] * BANDS, [3.0] * BANDS])
    assert mean_and_error(same.mean(dim=1))[1] == pytest.approx(1.0)


def test_noise_is_the_same_for_every_controlnet(sd):
    """So that checkpoints can be compared, and the base's loss is that of every ControlNet."""
    pairs = DrawnImages(2, 64, DRAWN_HELD_OUT)
    a, b = (hear(sd, net, pairs) for net in (untrained(sd), load_controlnet(SHIPPED, sd.unet)))
    assert torch.equal(a.loss["none"], b.loss["none"]) and not torch.equal(a.loss["own"], b.loss["own"])


def test_command_line(monkeypatch, capsys, tmp_path):
    run_main(monkeypatch, listen, "--controlnet", SHIPPED, "--pairs", "2", "--resolution", "64", "--data", SAMPLE)
    told = capsys.readouterr()
    printed = told.out.splitlines()
    assert "trained on" not in told.err
    assert printed[0].startswith(f"2 pairs of {SAMPLE} on cpu")
    assert printed[3].lstrip().startswith("125 to 249 ") and len(printed) == BANDS + 4
    assert printed[-1] == f"{SHIPPED}: 2 pairs are too few for a verdict: take 8 or more"
    lonely = tmp_path / "lonely"
    shutil.copytree(SAMPLE, lonely)
    (lonely / "prompt.json").write_text((lonely / "prompt.json").read_text().splitlines()[0])
    with pytest.raises(UserError, match="has one pair only"):
        run_main(monkeypatch, listen, "--controlnet", SHIPPED, "--data", lonely)


def test_a_training_of_ours_and_of_diffusers(sd, monkeypatch, capsys, tmp_path):
    import train

    run, options = tmp_path / "run", ["--pairs", "2", "--resolution", "64", "--output", tmp_path / "curve.png"]
    run_main(
        monkeypatch, train, "--output-dir", run, "--data", SAMPLE, "--resolution", "64", "--max-train-steps", "2",
        "--checkpointing-steps", "1", "--validation-steps", "0", "--train-batch-size", "1", "--snapshot-steps", "1",
    )  # fmt: skip
    last = load_controlnet(run / "controlnet.safetensors", sd.unet).state_dict()
    capsys.readouterr()
    run_main(monkeypatch, listen, "--controlnet", run / "controlnet.safetensors", "--pairs", "2")
    trained_on_them = "trained on these pairs but for the last 0"  # too few to spare any
    told = capsys.readouterr()
    assert told.out.startswith(f"2 pairs of {SAMPLE} on cpu") and trained_on_them in told.err
    run_main(monkeypatch, listen, "--controlnet", run, "--data", f"{SAMPLE}/../fill50k/", *options)
    assert trained_on_them in capsys.readouterr().err
    checkpoint = load_controlnet(run / "checkpoints" / "step-2", sd.unet).state_dict()
    file = load_controlnet(run / "checkpoints" / "step-2" / "state.safetensors", sd.unet).state_dict()
    assert all(torch.equal(last[name], checkpoint[name]) and torch.equal(last[name], file[name]) for name in last)
    (run / "checkpoints" / "step-3").mkdir()  # half written: left out
    (run / "checkpoints" / "step-3" / "state.safetensors").write_bytes(b"half")
    theirs = tmp_path / "theirs"
    for step in (500, 1000):
        save_controlnet(untrained(sd), theirs / f"checkpoint-{step}" / "controlnet", layout="diffusers")
    for folder, steps in ((run, (0, 1, 2)), (theirs, (500, 1000))):
        capsys.readouterr()
        run_main(monkeypatch, listen, "--controlnet", folder, *options)
        printed = capsys.readouterr().out
        assert [line.split(":")[0] for line in printed.splitlines()[1:-1]] == [f"step {step}" for step in steps]
        assert (tmp_path / "curve.png").stat().st_size > 5000
        (tmp_path / "curve.png").unlink()
    with pytest.raises(UserError, match="pass .*checkpoint-500/controlnet"):
        run_main(monkeypatch, listen, "--controlnet", theirs / "checkpoint-500", *options)
