"""What a run shows of its weights while it trains, and nothing in it notices: loss on held-out images, and pictures."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from data_sharding.errors import StorageDown
from data_sharding.storage.retry import RetryPolicy
from data_sharding.storage.store import Store
from data_sharding.stream.frames import FrameReader
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.evaluate.sampling.image_grid import decode, grid_png, grid_requests, spread_labels
from fitv2_scale.evaluate.sampling.sampler import sample
from fitv2_scale.evaluate.validation import Validation, held_out
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.world import World
from fitv2_scale.tracking.journal import Journal

log = logging.getLogger(__name__)


def validation_of(config: Config, data: Data, world: World, layout: Layout) -> Validation:
    """All ranks make it together. Raises UserError if there are no images for it, or they do not suit the data."""
    return Validation(
        held_out(data.plan.manifests, config.validation, config.model.classes),
        config.validation,
        cost=data.cost,
        shape=data.shapes[-1],
        world=world,
        layout=layout,
        reader=FrameReader(RetryPolicy(deadline=config.data.deadline_seconds)),
    )


@dataclass(frozen=True)
class Evaluation:
    """All ranks work on it together, each on its share. ``journal`` is rank 0's alone."""

    config: Config
    world: World
    layout: Layout
    data: Data
    engine: Engine
    validation: Validation | None
    journal: Journal | None
    store: Store

    @classmethod
    def open(
        cls,
        config: Config,
        world: World,
        layout: Layout,
        data: Data,
        engine: Engine,
        journal: Journal | None,
        store: Store,
    ) -> "Evaluation":
        """Raises UserError if something is asked for that the data cannot give: rather now than when it is due."""
        if config.sampling.every_steps:
            data.codec(config)
        validation = None
        if config.validation.every_steps:
            validation = validation_of(config, data, world, layout)
        return cls(config, world, layout, data, engine, validation, journal, store)

    def due(self, done: int) -> bool:
        """Whether there is something to show after ``done`` steps."""
        return self._validates(done) or self._pictures(done)

    def _validates(self, done: int) -> bool:
        return self._is_due(done, self.config.validation.every_steps)

    def _pictures(self, done: int) -> bool:
        return self._is_due(done, self.config.sampling.every_steps)

    def _is_due(self, done: int, every: int) -> bool:
        return bool(every) and (done % every == 0 or done == self.config.train.steps)

    def run(self, done: int, say: Callable[[str], None]) -> None:
        """Shows what is due. The weights are changed for a while, and back: nothing else may read them meanwhile."""
        losses = {}
        if self.validation and self._validates(done):
            losses["val_loss"] = self.validation.loss(self.engine.network)
        with self.engine.ema_weights():
            if self.validation and self._validates(done):
                losses["val_loss_ema"] = self.validation.loss(self.engine.network)
            if self._pictures(done):
                self._picture(done)
        if losses:
            say(f"step {done}: validation loss {losses['val_loss']:.4f}, of EMA weights {losses['val_loss_ema']:.4f}")
            if self.journal:
                self.journal.metrics(done, losses)

    def _picture(self, done: int) -> None:
        """Samples the configured grid, into samples/<step>.png."""
        config = self.config
        labels = spread_labels(config.sampling.columns, self.data.classes)
        requests = grid_requests(config.sampling.sizes, labels)
        made = sample(
            self.engine.network,
            requests,
            model=config.model,
            sampling=config.sampling,
            seed=config.seed,
            world=self.world,
            tensor=self.layout.tensor,
        )
        if self.journal:
            path, codec = f"samples/{done:08d}.png", self.data.codec(config)
            pictures = [decode(made[r].tokens, codec) for r in requests]
            try:
                self.store.put(path, grid_png(pictures, rows=len(config.sampling.sizes)))
                self.journal.picture(done, path)
            except (OSError, StorageDown) as error:
                log.warning("the pictures of step %d are lost: %s", done, error)
