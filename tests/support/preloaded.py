"""What the forkserver of ``tests/support/ranks.py`` imports, once for all ranks: whatever of it this machine has.

Ranks are forks of it, and CUDA does not survive a fork. So nothing here may ask for a GPU; DeepSpeed does when it is
imported, and is left to the ranks themselves where one could be seen.
"""

import os
from contextlib import suppress
from importlib import import_module

from data_sharding.errors import UserError

_MODULES = (
    "torch",
    "torch.distributed.fsdp",
    "fitv2_scale.train.loop",
    "fitv2_scale.parallel.megatron",
    "s3fs",
    "hypothesis",  # it and pytest are imported by modules of tests
    "pytest",
    "tests.support.tiny_runs",
)
_DEEPSPEED = (
    "fitv2_scale.parallel.deepspeed_setup",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed imports it in time, and with it torch's compiler
)
_NO_GPU = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # as in all tests but those on a GPU

for _name in _MODULES + (_DEEPSPEED if _NO_GPU else ()):
    with suppress(ImportError, UserError):  # a rank that needs it says so
        import_module(_name)
