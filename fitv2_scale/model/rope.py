"""2-D rotary position embedding as released: half of head_dim turns with the row, then half with the column."""

import torch
from torch import Tensor


def rope_table(positions_T2: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (T, head_dim / 2), one angle for each pair of channels (2i, 2i + 1).

    Per axis: frequencies theta ** (-2i / (head_dim / 2)) for i < head_dim / 4. ``positions_T2`` is (row, column).
    """
    axis_dim = head_dim // 2
    exponent = torch.arange(0, axis_dim, 2, device=positions_T2.device, dtype=torch.float64) / axis_dim
    angle_T2F = positions_T2[:, :, None] * theta**-exponent
    angle_TF = angle_T2F.flatten(1).float()
    return angle_TF.cos(), angle_TF.sin()


def rotate(x_THD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Turns each pair of channels of q or k by its token's angle, in float32; the result has x's dtype."""
    even, odd = x_THD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).type_as(x_THD)
