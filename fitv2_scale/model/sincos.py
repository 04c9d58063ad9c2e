"""The fixed table of sines and cosines that DiT and SiT add to the tokens, by formula: it is no weight and in no
checkpoint.

A token at row r and column c of a network of width D gets [sin c w, cos c w, sin r w, cos r w], with the frequencies
w_i = 10000^(-i / (D/4)), i < D/4; the column comes first (facebookresearch/DiT, models.py, get_2d_sincos_pos_embed).

L is ``SincosConfig.train_side``. For an image of H x W tokens, the modes (as FiT and FiTv2 compare them, arXiv
2402.12376, Tab. IV-VI) are

    none    r and c as they are
    pi      r L/H and c L/W: the positions span as much as in training, also in images smaller than L x L
    ei      the table of L x L tokens, resized to H x W bilinearly (half-pixel centres, no antialiasing)

and for H = W = L all are the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fitv2_scale.config.model import SincosConfig
from fitv2_scale.model.packed_batch import Packing

_BASE = 10000.0


def sincos_table(packing: Packing, configs: SincosConfig | Sequence[SincosConfig], hidden: int) -> Tensor:
    """What is added to each token, float32 (T, D). ``configs`` is one for all images or one per slot of the pack."""
    images = packing.cu_seqlens_I1.numel() - 1
    configs = [configs] * images if isinstance(configs, SincosConfig) else configs
    if all(config.mode == "none" for config in configs):
        return _of_places(packing, hidden)
    low_T2, high_T2, part_T2 = _between(packing, packing.positions_T2.double(), configs)
    # Row and column have channels of their own, so what is bilinear in both is linear in each.
    row_TE, column_TE = (
        torch.lerp(_waves(low_T2[:, axis], hidden), _waves(high_T2[:, axis], hidden), part_T2[:, axis, None])
        for axis in (0, 1)
    )
    return torch.cat((column_TE, row_TE), -1).float()


def _of_places(packing: Packing, hidden: int) -> Tensor:
    """With positions as they are, as in each step of a training: few are different, and are computed once."""
    place_P = torch.arange(packing.max_seqlen, device=packing.image_T.device, dtype=torch.float64)
    table_PE = _waves(place_P, hidden).float()
    return torch.cat([table_PE.index_select(0, packing.positions_T2[:, axis]) for axis in (1, 0)], -1)


def _waves(position_T: Tensor, hidden: int) -> Tensor:
    """Sines, then cosines, float64 (T, D / 2)."""
    quarter = hidden // 4
    exponent_F = torch.arange(quarter, device=position_T.device, dtype=torch.float64) / quarter
    angle_TF = position_T[:, None] * _BASE**-exponent_F
    return torch.cat((angle_TF.sin(), angle_TF.cos()), -1)


def _between(packing: Packing, position_T2: Tensor, configs: Sequence[SincosConfig]) -> tuple[Tensor, Tensor, Tensor]:
    """Two positions for each token and axis, and how far from the first to the second its value lies."""
    device = position_T2.device
    side_T1 = torch.tensor([c.train_side for c in configs], device=device)[packing.image_T, None].double()
    mode_I = torch.tensor([("none", "pi", "ei").index(c.mode) for c in configs], device=device)
    is_pi_T1, is_ei_T1 = ((mode_I == number)[packing.image_T, None] for number in (1, 2))
    stretch_T2 = side_T1 / packing.sizes_I2[packing.image_T]
    source_T2 = ((position_T2 + 0.5) * stretch_T2 - 0.5).clamp(min=0)
    below_T2 = torch.minimum(source_T2.floor(), side_T1 - 1)
    above_T2 = torch.minimum(below_T2 + 1, side_T1 - 1)
    single_T2 = torch.where(is_pi_T1, position_T2 * stretch_T2, position_T2)
    return (
        torch.where(is_ei_T1, below_T2, single_T2),
        torch.where(is_ei_T1, above_T2, single_T2),
        torch.where(is_ei_T1, source_T2 - below_T2, 0.0),
    )
