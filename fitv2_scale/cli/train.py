"""fitv2 train."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from data_sharding.errors import UserError
from fitv2_scale.cli.common import config_arguments

if TYPE_CHECKING:
    from fitv2_scale.config.schema import Config


def add(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a run in the processes that call this (plain, torchrun or srun)",
        description="Train a run in the processes that call this (plain, torchrun or srun). The same command again "
        "continues from the run's last commit.",
    )
    train.set_defaults(command=train_run)
    config_arguments(train)
    train.add_argument("--fork-from", metavar="RUN@STEP", help="start a new run from a commit of another run")
    train.add_argument("--supervise", action="store_true", help="start the processes here, and restart them until done")
    train.add_argument("--processes", type=int, metavar="N", help="with --supervise (default: one per GPU, else 1)")


def train_run(args: argparse.Namespace) -> int:
    from fitv2_scale.config.load import load_config

    config = load_config(args.config, args.overrides)
    if args.supervise:
        return _supervise(args, config)
    from fitv2_scale.train.loop import train

    return train(config, args.fork_from)


def _supervise(args: argparse.Namespace, config: "Config") -> int:
    import torch

    from launchers.supervise import supervise

    if not config.run:
        raise UserError("give the run's folder as run=FOLDER")
    command = [sys.executable, "-m", "fitv2_scale.cli", "train", args.config, *args.overrides]
    command += ["--fork-from", args.fork_from] if args.fork_from else []
    return supervise(config, command, args.processes or torch.cuda.device_count() or 1)
