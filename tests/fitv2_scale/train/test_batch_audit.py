"""The record of what was trained on, where it cannot be written."""

import json
import os
from types import SimpleNamespace

import torch

from fitv2_scale.train.batch_audit import BatchAudit

IMAGE = {"weight_I": [1.0], "epoch_I": [0], "sample_id_I": [51], "label_I": [3]}


def add_image(audit: BatchAudit) -> None:
    """One of two tokens at t = 1, whose label was dropped."""
    batch = SimpleNamespace(**{name: torch.tensor(values) for name, values in IMAGE.items()})
    batch.packing = SimpleNamespace(cu_seqlens_I1=torch.tensor([0, 2]))
    tokens_TC = torch.zeros(2, 16)
    audit.add(batch, SimpleNamespace(t_I=torch.ones(1), label_I=torch.tensor([5]), x_TC=tokens_TC, target_TC=tokens_TC))


def test_a_disk_that_is_full_ends_the_record_and_not_the_training(tmp_path, caplog):
    """For good: a line that is missing, or of which half was written, is the last."""
    audit = BatchAudit(tmp_path / "audit", 0)
    add_image(audit)
    audit.write(0)
    file = tmp_path / "audit/rank-00000.jsonl"
    file.rename(tmp_path / "begun")
    os.symlink("/dev/full", file)  # each write to it fails with ENOSPC
    for step in (1, 2):
        add_image(audit)
        audit.write(step)
    file.unlink()
    add_image(audit)
    audit.write(3)
    assert not file.exists()
    (warning,) = caplog.messages
    assert warning == f"{file} ends before step 1; training continues: [Errno 28] No space left on device"
    (line,) = map(json.loads, (tmp_path / "begun").read_text().splitlines())
    assert (line["step"], line["id"], line["t"], line["label"], line["dropped"]) == (0, [51], ["3f800000"], [5], [True])
