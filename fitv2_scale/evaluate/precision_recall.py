"""Precision and recall by nearest neighbours (Kynkäänniemi et al., arXiv 1904.06991), in memory that does not grow with
the square of the number of images.

The manifold of a set is the union of the balls around its features, with the distance to the third nearest other
feature as radius. Precision is the share of generated images inside the manifold of the real ones; recall is the
reverse. ADM's evaluator does the same in float16 where that does not overflow; here it is float64.
"""

import numpy as np
import torch
from torch import Tensor

from data_sharding.errors import UserError
from fitv2_scale.evaluate.fid import check_finite

NEIGHBOURS = 3
_BLOCK = 4096  # rows and columns of the distances in memory at once: 128 MiB


def precision_recall(
    generated: np.ndarray,
    real: np.ndarray,
    k: int = NEIGHBOURS,
    device: torch.device | str = "cpu",
    block: int = _BLOCK,
) -> tuple[float, float]:
    """Precision and recall from features (N, D) of generated and (M, D) of real images.

    Raises:
        UserError: features of different sizes, not finite, or of too few images.
    """
    if generated.shape[1] != real.shape[1]:
        raise UserError(
            f"generated images have {generated.shape[1]} features and real ones {real.shape[1]}: use one network"
        )
    for name, features in (("generated", generated), ("real", real)):
        check_finite(features, f"{name} features")
        if len(features) <= k:
            raise UserError(f"{len(features)} {name} images are too few for {k} neighbours: give at least {k + 1}")
    # Distances are differences of large sums, which are smaller around a common centre.
    centre_D = torch.from_numpy(real.mean(0, dtype=np.float64)).to(device)
    made_ND, real_MD = (torch.from_numpy(features).to(device).double() - centre_D for features in (generated, real))
    made_N, real_M = _radii(made_ND, k, block), _radii(real_MD, k, block)
    return _inside(made_ND, real_MD, real_M, block), _inside(real_MD, made_ND, made_N, block)


def _radii(x_ND: Tensor, k: int, block: int) -> Tensor:
    """Squared distance from each row to its k-th nearest other row, (N,)."""
    radii = []
    for rows in x_ND.split(block):
        nearest = rows.new_empty(len(rows), 0)
        for columns in x_ND.split(block):
            both = torch.cat((nearest, _squared_distances(rows, columns)), 1)
            nearest = both.topk(min(k + 1, both.shape[1]), largest=False).values  # one of them is the row itself
        radii.append(nearest[:, k])
    return torch.cat(radii)


def _inside(x_ND: Tensor, centres_MD: Tensor, radii_M: Tensor, block: int) -> float:
    """Share of the rows that lie in at least one ball."""
    count = 0
    for rows in x_ND.split(block):
        found = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for centres, radii in zip(centres_MD.split(block), radii_M.split(block), strict=True):
            found |= (_squared_distances(rows, centres) <= radii).any(1)
        count += int(found.sum())
    return count / len(x_ND)


def _squared_distances(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    squares = a_ND.square().sum(1, keepdim=True) + b_MD.square().sum(1)
    return torch.addmm(squares, a_ND, b_MD.T, alpha=-2).clamp_(min=0)
