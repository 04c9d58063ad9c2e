"""fitv2 sample: pictures from trained weights."""

import argparse
from typing import Any

from fitv2_scale.commands.parsing import make, show


def add(commands: Any) -> None:
    sample = make(commands, "sample", sample_pictures, "make pictures from a run's EMA weights")
    sample.add_argument("run", metavar="RUN")
    sample.add_argument("--size", action="append", metavar="HxW", help="pixels, multiples of 16; may be repeated")
    sample.add_argument("--columns", type=int, default=8, help="classes shown, spread evenly (default 8)")
    sample.add_argument("--cfg", type=float, default=1.5, help="guidance scale (default 1.5)")
    sample.add_argument("--steps", type=int, default=50, help="Euler steps (default 50)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", default="samples.png", metavar="FILE")


def sample_pictures(args: argparse.Namespace) -> int:
    from fitv2_scale.evaluate.from_run import sample_run

    sizes = args.size or ["256x256"]
    step = sample_run(args.run, args.out, sizes, args.columns, args.cfg, args.steps, args.seed)
    show(args, {"file": args.out, "step": step}, f"{args.out}: pictures from the EMA weights of step {step}")
    return 0
