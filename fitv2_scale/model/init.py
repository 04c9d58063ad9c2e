"""Initial weights: the released distributions, each value keyed by (seed, tensor name, element).

So a value does not depend on the rank that draws it: any rank can fill any box of any tensor, and all layouts start
equal.
"""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data_sharding.rng import Purpose
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.model.rng import normal, uniform, words

_CHUNK = 1 << 20  # elements drawn at once: bounds the int64 temporaries
_EMBEDDING_STD = 0.02
_ZERO = (  # write to the residual stream's gates or to the output, so that the first output is exactly 0
    "adaLN_modulation.1.weight",  # as the full head, the global head and the final layer's; lora's up factor is .2
    "adaLN_modulation.2.weight",
    "final_layer.linear.weight",
)


def fill_initial(
    out: Tensor, name: str, shape: Sequence[int], offset: Sequence[int], seed: int, config: ModelConfig
) -> None:
    """Fills ``out``, the box at ``offset`` of the logical tensor ``name`` of ``shape``, with its initial values.

    Linear weights are Xavier-uniform (qkv as one matrix), biases zero; the label table and the timestep MLP are
    N(0, 0.02); the last AdaLN linears and the final linear are zero. ``qk_scale`` starts at sqrt(head_dim), the scale
    of logits between LayerNorm'd q and k.
    """
    if name.endswith("qk_scale"):
        out.fill_(math.sqrt(config.head_dim))
    elif name.endswith(".bias") or _starts_at_zero(name, config):
        out.zero_()
    elif name.startswith(("y_embedder.", "t_embedder.")):
        _draw(out, name, shape, offset, seed, lambda w: _EMBEDDING_STD * normal(w))
    else:
        bound = math.sqrt(6.0 / (shape[0] + shape[1]))
        _draw(out, name, shape, offset, seed, lambda w: bound * (2.0 * uniform(w) - 1.0))


def tensor_id(name: str) -> int:
    """The id that keys a tensor's values: 63 bits of BLAKE2b of its logical name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def _starts_at_zero(name: str, config: ModelConfig) -> bool:
    lora_down = config.adaln == "lora" and name.startswith("blocks.") and name.endswith("adaLN_modulation.1.weight")
    return name.endswith(_ZERO) and not lora_down


def _draw(
    out: Tensor, name: str, shape: Sequence[int], offset: Sequence[int], seed: int, values: Callable[[Tensor], Tensor]
) -> None:
    """Element e of the matrix, row-major, is value e of the keyed stream; columns outside the box are dropped."""
    assert out.dim() == 2
    columns, (row0, column0) = shape[1], offset
    step = max(1, _CHUNK // columns)
    for i in range(0, out.shape[0], step):
        rows = min(step, out.shape[0] - i)
        first, last = (row0 + i) * columns, (row0 + i + rows) * columns
        block = torch.arange(first // 4, -(-last // 4), device=out.device)
        flat = values(words(seed, Purpose.INIT, 0, tensor_id(name), block)).flatten()
        full = flat[first - first // 4 * 4 :][: last - first].view(rows, columns)
        out[i : i + rows].copy_(full[:, column0 : column0 + out.shape[1]])
