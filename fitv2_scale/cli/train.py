"""fitv2 train."""

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from data_sharding.errors import UserError
from fitv2_scale.cli.common import before_joining, config_arguments
from fitv2_scale.run.stop_signals import STOP_SIGNALS

if TYPE_CHECKING:
    from fitv2_scale.config.schema import Config


def add(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a run in the processes that call this (plain, torchrun, srun or mpirun)",
        description="Train a run in the processes that call this (plain, torchrun, srun or mpirun). The same command "
        "again continues from the run's last commit.",
    )
    train.set_defaults(command=train_run, on_ranks=True)
    config_arguments(train)
    train.add_argument("--fork-from", metavar="RUN@STEP", help="start a new run from a commit of another run")
    train.add_argument("--supervise", action="store_true", help="start the processes here, and restart them until done")
    train.add_argument("--processes", type=int, metavar="N", help="with --supervise (default: one per GPU, else 1)")


# Not even `nohup` keeps srun from it; nor can a task, which it kills with SIGKILL.
_SRUN_KILLS = (
    "srun kills its tasks at once, unsaved, on SIGTERM and when its terminal closes: start it in tmux or with setsid, "
    "or use `fitv2 submit`; `scancel --signal=USR1 {job}` saves and ends"
)


def train_run(args: argparse.Namespace) -> int:
    from fitv2_scale.config.load import load_config

    if "RANK" in os.environ:  # held back until the trainer can note them: the other ranks would wait for one that died
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    with before_joining():
        if args.supervise and "RANK" in os.environ:
            raise UserError("--supervise starts the processes itself: call it once, without torchrun, srun and mpirun")
        if args.processes is not None and not args.supervise:
            raise UserError(
                f"--processes {args.processes} needs --supervise; without it, start the processes with torchrun "
                f"--nproc-per-node {args.processes} -m fitv2_scale.cli train …"
            )
        config = load_config(args.config, args.overrides)
    if args.launcher == "srun" and os.environ["RANK"] == "0":
        print(_SRUN_KILLS.format(job=os.environ["SLURM_JOB_ID"]), file=sys.stderr)
    if args.supervise:
        return _supervise(args, config)
    from fitv2_scale.train.loop import train

    return train(config, args.fork_from, True)


def _supervise(args: argparse.Namespace, config: "Config") -> int:
    import torch

    from launchers.supervise import supervise

    if not config.run:
        raise UserError("give the run's folder as run=FOLDER")
    command = [sys.executable, "-m", "fitv2_scale.cli", "train", args.config, *args.overrides]
    command += ["--fork-from", args.fork_from] if args.fork_from else []
    return supervise(config, command, args.processes or torch.cuda.device_count() or 1)
