"""Rewrites a commit as the ranks of another layout would have saved it, in one process."""

import json
from collections.abc import Iterator

import torch

from fitv2_scale.checkpoint.commit import commit_folder, read_manifest
from fitv2_scale.checkpoint.commit_files import CommitReader, box_record, file_record, write_manifest
from fitv2_scale.checkpoint.safetensors_file import TensorToWrite, write_safetensors
from fitv2_scale.run.log import LogEntry
from fitv2_scale.run.run import Attempt, Run

_REWRITTEN = ("format", "files", "tensors")


def reshard_commit(source: Run, entry: LogEntry, target: Run, ranks: int) -> None:
    """Commits the contents of ``entry`` of ``source`` to ``target``, with the rows of each tensor divided evenly among
    ``ranks``. One tensor is in memory at a time."""
    manifest = read_manifest(source, entry)
    reader = CommitReader(source.store, entry.fields["path"], manifest)
    attempt: Attempt = target.claim({})
    folder = commit_folder(manifest["step"], attempt.number)
    boxes: dict[str, list[dict]] = {name: [] for name in manifest["tensors"]}
    files: dict[str, dict] = {}
    for rank in range(ranks):
        parts = list(_parts(reader, manifest["tensors"], rank, ranks))
        file = f"rank-{rank:05d}.safetensors"
        written = write_safetensors(target.store, f"{folder}/{file}", [part for _, _, part in parts])
        files[file] = file_record(written)
        for name, offset, part in parts:
            boxes[name].append(box_record(offset, part.shape, file, written.begins[part.key]))
    tensors = {name: {"shape": t["shape"], "boxes": boxes[name]} for name, t in manifest["tensors"].items()}
    header = {key: value for key, value in manifest.items() if key not in _REWRITTEN}
    text = json.dumps(tensors).encode()
    attempt.commit(manifest["step"], folder, write_manifest(target.store, folder, header, files, text))


def _parts(
    reader: CommitReader, tensors: dict, rank: int, ranks: int
) -> Iterator[tuple[str, tuple[int, ...], TensorToWrite]]:
    """Tensor name, offset and file entry of each box of the rank."""
    for name, tensor in tensors.items():
        rows, *rest = tensor["shape"]
        first, last = (rows * r // ranks for r in (rank, rank + 1))
        if last > first:
            offset = (first, *[0] * len(rest))
            read = lambda name=name, first=first, last=last: reader.read_tensor(name)[first:last]  # noqa: E731
            yield (
                name,
                offset,
                TensorToWrite(f"{name}@{','.join(map(str, offset))}", torch.float32, (last - first, *rest), read),
            )
