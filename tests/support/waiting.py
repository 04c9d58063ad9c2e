"""Waits for another thread or process as long as a busy machine may take, and fails with what was waited for."""

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 300.0  # seconds; less than pytest's own limit for a test


def wait(what: str, ready: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Until ``ready()`` is true, whose value it gives."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.005)
    return found
