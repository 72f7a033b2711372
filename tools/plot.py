"""Plot the logs of trainings: python -m tools.plot runs/controlnet/log.jsonl --output convergence.png."""

from pathlib import Path

from support.command import run_command_line

from convergence import plot_convergence
from support.errors import UserError
from support.log import read_log
from support.options import ArgumentParser, png


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.plot", description="Plot the logs of trainings.")
    parser.add_argument("log", nargs="+", type=Path, help="log.jsonl of a run; several are drawn over each other")
    parser.add_argument("--output", type=png, default=Path("convergence.png"), help="default: convergence.png")
    args = parser.parse_args()
    logs = {path.parent.name if path.stem == "log" else path.stem: read_log(path) for path in args.log}
    if len(logs) < len(args.log):
        raise UserError(f"two of the logs have the same name, of {', '.join(logs)}: copy one to another name")
    if empty := [path for path, log in zip(args.log, logs.values()) if not log]:
        raise UserError(f"{empty[0]} has no entries: pass a run's log.jsonl")
    plot_convergence(logs, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command_line(main)
