"""Evaluation during training, which changes nothing of it: the loss on held-out images, and sampled pictures."""

from collections.abc import Callable

from data_sharding.format.manifest import Manifest
from data_sharding.storage.retry import RetryPolicy
from data_sharding.stream.frames import FrameReader
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.evaluate.sampling.image_grid import decode, evenly_spaced_labels, grid_png, grid_requests
from fitv2_scale.evaluate.sampling.sampler import sample
from fitv2_scale.evaluate.validation import Validation, held_out
from fitv2_scale.model.objectives import make_objective
from fitv2_scale.parallel.agreement import Facts, read_alike
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.failures import BrokenOff
from fitv2_scale.parallel.world import World
from fitv2_scale.train.recorder import Recorder


def validation_of(config: Config, data: Data, world: World, layout: Layout) -> Validation:
    """All ranks make it together. Raises UserError if there are no images for it, they do not suit the data, or the
    ranks do not have the same."""

    def read() -> tuple[list[Manifest], Facts]:
        manifests = held_out(data.plan.manifests, config.validation)
        return manifests, {f"digest of validation dataset {i}": m.digest for i, m in enumerate(manifests)}

    return Validation(
        read_alike(world, read),
        config.validation,
        objective=make_objective(config, world.device),
        cost=data.cost,
        shape=data.shapes[0][-1],  # whatever the batch has become: losses on held-out images stay comparable
        world=world,
        layout=layout,
        token_grid=data.plan.token_grid,
        reader=FrameReader(RetryPolicy(deadline=config.data.deadline_seconds)),
    )


class InLoopEvaluation:
    """Made and called by all ranks together; each does its part of the work."""

    def __init__(self, config: Config, world: World, layout: Layout, data: Data, engine: Engine):
        """Raises UserError if the data cannot give what the config asks for: now, not at the step when it is due."""
        self._config, self._world, self._layout, self._data = config, world, layout, data
        self._engine = engine
        if config.sampling.every_steps:
            read_alike(world, lambda: (None, {"digest of the codec": data.codec(config).digest}))
        self._validation = validation_of(config, data, world, layout) if config.validation.every_steps else None

    def due(self, done: int) -> bool:
        """Whether there is something to evaluate after ``done`` steps."""
        return self._is_due(done, self._config.validation.every_steps) or self._sampling_due(done)

    def _sampling_due(self, done: int) -> bool:
        return self._is_due(done, self._config.sampling.every_steps)

    def _is_due(self, done: int, every: int) -> bool:
        return bool(every) and (done % every == 0 or done == self._config.train.steps)

    def run(
        self, done: int, recorder: Recorder, say: Callable[[str], None], between: Callable[[], None]
    ) -> dict[str, float]:
        """Evaluates what is due after ``done`` steps; returns the validation losses, the same on all ranks, or {}.
        Meanwhile the engine holds the EMA in place of the weights, so nothing else may read them.

        Before each pack and each call of the network, all ranks call ``between``, which may raise BrokenOff on all of
        them: then nothing is recorded, and {} returned.
        """
        try:
            losses = self._run(done, recorder, between)
        except BrokenOff as reason:
            say(f"step {done}: the evaluation is broken off and not recorded ({reason})")
            return {}
        if losses:
            say(f"step {done}: validation loss {losses['val_loss']:.4f}, with EMA weights {losses['val_loss_ema']:.4f}")
            recorder.metrics(done, losses)
        return losses

    def _run(self, done: int, recorder: Recorder, between: Callable[[], None]) -> dict[str, float]:
        validation = self._validation if self._is_due(done, self._config.validation.every_steps) else None
        losses = {}
        if validation:
            losses["val_loss"] = validation.loss(self._engine.network, between)
        with self._engine.ema_weights():
            if validation:
                losses["val_loss_ema"] = validation.loss(self._engine.network, between)
            if self._sampling_due(done):
                self._sample(done, recorder, between)
        return losses

    def _sample(self, done: int, recorder: Recorder, between: Callable[[], None]) -> None:
        """Samples the configured grid."""
        config = self._config
        labels = evenly_spaced_labels(config.sampling.columns, self._data.classes)
        requests = grid_requests(config.sampling.sizes, labels, config.model.pixels_per_token)
        made = sample(
            self._engine.network,
            requests,
            model=config.model,
            objective=config.objective,
            sampling=config.sampling,
            seed=config.seed,
            world=self._world,
            tensor=self._layout.tensor,
            between=between,
        )

        def png() -> bytes:
            codec = self._data.codec(config)
            return grid_png([decode(made[r].tokens, codec) for r in requests], rows=len(config.sampling.sizes))

        recorder.picture(done, png)
