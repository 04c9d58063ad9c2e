"""What stands before python in a job whose ranks are to fail (``slurm.wrap``):

    python faulty_rank.py FAULT python -u -m fitv2_scale.cli.slurm_task train config.yaml

FAULT is ``step:3``, an exception in the step after step 3; or ``unfit:node1``: that node's temporary folder is full.
"""

import os
import shutil
import sys
from types import SimpleNamespace

import fitv2_scale.train.loop
from fitv2_scale.cli import slurm_task

kind, _, which = sys.argv[1].partition(":")
sys.argv = sys.argv[sys.argv.index("fitv2_scale.cli.slurm_task") :]
if kind == "unfit" and os.environ["SLURMD_NODENAME"] == which:
    shutil.disk_usage = lambda folder: SimpleNamespace(free=0)
if kind == "step":
    train_step = fitv2_scale.train.loop.train_step

    def fail(engine, batch, *rest):
        if batch.step == int(which):
            raise RuntimeError(f"planned failure at step {which}")
        return train_step(engine, batch, *rest)

    fitv2_scale.train.loop.train_step = fail
sys.exit(slurm_task.main())
