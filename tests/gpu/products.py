"""The matrix products of a block, by the shapes of its weights."""

from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.counts import logical_shapes

_BLOCK = "blocks.0."
_OF_TOKENS = ("attn.", "mlp.")  # the block's other products have a row an image, not one a token


def token_products(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each product that a block computes for every token, by its name in the network."""
    shapes = {name.removeprefix(_BLOCK): s for name, s in logical_shapes(model).items() if name.startswith(_BLOCK)}
    return {
        name.removesuffix(".weight"): (shape[1], shape[0])
        for name, shape in shapes.items()
        if name.startswith(_OF_TOKENS) and len(shape) == 2
    }
