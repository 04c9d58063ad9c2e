"""Training that waits before a step: what a test does then comes before that step, however slow the machine is."""

import time
from pathlib import Path

import fitv2_scale.train.loop as module
from fitv2_scale.train.loop import train
from tests.support.waiting import wait


def train_paused(config, taken: int, until: str = "") -> int:
    """Trains. The step after the first ``taken`` waits for the file ``until``; without one, it waits to be killed."""
    train_step = module.train_step

    def step(engine, batch, *rest):
        if batch.step == taken:
            wait("the file", Path(until).exists) if until else time.sleep(10**6)
        return train_step(engine, batch, *rest)

    module.train_step = step
    return train(config)
