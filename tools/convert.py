"""Turn a ControlNet's file into another program's layout: python -m tools.convert IN OUT --layout diffusers."""

from pathlib import Path

from support.command import run_command_line

import torch

from formats.networks import read_controlnet, refuse_own, unet_config
from names import TABLES
from support.errors import UserError, warn
from support.files import read_tensors
from support.options import ArgumentParser
from unet import UNet
from weights import load_controlnet, save_controlnet

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.convert", description="Write a ControlNet in another layout.")
    parser.add_argument("source", metavar="IN", type=Path, help="a ControlNet's file or diffusers folder")
    parser.add_argument("output", metavar="OUT", type=Path, help="a .safetensors file, for diffusers a folder")
    parser.add_argument("--layout", choices=("official", "diffusers"), required=True, help="of OUT")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: fp32")
    args = parser.parse_args()
    if args.layout == "official" and args.output.suffix != ".safetensors":
        raise UserError(f"{args.output}: must end in .safetensors for --layout official")
    if args.layout == "diffusers" and args.output.is_file():
        raise UserError(f"{args.output} is a file, but --layout diffusers writes a folder: choose another OUT")

    part = read_controlnet(args.source)
    refuse_own(part)
    with torch.device("meta"):
        unet = UNet(unet_config(part))
    tensors = read_tensors(args.source)[0] if "unlock_decoder" in part.metadata else {}
    decoder = {name: tensor for name, tensor in tensors.items() if name.startswith(TABLES[UNet][0])}
    kept = {key: value for key, value in part.metadata.items() if key != "format"}
    save_controlnet(load_controlnet(part, unet), args.output, args.layout, kept, decoder, DTYPES[args.dtype])
    print(f"{args.source}: ControlNet in the {part.layout.name} layout, {len(part.tensors)} tensors")
    if decoder and args.layout == "diffusers":
        warn("the decoder that was trained with it stays behind, because diffusers' layout has no place for it: "
             "pictures will differ")  # fmt: skip
    print(f"wrote {args.output}, {args.layout} layout, {args.dtype}")


if __name__ == "__main__":
    run_command_line(main)
