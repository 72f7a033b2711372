"""Draw a hint in the browser and see what a ControlNet makes of it; scrub through the training that made it."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from support.command import run_command_line

from PIL import Image
from torch import Tensor

from controlnet import CONTROL_MODES, ControlNet
from convergence import find_checkpoints
from sample import generate, load_beside, load_to_sample
from stable_diffusion import StableDiffusion
from support import options
from support.detect import add_options, detector, is_inverted
from support.devices import choose_device, describe
from support.errors import UserError
from support.files import read_log
from support.page import Page, next_snapshot
from support.pictures import fit_image, to_picture
from weights import load_decoder

SHIPPED = Path(__file__).parent / "models" / "fill50k" / "controlnet.safetensors"


class Painter:
    """A base, and the ControlNets of one training by step; or a single one, whose step doesn't matter."""

    def __init__(self, sd: StableDiffusion, paths: dict[int, Path], resolution: int, detect: Callable):
        self.sd, self.paths, self.resolution, self.detect = sd, paths, resolution, detect
        self.controlnet = lru_cache(maxsize=2)(self.controlnet)
        self.alone = lru_cache(maxsize=32)(self.alone)  # it is the same for every hint and every step

    def controlnet(self, step: int) -> ControlNet:
        return load_beside(self.sd, self.paths[step])

    def alone(self, size: tuple[int, int], prompt: str, **settings) -> Tensor:
        """The base's own image [3, H, W] in [-1, 1] from the same noise, without a hint."""
        return generate(self.sd, [], [], [prompt], size=size, **settings)[0]

    def hint(self, picture: Image.Image, drawn: bool, invert: bool) -> Tensor:
        """[3, H, W] in [0, 1]. A drawing is one already: the edges of a drawn stroke would be two lines."""
        hint = fit_image(picture, self.resolution, square=drawn)
        return hint if drawn else self.detect(1 - hint if invert else hint)

    def paint(
        self, show: Callable[[dict], None], picture: Image.Image, drawn: bool, invert: bool, prompt: str,
        strength: float, mode: str, **settings,
    ) -> Iterator[dict]:  # fmt: skip
        """What the page shows: hint, base's own picture, each snapshot's; of the last one DDIM's predictions too."""
        hint, steps, distances = self.hint(picture, drawn, invert), list(self.paths), {}
        if not hint.any():
            raise UserError("the hint is empty: draw a line in the black square, or choose a picture with lines")
        notes = ["a hint is white lines on black: try Invert"] if is_inverted(hint) else []
        if cut := self.sd.tokenizer.cut(prompt):
            notes.append(f"the prompt is too long and is cut from: {cut}")
        yield {"hint": to_picture(hint * 2 - 1), "notes": notes}
        yield {"alone": to_picture(alone := self.alone(tuple(hint.shape[1:]), prompt, **settings))}
        settings |= {"strengths": [strength], "control_mode": mode}
        settings["watch"] = lambda z_0: show({"predicted": to_picture(self.sd.decode_latents(z_0)[0])})
        while (step := next_snapshot(steps, distances)) is not None:
            image = generate(self.sd, [self.controlnet(step)], [hint[None]], [prompt], **settings)[0]
            distances[step] = (image - alone).square().mean().sqrt().item() / 2  # in shares of the brightness
            settings["watch"] = None
            yield {"step": step, "picture": to_picture(image), "distance": distances[step]}


def parse_arguments():
    parser = options.ArgumentParser(description="A page where one draws a hint and sees what a ControlNet makes of it.")
    add = parser.add_argument
    add("--base", help=options.BASE)
    told = f"a training's folder, with a slider through it; or {options.CONTROLNET} (default: the miniature's)"
    add("--run", "--controlnet", dest="controlnet", default=SHIPPED, help=told)
    add_options(parser)  # --detect, --canny-low, --canny-high
    options.add_placing(parser)  # --precision, --resolution, --device
    add("--port", type=options.port, default=7860, help="of the page's address (default: 7860)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    page = Page(args.port)  # a taken port is said before anything is loaded
    device = choose_device(args.device)
    paths, trained_with = find_checkpoints(args.controlnet)
    args.base, args.vae = args.base or trained_with.get("base", "tiny"), trained_with.get("vae", "")
    sd = load_to_sample(args, device)
    print(f"sampling on {describe(device)}")
    if load_decoder(sd.unet, paths[max(paths)]):
        raise UserError("this training changed the base's decoder too: the page can't show that; use sample.py")
    detect = detector(args.detect, args.canny_low, args.canny_high)
    resolution = args.resolution or trained_with.get("resolution", sd.preset.resolution)
    painter = Painter(sd, paths, resolution, detect)
    painter.controlnet(max(paths))  # so that a wrong file is reported before the page opens
    sd.unet.register_forward_pre_hook(lambda *_: page.check())  # at each DDIM step: does anyone still wait?
    page.serve(painter, CONTROL_MODES, args.detect, read_log(Path(args.controlnet) / "log.jsonl"))


if __name__ == "__main__":
    run_command_line(main, "a lower --resolution")
