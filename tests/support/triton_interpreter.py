"""Kernels on the CPU by Triton's interpreter, which must be asked for before Triton is imported: in another process."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """What calls a function with arguments in a process where Triton's kernels are interpreted."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned, initializer=_ask) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)


def _ask() -> None:
    """Triton 3.6, which torch 2.11 brings, makes an integer of an array of one in a way that NumPy 2.4 refuses."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = with_index
