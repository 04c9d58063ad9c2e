"""Kernels that give the same bits each time: what the key ``deterministic`` asks of torch and its libraries."""

import os
import re
from collections.abc import Generator
from contextlib import contextmanager

import torch

from data_sharding.errors import UserError

_CUBLAS, _FIXED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # with other workspaces cuBLAS may add in any order
_REFUSED = re.compile(r"(\w+) does not have a deterministic implementation")  # of torch, whose advice is not for users


@contextmanager
def deterministic_kernels(wanted: bool) -> Generator[None]:
    """Inside, if ``wanted``, torch and its compiler use only kernels that give the same bits each time. To be entered
    before the first product on a GPU: cuBLAS then reads its variable, which is set unless it has a suitable value.

    Raises:
        UserError: torch has no such kernel for an operation.
    """
    if not wanted:
        yield
        return
    before, was = os.environ.get(_CUBLAS), torch.are_deterministic_algorithms_enabled()
    os.environ[_CUBLAS] = before if before in _FIXED else _FIXED[0]
    torch.use_deterministic_algorithms(True)  # not warn_only: the flash kernel takes that for no
    try:
        yield
    except RuntimeError as error:
        if (found := _REFUSED.search(str(error))) is None:
            raise
        raise UserError(
            f"deterministic is true, but torch {torch.__version__} has no deterministic kernel for {found[1]} here: "
            "set deterministic=false, or use another torch"
        ) from error
    finally:
        torch.use_deterministic_algorithms(was)
        if before is None:
            del os.environ[_CUBLAS]
        else:
            os.environ[_CUBLAS] = before
