"""2-D rotary position embedding as released: one half of head_dim rotates with the row, the other with the column."""

import torch
from torch import Tensor


def rope_table(positions_T2: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (T, head_dim / 2), one angle for each pair of channels (2i, 2i + 1).

    ``positions_T2`` is (row, column).
    """
    return table(positions_T2, axis_frequencies(head_dim, theta, positions_T2.device))


def axis_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta ** (-2i / (head_dim / 2)) for i < head_dim / 4, float64: radians per token, along either axis."""
    axis_dim = head_dim // 2
    exponent_F = torch.arange(0, axis_dim, 2, device=device, dtype=torch.float64) / axis_dim
    return theta**-exponent_F


def table(positions_T2: Tensor, frequency_F: Tensor, factor_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin, float32, times ``factor_T`` if given; ``frequency_F`` is (F,), or (T, 2, F) for each token's own."""
    angle_TF = (positions_T2[:, :, None] * frequency_F).flatten(1).float()
    cos_TF, sin_TF = angle_TF.cos(), angle_TF.sin()
    if factor_T is None:
        return cos_TF, sin_TF
    factor_T1 = factor_T.float()[:, None]
    return cos_TF * factor_T1, sin_TF * factor_T1


def by_channel(cos_TF: Tensor, sin_TF: Tensor) -> tuple[Tensor, Tensor]:
    """A table as ``rotate`` takes it, (T, head_dim): what each channel and its neighbour are multiplied by."""
    return cos_TF.repeat_interleave(2, -1), torch.stack((-sin_TF, sin_TF), -1).flatten(-2)


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotates each pair of channels of q or k by its token's angle, in float32; the result has x's dtype.

    (a, b) becomes (a, b) * cos + (b, a) * (-sin, sin), in operations on whole rows: the compiler fuses them with the
    norm before, in both passes, which it does not if each half of the result has its own formula.
    """
    x = x_THD.float()
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack((odd, even), -1).flatten(-2)
    return (x * cos_TD[:, None] + swapped * sin_TD[:, None]).type_as(x_THD)
