"""`fitv2 bench data --against`: the report agrees with the runs, and names loaders that are not installed."""

import json
import subprocess
import sys

import numpy as np
import pytest

from data_sharding.errors import UserError
from data_sharding.format.manifest import Manifest
from data_sharding.stream.frames import FrameReader, read_frame
from fitv2_scale.bench import compare_loaders
from fitv2_scale.bench.latents import write_latents
from fitv2_scale.bench.loaders import OURS, PEERS
from fitv2_scale.cli.__main__ import main

IMAGES = 96


def test_arrays_read_lazily_are_those_that_were_written(tmp_path):
    write_latents(tmp_path, IMAGES, [OURS])
    manifest = Manifest.load(str(tmp_path / OURS))
    for f in range(len(manifest.frame_shard)):
        frame, samples = FrameReader().read(manifest, f), read_frame(manifest, f)
        assert frame.ids.tolist() == [sample.id for sample in samples]
        for i, sample in enumerate(samples):
            for view, array in sample.views.items():
                assert np.array_equal(frame.view(i, view), array)
            if "crop" not in sample.views:
                with pytest.raises(KeyError):
                    frame.view(i, "crop")


def test_the_report_is_of_what_was_measured(capsys, tmp_path):
    """A real run, in processes of their own, with workers."""
    size = ["--images", "256", "--repeats", "2", "--seconds", "0.1", "--folder", str(tmp_path)]
    assert main(["bench", "data", "--json", "--against", "files", *size]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(run["way"], run["repeat"]) for run in report["runs"]] == [
        (way, repeat) for repeat in range(2) for way in (OURS, "files")
    ]
    assert all(run["cold"]["images"] == 256 and run["warm"]["images"] % 256 == 0 for run in report["runs"])
    ours, files = report["loaders"]
    rates = [run["cold"]["images"] / run["cold"]["seconds"] for run in report["runs"]]
    ratios = sorted((rates[0] / rates[1], rates[2] / rates[3]))
    assert files["cold_ratio"] == {"median": pytest.approx(sum(ratios) / 2), "least": ratios[0], "most": ratios[1]}
    assert ours["cold_images_per_second"]["most"] == max(rates[0], rates[2])
    tokens, seconds = (
        sum(run["warm"][key] for run in report["runs"] if run["way"] == OURS) for key in ("tokens", "seconds")
    )
    least, most = (ours["warm_mb_per_second"][key] for key in ("least", "most"))
    assert least <= tokens * 32 / seconds / 1e6 <= most
    rank = report["rank"]
    assert rank["steps"] == 1 and rank["step_seconds"] == pytest.approx(32 / 114) and 0 < rank["cpu_share"] < 10


def test_what_is_not_installed_is_left_out_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setitem(PEERS, "other", "no-such-distribution")
    loaders, left_out = compare_loaders.choose_loaders(["all"])
    assert "other" not in loaders and {OURS, "files"} <= set(loaders)
    assert "other is left out, no-such-distribution is not installed: pip install -e '.[peers]'" in left_out
    assert main(["bench", "data", "--against", "files", "other"]) == 2
    assert "other cannot be measured, no-such-distribution is not installed" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no loader 'wids' to compare with: choose webdataset, streaming, fi"):
        compare_loaders.choose_loaders(["wids"])


@pytest.mark.parametrize(
    "code,stderr,said",
    [(1, "Traceback\nValueError: no such frame\n", "ValueError: no such frame"), (-9, "", "its process ended with -9")],
)
def test_a_measurement_that_fails_is_a_sentence(tmp_path, monkeypatch, capsys, code, stderr, said):
    ended = subprocess.CompletedProcess([], code, "", stderr)
    monkeypatch.setattr(compare_loaders.subprocess, "run", lambda *_, **__: ended)
    write_latents(tmp_path, 256, [OURS])
    assert main(["bench", "data", "--against", "--images", "256", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(f"fitv2 cannot be measured: {said}\n")


def test_latents_that_are_there_are_kept(tmp_path):
    write_latents(tmp_path, IMAGES, ["files"])
    write_latents(tmp_path, IMAGES, ["files"])
    with pytest.raises(UserError, match='holds {"images": 96}, not {"images": 128}: choose another --folder'):
        write_latents(tmp_path, 128, ["files"])
    (tmp_path / "files" / "written.json").unlink()
    with pytest.raises(UserError, match="was not written completely: remove it"):
        write_latents(tmp_path, IMAGES, ["files"])


def test_peers_are_never_imported_unasked():
    code = (
        "import sys, fitv2_scale.bench.compare_loaders; sys.exit(bool({'webdataset', 'streaming'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
