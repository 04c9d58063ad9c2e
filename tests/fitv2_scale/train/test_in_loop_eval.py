"""What an evaluation inside of training measures, and with which weights."""

from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from fitv2_scale.parallel.failures import BrokenOff
from fitv2_scale.train.in_loop_eval import InLoopEvaluation


def never() -> None:
    """It is not broken off."""


@pytest.fixture
def told() -> list:
    return []


def evaluation(told: list, **due) -> InLoopEvaluation:
    """With networks that are named by their weights, whose losses are written down."""
    engine = SimpleNamespace(network="weights")

    @contextmanager
    def ema_weights():
        engine.network = "ema"
        try:
            yield
        finally:
            engine.network = "weights"

    engine.ema_weights = ema_weights

    def loss(network: str, between: Callable[[], None]) -> float:
        between()
        return {"weights": 0.5, "ema": 0.25}[network]

    made = object.__new__(InLoopEvaluation)
    made._engine, made._validation = engine, SimpleNamespace(loss=loss)
    sections = {name: SimpleNamespace(every_steps=due.get(name, 0)) for name in ("validation", "sampling")}
    made._config = SimpleNamespace(train=SimpleNamespace(steps=10), **sections)
    made._sample = lambda done, recorder, between: told.append((done, engine.network))
    return made


def test_losses_of_the_weights_and_of_their_average(told):
    recorder = SimpleNamespace(metrics=lambda step, losses: told.append((step, dict(losses))))
    losses = {"val_loss": 0.5, "val_loss_ema": 0.25}
    assert evaluation(told, validation=4).run(4, recorder, told.append, never) == losses
    assert told == ["step 4: validation loss 0.5000, with EMA weights 0.2500", (4, losses)]
    told.clear()
    assert evaluation(told, validation=4).run(5, recorder, told.append, never) == {} and told == []
    assert evaluation(told, validation=4).run(10, recorder, told.append, never) == losses  # the last step


def test_pictures_are_made_with_the_average(told):
    assert evaluation(told, sampling=3).run(6, None, told.append, never) == {} and told == [(6, "ema")]
    assert evaluation(told, sampling=3).run(7, None, told.append, never) == {} and len(told) == 1


@pytest.mark.parametrize("packs", [0, 1])
def test_what_is_broken_off_records_nothing_and_gives_the_weights_back(told, packs):
    left = [None] * packs

    def between() -> None:
        if not left:
            raise BrokenOff("SIGTERM")
        left.pop()

    made = evaluation(told, validation=4, sampling=4)
    assert made.run(4, None, told.append, between) == {}
    assert told == ["step 4: the evaluation is broken off and not recorded (SIGTERM)"]
    assert made._engine.network == "weights"
