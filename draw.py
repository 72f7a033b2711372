"""Draw a hint in the browser and see what a ControlNet makes of it; scrub through the training that made it."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from support.command import run_command_line

import numpy as np
from PIL import Image
from torch import Tensor

from controlnet import CONTROL_MODES, ControlNet
from data import draw_outline, signed_distance
from sample import generate, load_to_sample, locate_controlnet
from stable_diffusion import StableDiffusion
from support import options
from support.checkpoints import find_snapshots
from support.detect import add_options, detector
from support.devices import choose_device, sampling_precision
from support.errors import UserError
from support.log import read_log
from support.pictures import fit_image, to_picture
from support.threads import as_it_happens
from weights import brings_decoder, load_controlnet

SHIPPED = Path(__file__).parent / "models" / "fill50k" / "controlnet.safetensors"


class Painter:
    """A base, and the ControlNets of one training by step; or a single one, whose step doesn't matter."""

    def __init__(self, sd: StableDiffusion, paths: dict[int, Path], resolution: int, detect: Callable):
        self.sd, self.paths, self.resolution, self.detect = sd, paths, resolution, detect
        self.controlnet = lru_cache(maxsize=2)(self.controlnet)
        self.alone = lru_cache(maxsize=32)(self.alone)  # it is the same for every hint and every step

    def controlnet(self, step: int) -> ControlNet:
        """That of the snapshot nearest to `step`. Raises UserError as load_controlnet does."""
        path = self.paths[min(self.paths, key=lambda other: abs(other - step))]
        controlnet = load_controlnet(path, self.sd.unet).requires_grad_(False)
        return controlnet.to(self.sd.device, self.sd.unet.encoder[0].conv.weight.dtype)

    def ring(self, x: float, y: float, radius: float) -> Tensor:
        """The hint [3, H, W] in [0, 1] of a circle; centre and radius are shares of the side."""
        rows, columns = (np.mgrid[: self.resolution, : self.resolution] + 0.5) / self.resolution
        outline = draw_outline(self.resolution * signed_distance("circle", columns - x, rows - y, radius))
        return fit_image(outline, self.resolution)

    def hint(self, picture: Image.Image) -> Tensor:
        """The hint [3, H, W] in [0, 1] that is found in a photograph, or that a picture is already."""
        return self.detect(fit_image(picture, self.resolution, square=False))

    def alone(self, size: tuple[int, int], prompt: str, **settings) -> Image.Image:
        """The base's own picture from the same noise, without a hint."""
        return to_picture(generate(self.sd, [], [], [prompt], size=size, **settings)[0])

    def sample(self, hint: Tensor, prompt: str, step: int, strength: float, mode: str, **settings) -> Image.Image:
        """What the snapshot nearest to `step` makes of the hint."""
        settings |= {"strengths": [strength], "control_mode": mode}
        return to_picture(generate(self.sd, [self.controlnet(step)], [hint[None]], [prompt], **settings)[0])

    def paint(self, hint: Tensor, **how) -> Iterator[Image.Image]:
        """The picture as predicted at each DDIM step, and at last the sample."""
        return as_it_happens(lambda show: self.sample(hint, watch=lambda images: show(to_picture(images[0])), **how))


def parse_arguments():
    parser = options.ArgumentParser(description="A page where one draws a hint and sees what a ControlNet makes of it.")
    add = parser.add_argument
    add("--base", help=options.BASE)
    add("--controlnet", help=f"{options.CONTROLNET} (default: the miniature's)")
    add("--run", type=Path, help="a training's folder, whose snapshots a slider moves through")
    add_options(parser)  # --detect, --canny-low, --canny-high
    options.add_placing(parser)  # --precision, --resolution, --device
    add("--port", type=options.port, default=7860, help="of the page's address (default: 7860)")
    args = parser.parse_args()
    if args.run and (args.base or args.controlnet):
        raise UserError("--run brings its base and its ControlNets: leave out --base and --controlnet")
    if find_spec("gradio") is None:
        raise UserError("the page needs gradio: pip install -r requirements-app.txt")
    return args


def main() -> None:
    args = parse_arguments()
    device = choose_device(args.device)
    if args.run:
        trained_with, paths = find_snapshots(args.run)
        args.base, args.resolution = trained_with["base"], args.resolution or trained_with["resolution"]
    else:
        paths = {0: locate_controlnet(args.controlnet or SHIPPED)}
    if brings_decoder(paths[max(paths)]):
        raise UserError("this training changed the base's decoder too: the page can't show that; use sample.py")
    sd, _ = load_to_sample(args.base or "tiny", [], device, sampling_precision(args.precision, device))
    detect = detector(args.detect, args.canny_low, args.canny_high)
    painter = Painter(sd, paths, args.resolution or sd.preset.resolution, detect)
    painter.controlnet(max(paths))  # so that a wrong file is reported before the page opens

    from support.page import show_page  # which needs gradio, an extra

    show_page(painter, CONTROL_MODES, read_log(args.run / "log.jsonl") if args.run else [], args.port)


if __name__ == "__main__":
    run_command_line(main, "a lower --resolution")
