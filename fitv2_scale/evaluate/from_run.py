"""``fitv2 sample``: pictures from the newest whole commit of a run."""

from pathlib import Path

from data_sharding.codec import codec_of
from data_sharding.errors import UserError
from data_sharding.manifest import Manifest
from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.config import parse_config
from fitv2_scale.engines import make_engine
from fitv2_scale.evaluate.pictures import decode, grid_png, grid_requests
from fitv2_scale.evaluate.sampler import sample
from fitv2_scale.parallel.mesh import Layout
from fitv2_scale.parallel.world import join
from fitv2_scale.run import Run

_LAYOUT = {"engine": "fsdp", "replicate": 1, "tensor": 1}  # pictures need none of what the training was spread over


def sample_run(run_url: str, out: str, sizes: list[str], columns: int, cfg: float, steps: int, seed: int) -> int:
    """Writes a grid of pictures, a row a size and a column a class, to ``out``; returns the step of the weights."""
    run = Run.open(run_url)
    config = parse_config(run.config | {"layout": run.config["layout"] | _LAYOUT}, f"{run.url}/run.json")
    manifest = Manifest.load(config.data.urls[0])
    requests = grid_requests(sizes, columns, len(manifest.classes))
    with join() as world:
        engine = make_engine(config, Layout.of(world.size, replicate=1), world)
        restored = Checkpointer(run, None, 0, world).restore(engine, run)
        if restored is None:
            raise UserError(f"{run.url} has no commit yet")
        with engine.ema_weights():
            made = sample(
                engine.network, requests, classes=config.model.classes, cfg=cfg, steps=steps, seed=seed, world=world
            )
        if world.is_first:
            codec = codec_of(manifest.header.codec, config.sampling.vae)
            pictures = [decode(made[r.index], codec) for r in requests]
            Path(out).write_bytes(grid_png(pictures, rows=len(sizes)))
    return restored.step
