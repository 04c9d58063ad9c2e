"""The engine that a config asks for."""

from fitv2_scale.config import Config
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.fsdp import FSDPEngine
from fitv2_scale.parallel.mesh import Layout
from fitv2_scale.parallel.world import World


def make_engine(config: Config, layout: Layout, world: World) -> Engine:
    """A freshly initialised engine; every rank of ``world`` calls this together."""
    on_cuda = world.device.type == "cuda"
    return FSDPEngine(
        config.model,
        config.optimizer,
        ema_decay=config.ema.decay,
        trainable=config.trainable,
        seed=config.seed,
        mesh=layout.device_mesh(world.device.type),
        precision=config.layout.precision,
        compile_blocks=on_cuda if config.layout.compile == "auto" else config.layout.compile,
    )
