"""The table of `fitv2 bench scale`: its shape, its growth, and that a small one is measured."""

import json

import pytest

from fitv2_scale.bench import scale
from fitv2_scale.cli.__main__ import main
from fitv2_scale.data import Data


def test_rows_are_those_of_all_parts_with_the_growth_between_numbers_of_ranks(monkeypatch):
    parts = (
        lambda ranks: {("a", "ms"): 0.5 * ranks, ("b", "s"): 3.0},
        lambda ranks: {("c", "MB"): ranks**2 / 1000, ("d", "s"): ranks - 8},
    )
    monkeypatch.setattr(scale, "PARTS", parts)
    rows = scale.measure([1024, 8, 8])
    assert json.loads(json.dumps(scale.to_json(rows))) == {
        "measurements": [
            {"name": "a", "unit": "ms", "by_ranks": {"8": 4.0, "1024": 512.0}, "growth": [128.0]},
            {"name": "b", "unit": "s", "by_ranks": {"8": 3.0, "1024": 3.0}, "growth": [1.0]},
            {"name": "c", "unit": "MB", "by_ranks": {"8": 0.064, "1024": 1048.576}, "growth": [16384.0]},
            {"name": "d", "unit": "s", "by_ranks": {"8": 0, "1024": 1016}, "growth": [None]},
        ]
    }
    assert [line.split() for line in scale.to_text(rows).splitlines()] == [
        ["ranks", "8", "1,024"],
        ["a,", "ms", "4", "512", "(128.0x)"],
        ["b,", "s", "3", "3", "(1.0x)"],
        ["c,", "MB", "0.064", "1.05e+03", "(16384.0x)"],
        ["d,", "s", "0", "1.02e+03"],
    ]


def test_the_command_measures_the_ranks_that_it_is_given(capsys, monkeypatch):
    opened = []

    def opening(config, nodes):
        opened.append((config.batch.images, nodes))
        return open_(config, nodes)

    open_ = Data.open
    monkeypatch.setattr(Data, "open", opening)
    assert main(["bench", "scale", "--ranks", "12", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["measurements"]
    assert opened == [(16, (2,)), (96, (8, 4))]
    saving = [
        *(("plan of saves", "CPU s"), ("plan of saves, received", "MB")),
        *(("a save", "CPU s"), ("a save, received", "MB")),
        *(("restart, manifest", "CPU s"), ("restart, a rank's plan", "CPU s")),
    ]
    assert [(row["name"], row["unit"]) for row in rows] == [
        ("dealing", "CPU ms a step"),
        ("dealing, all data on each node", "CPU ms a step"),
        ("planning, a window at once", "CPU ms a step"),
        ("opening the data", "CPU s"),
        ("agreement", "messages in turn"),
        ("agreement by gloo's ring", "messages in turn"),
        ("agreement, at most 64 processes here", "ms"),
        ("agreement by gloo's ring, at most 64 here", "ms"),
        *((f"{name}, {layout}", unit) for layout in ("8 ranks a copy", "one copy") for name, unit in saving),
    ]
    assert all(list(row["by_ranks"]) == ["2", "12"] and min(row["by_ranks"].values()) > 0 for row in rows)


def test_no_ranks_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "scale", "--ranks", "0"])
    assert "give a whole number, 1 or more" in capsys.readouterr().err
