"""Draw pairs like fill50k's into a folder of its layout: python -m tools.draw_pairs --count 1000 --output FOLDER."""

from pathlib import Path

from tqdm import tqdm

from data import draw_fill50k
from support.errors import UserError, run_command_line
from support.listing import write_folder
from support.options import ArgumentParser, positive_int, seed


def main() -> None:
    parser = ArgumentParser(
        prog="python -m tools.draw_pairs", description="Draw pairs like fill50k's into a folder of its layout."
    )
    parser.add_argument("--count", type=positive_int, default=100, help="pairs (default: 100)")
    parser.add_argument("--output", type=Path, required=True, help="folder for prompt.json, source/ and target/")
    parser.add_argument("--size", type=positive_int, default=512, help="pixels a side (default: 512)")
    parser.add_argument("--seed", type=seed, default=0)
    args = parser.parse_args()
    if args.output.is_dir() and any(args.output.iterdir()):
        raise UserError(f"{args.output} holds files already: choose another --output")
    indices = tqdm(range(args.count), desc="drawing")
    write_folder(args.output, (draw_fill50k(i, args.size, args.seed) for i in indices))


if __name__ == "__main__":
    run_command_line(main)
