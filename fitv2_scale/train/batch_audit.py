"""A record of what was trained on: proof that two runs, or two layouts, trained on the same.

With ``train.audit`` each rank that reads appends a line per step to attempts/<n>/audit/rank-00000.jsonl:

    {"step": 7, "epoch": [0, 0], "id": [51, 902], "t": ["3f1a2b3c", "3e99aa01"], "label": [3, 5],
     "dropped": [false, true], "x": ["9f…", "04…"], "target": ["7a…", "c3…"]}

Everything is taken from the tensors that the step handed to the network and to the loss; nothing is computed again:

    t       the bits of the image's float32 time: a number in (0, 1) of a flow, the level 0 .. 999 of a DDPM
    label   as the network got it: the dataset's, or the number of classes if it was dropped
    dropped whether it was
    x       xxh3_64 of the noised tokens, float32, little-endian, in token order: t x1 + (1 - t) x0 of a flow
    target  the same of what the network is to predict: the velocity x1 - x0 of a flow, the noise of a DDPM

So x and target tell the latents and the noise apart: of a flow, x - t target is the noise. An image's record does not
depend on its rank, its pack or its neighbours. Between a CPU and a GPU a last bit may differ.
"""

import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from fitv2_scale.model.objective import NoisedBatch
from fitv2_scale.model.packed_batch import PackedBatch

log = logging.getLogger(__name__)


class Audit(Protocol):
    def add(self, batch: PackedBatch, noised: NoisedBatch) -> None:
        """Takes down what one pack of a step is trained on."""

    def write(self, step: int) -> None:
        """Records the packs added since the last call, as those of ``step`` (counted from 0)."""


class NullAudit:
    """Records nothing, and costs nothing."""

    def add(self, batch: PackedBatch, noised: NoisedBatch) -> None:
        pass

    def write(self, step: int) -> None:
        pass


class BatchAudit:
    """Waits for the device at each pack, to read what it holds.

    A line that cannot be written, as on a full disk, ends the record of this attempt and not the attempt: a warning
    says so, once. A later line would stand behind a gap, or behind half a line.
    """

    def __init__(self, folder: Path, rank: int):
        self._ended = False
        self._path = folder / f"rank-{rank:05d}.jsonl"
        self._columns: dict[str, list] = defaultdict(list)

    def add(self, batch: PackedBatch, noised: NoisedBatch) -> None:
        if self._ended:
            return
        real = batch.weight_I.nonzero()[:, 0]  # an image has a weight, a slot of padding has none
        columns = {
            "epoch": batch.epoch_I[real].tolist(),
            "id": batch.sample_id_I[real].tolist(),
            "t": [f"{bits & 0xFFFFFFFF:08x}" for bits in noised.t_I[real].view(torch.int32).tolist()],
            "label": noised.label_I[real].tolist(),
            "dropped": (noised.label_I != batch.label_I)[real].tolist(),
            "x": _digests(noised.x_TC, batch, real.tolist()),
            "target": _digests(noised.target_TC, batch, real.tolist()),
        }
        for name, values in columns.items():
            self._columns[name] += values

    def write(self, step: int) -> None:
        if self._ended:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a") as file:
                file.write(json.dumps({"step": step} | self._columns) + "\n")
        except OSError as error:
            self._ended = True
            log.warning("%s ends before step %d; training continues: %s", self._path, step, error)
        self._columns.clear()


def _digests(values_TC: Tensor, batch: PackedBatch, slots: list[int]) -> list[str]:
    values, ends = values_TC.cpu().numpy().astype("<f4"), batch.packing.cu_seqlens_I1.tolist()
    return [xxhash.xxh3_64_hexdigest(values[ends[slot] : ends[slot + 1]].tobytes()) for slot in slots]
