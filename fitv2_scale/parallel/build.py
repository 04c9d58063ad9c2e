"""The engine that a config asks for."""

from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.fsdp import FSDPEngine
from fitv2_scale.parallel.mesh import make_groups
from fitv2_scale.parallel.world import World


def make_engine(config: Config, layout: Layout, world: World) -> Engine:
    """A freshly initialised engine; every rank of ``world`` calls this together."""
    return _engine_class(config.layout.engine)(
        config.model,
        config.optimizer,
        ema_decay=config.ema.decay,
        trainable=config.trainable,
        seed=config.seed,
        groups=make_groups(layout, world.device.type),
        precision=config.layout.precision,
        compile_blocks=config.layout.compiles(world.device.type == "cuda"),
        checkpointing=config.layout.checkpointing,
    )


def _engine_class(name: str) -> type[Engine]:
    if name == "fsdp":
        return FSDPEngine
    from fitv2_scale.parallel.zero3 import Zero3Engine  # needs DeepSpeed, which is an extra

    return Zero3Engine
