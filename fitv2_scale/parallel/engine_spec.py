"""What an engine is built from, and the part of its construction that all engines share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fitv2_scale.config.layout import Checkpointing, Precision, Reshard
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.config.sections import OptimizerConfig
from fitv2_scale.model.block_parts import BlockParts
from fitv2_scale.model.counts import logical_shapes, trained_names
from fitv2_scale.model.float8 import LINEARS
from fitv2_scale.model.init import fill_initial
from fitv2_scale.model.linear import LinearFactory
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.parallel.blocks import prepare_blocks
from fitv2_scale.parallel.boxes import Box


@dataclass(frozen=True)
class EngineSpec:
    """The same on all ranks; what differs between ranks is in ``mesh.Groups``."""

    model: ModelConfig
    optimizer: OptimizerConfig
    ema_decay: float
    trainable: Sequence[str]  # patterns of the names of trained tensors
    seed: int
    precision: Precision
    compile_blocks: bool
    checkpointing: Checkpointing
    reshard_after_forward: Reshard
    prefetch_blocks: int
    parts: BlockParts

    @classmethod
    def of(cls, config: Config, on_cuda: bool) -> "EngineSpec":
        layout = config.layout
        return cls(
            model=config.model,
            optimizer=config.optimizer,
            ema_decay=config.ema.decay,
            trainable=config.trainable,
            seed=config.seed,
            precision=layout.precision,
            compile_blocks=layout.compiles(on_cuda),
            checkpointing=layout.checkpointing,
            reshard_after_forward=layout.reshard_after_forward,
            prefetch_blocks=layout.prefetch_blocks,
            parts=BlockParts.of(config.model, layout.gate_and_value, layout.kernels),
        )

    @property
    def linear(self) -> LinearFactory:
        """What makes linears where a rank works alone on a pack."""
        return LINEARS[self.precision]

    def network(self, linear: LinearFactory) -> DiffusionTransformer:
        """The network on the meta device: untrained tensors frozen, blocks checkpointed and compiled as asked for.

        Raises UserError if ``trainable`` matches no tensor.
        """
        with torch.device("meta"):
            network = DiffusionTransformer(self.model, linear, self.parts)
        freeze(network, self.trainable)
        prepare_blocks(network, self.checkpointing, self.compile_blocks)
        return network

    def fill(self, name: str, boxes: Iterable[Box]) -> None:
        """Fills ``boxes`` of the tensor ``name`` with its initial values."""
        shape = logical_shapes(self.model)[name]
        for box in boxes:
            fill_initial(box.tensor, name, shape, box.offset, self.seed, self.model)


def freeze(network: nn.Module, trainable: Sequence[str]) -> None:
    """Trains what a pattern of ``trainable`` matches, and nothing else. Raises UserError if that is nothing."""
    params = dict(network.named_parameters())
    trained = set(trained_names(params, trainable))
    for name, param in params.items():
        param.requires_grad_(name in trained)
