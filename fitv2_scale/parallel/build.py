"""The engine that a config asks for."""

from collections.abc import Callable

from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.engine_spec import EngineSpec
from fitv2_scale.parallel.fsdp import FSDPEngine
from fitv2_scale.parallel.gpu_kernels import require_float8
from fitv2_scale.parallel.mesh import Groups, make_groups
from fitv2_scale.parallel.world import World


def _zero3(spec: EngineSpec, groups: Groups) -> Engine:
    from fitv2_scale.parallel.zero3 import Zero3Engine  # needs DeepSpeed, which is an extra

    return Zero3Engine(spec, groups)


_ENGINES: dict[str, Callable[[EngineSpec, Groups], Engine]] = {"fsdp": FSDPEngine, "zero3": _zero3}


def make_engine(config: Config, layout: Layout, world: World) -> Engine:
    """A freshly initialised engine; every rank of ``world`` calls this together. Raises UserError if a rank's GPU lacks
    what it computes with."""
    require_float8(config.layout, world.device)
    spec = EngineSpec.of(config, on_cuda=world.device.type == "cuda")
    return _ENGINES[config.layout.engine](spec, make_groups(layout, world.device.type))
