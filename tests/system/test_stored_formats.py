"""What is stored is frozen: the bytes of a commit, and the form of every record beside it.

Runs and datasets outlive the program that wrote them, and other programs read them. If a test here fails, make sure
that what was stored before is still read (test_old_run.py); only then renew its number. All numbers were taken
with the code of commit a2e80d5.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from fitv2_scale.run.run import Run
from fitv2_scale.tracking.journal import Journal
from tests.support.checkpoint_state import State, opened, saver
from tests.support.ranks import run_ranks

# What differs from run to run: moments, and what is drawn so that no two writers are taken for each other.
DRAWN = {
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00": "TIME",
    r'(?<="time_ms":)\d{13}': "0",
    r'(?<="nonce": ")[0-9a-f]{16}(?=")': "NONCE",
    r'(?<="id": "run-)[0-9a-f]{8}(?=")': "DRAWN",
}


def fixed(file: Path) -> str:
    """The file's text, with a word for everything that differs from run to run."""
    text = file.read_text()
    for pattern, word in DRAWN.items():
        text = re.sub(pattern, word, text)
    return text


def record(**fields: Any) -> str:
    """A record as files of a run hold it: indented by one, in this order."""
    return json.dumps(fields, indent=1)


class Counted(State):
    """Numbers that count on from the step, in 256ths: no generator, so the same bits on every machine."""

    def expected(self, step: int) -> dict[str, torch.Tensor]:
        found, at = {}, step
        for name, shape in self.shapes.items():
            size = torch.Size(shape).numel()
            found[name] = torch.arange(at, at + size, dtype=torch.float32).reshape(shape) / 256
            at += size
        return found


def commit_step_3(url: str) -> str | None:
    with opened({}, url) as (world, run):
        return saver(world, run, Counted, rows=5)(3)


def test_the_bytes_of_a_commit_are_frozen(tmp_path):
    """Of two ranks. There is no time and no nonce in a commit; they are in the log's entry."""
    run = tmp_path / "run"
    assert run_ranks(2, commit_step_3, str(run)) == [None, None]
    folder = run / "steps" / "00000003.0001"
    files = {file.relative_to(run).as_posix(): file.read_bytes() for file in folder.iterdir()}
    assert {Path(path).name for path in files} == {"manifest.json", *(f"rank-0000{r}.safetensors" for r in (0, 1))}

    manifest = json.loads(files["steps/00000003.0001/manifest.json"])
    assert list(manifest) == [
        *("format", "step", "attempt", "cursor", "scalars", "accounting", "moments", "files", "tensors"),
    ]
    assert list(manifest["cursor"]) == ["plan_hash", "ledger", "schedule", "epoch", "window", "images"]
    assert manifest["files"]["rank-00000.safetensors"] == {
        "bytes": 14832,
        "xxh3_128": ["05cce323390ba28c244052c213678506"],
    }
    assert manifest["tensors"]["param/w"] == {
        "shape": [5, 1200],
        "boxes": [
            {"offset": [0, 0], "shape": [3, 1200], "file": "rank-00000.safetensors", "begin": 368},
            {"offset": [3, 0], "shape": [2, 1200], "file": "rank-00001.safetensors", "begin": 360},
        ],
    }
    digest = hashlib.sha256()
    for path, data in sorted(files.items()):
        digest.update(f"{path} {len(data)}\n".encode() + data)
    assert digest.hexdigest() == "5ab9471209aabe59ac9ef30e97ce6c60ce48504ba783dd74e9d5af7a32153f34"
    assert fixed(run / "log" / "00000002") == (
        '{"n": 2, "kind": "COMMIT", "attempt": 1, "nonce": "NONCE", "time": "TIME", "step": 3, '
        '"path": "steps/00000003.0001", '
        '"manifest": "4fbf397fc81ca3df581dafb5200dbcf7872caa9ea66ebcf4a1e0a08d62eb5afb"}'
    )


def test_the_identity_of_a_run_is_frozen(tmp_path):
    half = {"seed": 5, "optimizer": {"lr": 1e-3, "eps": 1e-8}, "data": {"views": "mixed"}, "trainable": ["büste.*"]}
    whole = {**half, "run": "run", "layout": {}}
    parent = {"run": "first-0123abcd", "url": "/runs/first", "step": 100}
    Run.open_or_create(str(tmp_path / "run"), whole, half, "77e1", parent)
    assert fixed(tmp_path / "run" / "run.json") == record(
        id="run-DRAWN",
        created="TIME",
        config=whole,
        recipe=half,
        recipe_hash="b960ae8984d968a238561ef3c7eaa3fc79d2bdeec45604f1f2692396b47ab4d4",
        plan_hash="77e1",
        parent=parent,
    )


def test_the_records_of_attempts_are_frozen(tmp_path):
    run = Run.open_or_create(str(tmp_path / "run"), {}, {}, None)
    made_of = {"python": "3.11.2", "packages": {"torch": "2.13.0"}, "gpus": []}
    attempt = run.claim(made_of)
    attempt.retire(attempt.commit(10, "steps/00000010.0001", "0c9d").n)
    run.log.stop()
    attempt.record_pace(1.25, 40.0)
    attempt.end(75, "SIGUSR1")
    written = '"attempt": 1, "nonce": "NONCE", "time": "TIME"'
    assert {file.name: fixed(file) for file in (tmp_path / "run" / "log").iterdir()} == {
        "00000001": f'{{"n": 1, "kind": "CLAIM", {written}}}',
        "00000002": f'{{"n": 2, "kind": "COMMIT", {written}, "step": 10, "path": "steps/00000010.0001", '
        '"manifest": "0c9d"}',
        "00000003": f'{{"n": 3, "kind": "RETIRE", {written}, "entry": 2}}',
        "00000004": f'{{"n": 4, "kind": "STOP", {written}, "at_once": false}}',
    }
    assert {file.name: fixed(file) for file in (tmp_path / "run" / "attempts" / "1").iterdir()} == {
        "start.json": record(attempt=1, time="TIME", **made_of, changed=[]),
        "pace.json": record(step_seconds=1.25, save_seconds=40.0),
        "end.json": record(attempt=1, time="TIME", code=75, reason="SIGUSR1"),
    }


def test_the_lines_of_a_journal_are_frozen(tmp_path):
    journal = Journal(tmp_path, 3, 100)
    journal.metrics(101, {"loss": 0.5, "grad_norm": float("nan"), "images": 12})
    journal.picture(101, "samples/00000101.png")
    journal.seal()
    assert fixed(tmp_path / "journal" / "00000.jsonl").splitlines() == [
        '{"attempt":3,"start_step":100}',
        '{"step":101,"time_ms":0,"metrics":{"loss":0.5,"grad_norm":NaN,"images":12.0}}',
        '{"step":101,"time_ms":0,"picture":"samples/00000101.png"}',
    ]


def test_the_manifest_of_a_dataset_is_frozen(stored_samples):
    """What of it does not depend on zstd's version, which decides how many bytes a frame has."""
    path, _ = stored_samples
    header = json.loads((path / "manifest.json").read_text())
    assert (header["format"], header["version"]) == ("fitv2-shards", 1)
    assert list(header) == [
        *("format", "version", "class_count", "codec", "dtype", "max_tokens", "classes"),
        *("shards", "columns", "totals", "source"),
    ]
    assert list(header["shards"][0]) == ["name", "bytes", "samples", "frames", "xxh3_128"]
    assert list(header["totals"]) == ["samples", "frames", "bytes", "skipped"]
    columns = header["columns"]
    sizes = {name: columns.pop(name)["bytes"] for name in ("frame_offset.npy", "frame_bytes.npy", "frame_digest.npy")}
    assert sizes == {"frame_offset.npy": 168, "frame_bytes.npy": 168, "frame_digest.npy": 208}
    assert columns == {
        "frame_shard.npy": {"bytes": 148, "xxh3_128": "817742befa2ae1bb6736f10b998bfdb3"},
        "frame_raw_bytes.npy": {"bytes": 168, "xxh3_128": "6c539f304185d29949437f70b4bbb0fd"},
        "frame_first.npy": {"bytes": 176, "xxh3_128": "e4533c6b096fcc14e91afd5903c17a86"},
        "sample_id.npy": {"bytes": 1056, "xxh3_128": "a19cb6569e831784198299a65a0ed327"},
        "label.npy": {"bytes": 592, "xxh3_128": "94b1d8d25ce44c192c427f373d280176"},
        "size.npy": {"bytes": 1056, "xxh3_128": "b707f19a344254379db125239906bd18"},
    }
