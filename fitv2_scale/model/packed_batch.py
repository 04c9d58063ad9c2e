"""A packed batch: the tokens of many images end to end, at a static shape.

T tokens, I image slots. Real images come first; the remaining tokens are padding images of weight zero in the next
slots, none longer than ``max_seqlen``; the slots after them hold no tokens. So every token belongs to an image, no
attention row is empty, and the shape of a batch does not depend on its content.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. The host does not wait for the copy, which to CUDA is from pinned memory."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Packing:
    """Which tokens belong to which image."""

    cu_seqlens_I1: Tensor  # int32 (I + 1,), cumulative lengths, last = T
    image_T: Tensor  # int64 (T,), the slot of each token
    place_T: Tensor  # int64 (T,), the token's index inside its image, row-major
    positions_T3: Tensor  # int64 (T, 3), (time, row, column) of the token in its image; time is 0
    max_seqlen: int  # no image is longer; the same for all packs of an attempt

    def to(self, device: torch.device) -> "Packing":
        return Packing(
            cu_seqlens_I1=to_device(self.cu_seqlens_I1, device),
            image_T=to_device(self.image_T, device),
            place_T=to_device(self.place_T, device),
            positions_T3=to_device(self.positions_T3, device),
            max_seqlen=self.max_seqlen,
        )

    @property
    def positions_T2(self) -> Tensor:
        """(row, column) of each token."""
        return self.positions_T3[:, 1:]

    @property
    def sizes_I2(self) -> Tensor:
        """(rows, columns) of each slot, int64 (I, 2), from the last positions; (1, 1) where there are none."""
        last_I2 = torch.zeros(self.cu_seqlens_I1.numel() - 1, 2, dtype=torch.int64, device=self.image_T.device)
        return last_I2.scatter_reduce_(0, self.image_T[:, None].expand(-1, 2), self.positions_T2, "amax") + 1

    @property
    def knows_lengths(self) -> bool:
        """Whether the host can ask how long each image is: on a CPU, unless the code is being compiled, which would be
        done again for the lengths of each pack."""
        return self.cu_seqlens_I1.device.type == "cpu" and not torch.compiler.is_compiling()

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each slot, for the host; asks the device for them, so only if ``knows_lengths``."""
        return self.cu_seqlens_I1.diff().tolist()

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Indices for attention over images padded to (I, L = max_seqlen), for devices without a varlen kernel.

        Returns (token of each padded place (I*L,), padded place of each token (T,), key mask (I, 1, 1, L)).
        """
        start_I1 = self.cu_seqlens_I1.long()
        place_L = torch.arange(self.max_seqlen, device=start_I1.device)
        token_IL = (start_I1[:-1, None] + place_L).clamp(max=self.image_T.numel() - 1)
        mask_IL = place_L < start_I1.diff()[:, None]
        # An empty slot would be a row of -inf, whose softmax is NaN and poisons the gradient of the clamped token.
        mask_IL[:, 0] = True
        return token_IL.flatten(), self.image_T * self.max_seqlen + self.place_T, mask_IL[:, None, None, :]


@dataclass(frozen=True)
class PackedBatch:
    """One pack of a training step."""

    latents_TC: Tensor  # float32 (T, C), zero at padding
    packing: Packing
    label_I: Tensor  # int64 (I,), 0 at padding
    weight_I: Tensor  # float32 (I,), 1 / (images of the global batch), 0 at padding
    sample_id_I: Tensor  # int64 (I,), 0 at padding
    epoch_I: Tensor  # int64 (I,), the epoch of each image

    def to(self, device: torch.device) -> "PackedBatch":
        return PackedBatch(
            latents_TC=to_device(self.latents_TC, device),
            packing=self.packing.to(device),
            label_I=to_device(self.label_I, device),
            weight_I=to_device(self.weight_I, device),
            sample_id_I=to_device(self.sample_id_I, device),
            epoch_I=to_device(self.epoch_I, device),
        )
