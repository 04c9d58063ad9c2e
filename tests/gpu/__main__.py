"""The command line: ``bash tests/gpu.sh`` calls it."""

import argparse
import os
import sys
from pathlib import Path

import torch

from tests.gpu.jobs import parts
from tests.gpu.report import to_markdown
from tests.gpu.results import merge, read, write
from tests.gpu.runner import run

_SECONDS = 550.0  # of ten minutes: before it packages are installed


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bash tests/gpu.sh")
    parser.add_argument(
        "what", choices=["1", "2", "3", "4", "report"], help="a part; or results of several folders in one"
    )
    parser.add_argument("folders", nargs="*", type=Path, help="report: where the results of the calls lie")
    parser.add_argument("--out", type=Path, help="folder of results (default gpu-results, or gpu-results/dry)")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help=f"time of the part (default {_SECONDS:.0f})")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in the smallest sizes")
    args = parser.parse_intermixed_args(words)
    folder, all_well = args.out or Path("gpu-results", *["dry"] * args.dry_run), True
    if args.what == "report":
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, merge(*map(read, args.folders or [folder])))
    elif args.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        all_well = run(parts(dry=True)[args.what], folder, args.seconds)
    elif torch.cuda.is_available():
        all_well = run(parts(dry=False)[args.what], folder, args.seconds)
    else:
        print("torch sees no GPU here: start this on a machine with one, or try it with --dry-run", file=sys.stderr)
        return 2
    (folder / "results.md").write_text(to_markdown(read(folder)))
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
