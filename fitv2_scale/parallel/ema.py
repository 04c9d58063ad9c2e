"""Exchanges the weights and the EMA, and back, so that the network computes with the EMA for a while."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exchanged(pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]], loaded: Callable[[], None]) -> Generator[None]:
    """Inside, the weights hold the values of the EMA, and the EMA those of the weights; afterwards all is as before,
    bit for bit.

    ``pairs`` gives this rank's part of each tensor's weights and EMA: live memory. ``loaded`` is called after each of
    the two exchanges (see ``Engine``).
    """
    _exchange(pairs())
    loaded()
    try:
        yield
    finally:
        _exchange(pairs())
        loaded()


@torch.no_grad()
def _exchange(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Through a copy of one tensor at a time: engines hold on to the memory of their shards, only values may move."""
    for weights, ema in pairs:
        before = ema.clone()
        ema.copy_(weights)
        weights.copy_(before)
