"""The forward pass of FiTv2, FiT, DiT and SiT for one image in float64, from the formulas of their papers (arXiv
2410.13925, 2402.12376, 2212.09748, 2401.08740) and released codes.

Plain functions of a dictionary of weights under their public names; no packing, no batch.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """What defines a network."""

    depth: int = 2
    hidden: int = 32
    heads: int = 2
    classes: int = 5
    qk_norm: str = "layernorm"
    adaln: str = "lora"
    mlp: str = "swiglu"
    position: str = "rope"
    channels: int = 16  # of a token
    outputs: int = 1  # numbers a channel

    @property
    def units(self) -> int:
        """FiTv2's SwiGLU has two thirds of 4 * hidden units, rounded down."""
        return 8 * self.hidden // 3 if self.mlp == "swiglu" else 4 * self.hidden


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def normalized(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without parameters."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return normalized(x) * (1 + scale) + shift


def time_embedding(weights: Weights, t: float) -> Tensor:
    """[cos, sin] of t, not scaled, at 128 frequencies from 1 down to 1/10,000; then an MLP."""
    frequency = torch.tensor([10000 ** (-k / 128) for k in range(128)], dtype=torch.float64)
    wave = torch.cat(((t * frequency).cos(), (t * frequency).sin()))
    return linear(weights, "t_embedder.mlp.2", F.silu(linear(weights, "t_embedder.mlp.0", wave)))


def rotated(x: Tensor, rows: int, columns: int) -> Tensor:
    """x (tokens, heads, size): pairs of channels turned, those of the first half by the row, the others by the
    column."""
    size = x.shape[-1]
    frequency = torch.tensor([10000 ** (-4 * k / size) for k in range(size // 4)], dtype=torch.float64)
    row = torch.arange(rows).repeat_interleave(columns)[:, None] * frequency
    column = torch.arange(columns).repeat(rows)[:, None] * frequency
    turn = torch.polar(torch.ones(len(x), size // 2, dtype=torch.float64), torch.cat((row, column), -1))
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], size // 2, 2))
    return torch.view_as_real(pairs * turn[:, None]).reshape(x.shape)


def table(rows: int, columns: int, hidden: int) -> Tensor:
    """DiT's (tokens, hidden), element by element: a quarter of sines of the column, one of cosines, then the row's."""
    quarter = hidden // 4
    values = [
        [
            wave(place / 10000 ** (k / quarter))
            for place in (c, r)
            for wave in (math.sin, math.cos)
            for k in range(quarter)
        ]
        for r in range(rows)
        for c in range(columns)
    ]
    return torch.tensor(values, dtype=torch.float64)


def gelu(x: Tensor) -> Tensor:
    """Its approximation by tanh."""
    return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def attended(weights: Weights, block: str, x: Tensor, form: Form, rows: int, columns: int) -> Tensor:
    """Softmax attention of an image's tokens among themselves."""
    tokens, hidden = x.shape
    size = hidden // form.heads
    q, k, v = linear(weights, f"{block}.attn.qkv", x).reshape(tokens, 3, form.heads, size).unbind(1)
    scale: Tensor | float = 1 / math.sqrt(size)
    if form.qk_norm == "layernorm":
        q, k = normalized(q), normalized(k)
    elif form.qk_norm == "l2_scale":
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        scale = weights[f"{block}.attn.qk_scale"][:, None, None]
    if form.position == "rope":
        q, k = rotated(q, rows, columns), rotated(k, rows, columns)
    logits = torch.einsum("ihd,jhd->hij", q, k) * scale
    mixed = torch.einsum("hij,jhd->ihd", logits.softmax(-1), v)
    return linear(weights, f"{block}.attn.proj", mixed.reshape(tokens, hidden))


def velocity(weights: Weights, form: Form, x: Tensor, t: float, label: int, rows: int, columns: int) -> Tensor:
    """Of the noised tokens x (rows * columns, channels) of one image, float64: (rows * columns, outputs * channels)."""
    c = time_embedding(weights, t) + weights["y_embedder.embedding_table.weight"][label]
    x = linear(weights, "x_embedder.proj", x)
    if form.position == "sincos":
        x = x + table(rows, columns, form.hidden)
    for block in (f"blocks.{i}" for i in range(form.depth)):
        modulation = linear(weights, f"{block}.adaLN_modulation.1", F.silu(c))
        if form.adaln == "lora":
            modulation = linear(weights, f"{block}.adaLN_modulation.2", modulation)
            modulation = modulation + linear(weights, "global_adaLN_modulation.1", F.silu(c))
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6)
        x = x + gate_attn * attended(weights, block, modulated(x, shift_attn, scale_attn), form, rows, columns)
        inner = modulated(x, shift_mlp, scale_mlp)
        if form.mlp == "gelu":
            hidden = gelu(linear(weights, f"{block}.mlp.fc1", inner))
        else:
            hidden = F.silu(linear(weights, f"{block}.mlp.fc1_g", inner)) * linear(weights, f"{block}.mlp.fc1_x", inner)
        x = x + gate_mlp * linear(weights, f"{block}.mlp.fc2", hidden)
    shift, scale = linear(weights, "final_layer.adaLN_modulation.1", F.silu(c)).chunk(2)
    return linear(weights, "final_layer.linear", modulated(x, shift, scale))


def shapes(form: Form) -> dict[str, tuple[int, ...]]:
    """Of every tensor, by its public name."""
    hidden, units, rank = form.hidden, form.units, form.hidden // 4
    linears = {
        "x_embedder.proj": (hidden, form.channels),
        "t_embedder.mlp.0": (hidden, 256),
        "t_embedder.mlp.2": (hidden, hidden),
        "final_layer.linear": (form.outputs * form.channels, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }
    if form.adaln == "lora":
        linears["global_adaLN_modulation.1"] = (6 * hidden, hidden)
    for i in range(form.depth):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * hidden, hidden),
            f"blocks.{i}.attn.proj": (hidden, hidden),
            f"blocks.{i}.mlp.fc2": (hidden, units),
        }
        for name in ("fc1",) if form.mlp == "gelu" else ("fc1_g", "fc1_x"):
            linears[f"blocks.{i}.mlp.{name}"] = (units, hidden)
        if form.adaln == "lora":
            linears[f"blocks.{i}.adaLN_modulation.1"] = (rank, hidden)
            linears[f"blocks.{i}.adaLN_modulation.2"] = (6 * hidden, rank)
        else:
            linears[f"blocks.{i}.adaLN_modulation.1"] = (6 * hidden, hidden)
    found: dict[str, tuple[int, ...]] = {"y_embedder.embedding_table.weight": (form.classes + 1, hidden)}
    if form.qk_norm == "l2_scale":
        found |= {f"blocks.{i}.attn.qk_scale": (form.heads,) for i in range(form.depth)}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found
