"""A record of what was trained on: proof that two runs, or two layouts, trained on the same.

With ``train.audit`` each rank that reads appends a line per step to attempts/<n>/audit/rank-00000.jsonl:

    {"step": 7, "epoch": [0, 0], "id": [51, 902], "t": ["3f1a2b3c", "3e99aa01"], "noise": ["9f…", "04…"]}

``t`` is the bits of each image's float32 time, ``noise`` the xxh3_64 of the integers behind its noise.
"""

import json
from pathlib import Path

import numpy as np
import torch
import xxhash

from data_sharding.rng import Purpose
from data_sharding.stream.batch import Pack, StepBatch
from fitv2_scale.config.model import FlowConfig
from fitv2_scale.model.flow import noise_words, sample_t


class BatchAudit:
    def __init__(self, folder: Path, rank: int, flow: FlowConfig, seed: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank-{rank:05d}.jsonl"
        self._flow, self._seed = flow, seed

    def record(self, batch: StepBatch) -> None:
        line: dict = {"step": batch.step, "epoch": [], "id": [], "t": [], "noise": []}
        for pack in batch.packs:
            real = np.flatnonzero(pack.weight)
            epoch, ids = torch.from_numpy(pack.epoch[real]), torch.from_numpy(pack.sample_id[real])
            t_I = sample_t(self._flow.t_sampler, self._seed, epoch, ids)
            line["epoch"] += epoch.tolist()
            line["id"] += ids.tolist()
            line["t"] += [f"{bits:08x}" for bits in t_I.numpy().view(np.uint32).tolist()]
            line["noise"] += [self._noise_digest(pack, slot) for slot in real.tolist()]
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _noise_digest(self, pack: Pack, slot: int) -> str:
        tokens = torch.from_numpy(pack.layout.image == slot)
        epoch_T, id_T = (torch.from_numpy(a[pack.layout.image])[tokens] for a in (pack.epoch, pack.sample_id))
        words_TC = noise_words(Purpose.NOISE, self._seed, epoch_T, id_T, torch.from_numpy(pack.layout.place)[tokens])
        return xxhash.xxh3_64_hexdigest(words_TC.numpy().astype("<u4").tobytes())
