"""What srun starts as each task of a job: `fitv2 ARGUMENTS…`, with the environment of a rank.

    python -m fitv2_scale.cli.slurm_task train config.yaml

A module of its own, since Slurm's variables do not tell a task from a shell that `salloc` or `srun --pty` opened.
Under ``train``, the signals that ask to save are held back from the first line on: one that comes while torch is being
imported is delivered when the trainer can note it, not lost and not fatal.
"""

import os
import signal
import sys
from typing import Any

from data_sharding.errors import UserError
from data_sharding.standard_streams import dropping
from fitv2_scale.run.differences import flatten
from fitv2_scale.run.redact import HIDDEN
from fitv2_scale.run.stop_signals import STOP_SIGNALS
from launchers.rank import cache_environment, check_node, rank_environment
from launchers.secret_overrides import of_environment


def main() -> int:
    arguments, secret = sys.argv[1:], of_environment(os.environ)
    training = arguments[0] == "train"
    if training:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        arguments += secret
    os.environ.update(rank_environment(os.environ) | cache_environment(os.environ))
    node = os.environ.get("SLURMD_NODENAME")
    print(f"== job {os.environ['SLURM_JOB_ID']} task {os.environ['RANK']} on {node}", flush=True)

    # Not at the top: signals are held back before anything that takes time.
    from fitv2_scale.cli.__main__ import exit_code_of, run_command
    from fitv2_scale.config.load import load_config
    from fitv2_scale.run.run import GIVE_UP, RETRY

    def run() -> int:
        if training:
            # A rank that cannot read it exits; srun then ends the others, which may be joining another rank's check.
            config = load_config(arguments[1], secret)
            _refuse_hidden(config.model_dump(mode="json"))
            if config.slurm.doctor and (code := check_node(config, node)) is not None:
                return code
        return run_command(arguments)

    code = exit_code_of(run)
    # That an attempt wants another one, or none, is in its end.json. To srun it would be a failure: it would end the
    # other ranks, who may be writing their last lines, and blame this node if others do not come.
    return 0 if training and code in (RETRY, GIVE_UP) else code


def _refuse_hidden(config: dict[str, Any]) -> None:
    """Raises UserError if the job did not get a secret that its config file leaves out."""
    if hidden := [key for key, value in flatten(config).items() if HIDDEN in str(value)]:
        raise UserError(
            f"{hidden[0]} is {HIDDEN} in this job: its secret travels in the environment, which the job did not get; "
            "submit without --export in slurm.extra"
        )


if __name__ == "__main__":
    with dropping():
        sys.exit(main())
