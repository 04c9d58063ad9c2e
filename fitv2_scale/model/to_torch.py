"""Packs of NumPy arrays to the network's tensors."""

import torch

from data_sharding.plan.pack_layout import PackLayout
from data_sharding.stream.batch import Pack
from fitv2_scale.model.packed_batch import PackedBatch, Packing, to_device


def packing_to_torch(layout: PackLayout) -> Packing:
    return Packing(
        cu_seqlens_I1=torch.from_numpy(layout.cu_seqlens),
        image_T=torch.from_numpy(layout.image),
        place_T=torch.from_numpy(layout.place),
        positions_T3=torch.from_numpy(layout.positions),
        max_seqlen=layout.max_seqlen,
    )


def pack_to_torch(pack: Pack, device: torch.device) -> PackedBatch:
    """The pack on ``device``; the copies may still be running when this returns."""
    batch = PackedBatch(
        latents_TC=to_device(torch.from_numpy(pack.latents), device).float(),  # half the bytes to copy
        packing=packing_to_torch(pack.layout),
        label_I=torch.from_numpy(pack.label),
        weight_I=torch.from_numpy(pack.weight),
        sample_id_I=torch.from_numpy(pack.sample_id),
        epoch_I=torch.from_numpy(pack.epoch),
    )
    return batch.to(device)
