"""What stands before python in a job whose ranks are to fail (``slurm.wrap``):

    python faulty_rank.py FAULT python -u -m launchers.rank train config.yaml

FAULT is ``step:3``, an exception in the step after step 3; or ``node:node1``, the end of any rank on that node.
"""

import os
import sys

import fitv2_scale.train
from launchers import rank

kind, _, which = sys.argv[1].partition(":")
sys.argv = sys.argv[sys.argv.index("launchers.rank") :]
if kind == "node" and os.environ["SLURMD_NODENAME"] == which:
    sys.exit(1)
if kind == "step":
    train_step = fitv2_scale.train.train_step

    def fail(session, batch):
        if batch.step == int(which):
            raise RuntimeError(f"planned failure at step {which}")
        return train_step(session, batch)

    fitv2_scale.train.train_step = fail
sys.exit(rank.main())
