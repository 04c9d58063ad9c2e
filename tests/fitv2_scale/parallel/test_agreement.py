"""Ranks that were not told the same are refused before the first step, on all ranks, with what differs and where."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from data_sharding.errors import StorageDown, UserError
from fitv2_scale.config.load import explain
from fitv2_scale.config.schema import Config
from fitv2_scale.parallel import rank_facts
from fitv2_scale.parallel.agreement import agree, read_alike
from fitv2_scale.parallel.rank_facts import PER_NODE, config_facts, read_data
from fitv2_scale.parallel.world import join
from fitv2_scale.run.run import BAD_INPUT
from fitv2_scale.train.loop import train
from fitv2_scale.train.setup import read_request
from tests.support.ranks import run_ranks
from tests.support.thread_ranks import refusals
from tests.support.tiny_runs import make_tiny

KEYS = sorted(key for key, _, _ in explain(make_tiny("set", Path("runs"))))


def with_value(section: Any, dotted: str, value: Any) -> Any:
    """A copy with one key changed and not validated: so that any value of any key can be another one."""
    name, _, rest = dotted.partition(".")
    return section.model_copy(update={name: with_value(getattr(section, name), rest, value) if rest else value})


def another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
        case list():
            return [*value, value[-1] if value else "x"]
    return 17


def config_with(config: Config, key: str) -> Config:
    value = config
    for name in key.split("."):
        value = getattr(value, name)
    return with_value(config, key, another(value))


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_every_key_of_the_config_is_compared():
    """All of them, also those that are added one day, but for the few that are listed with their reason."""
    ours = make_tiny("set", Path("runs"))
    said: dict[str, list[str]] = {key: ["", ""] for key in KEYS}

    def act(world) -> None:
        for key in KEYS:
            try:
                agree(world, config_facts(config_with(ours, key) if world.rank else ours))
            except UserError as error:
                said[key][world.rank] = str(error)

    refusals(2, act)
    for key, (first, second) in said.items():
        assert first == second
        if key in PER_NODE:
            assert first == "" and PER_NODE[key]
            continue
        assert first.startswith(f"the ranks were not told the same: {key} is "), key
        assert " on rank 0 (n0) and " in first and " on rank 1 (n0); start all" in first


def test_the_keys_that_may_differ_exist():
    assert PER_NODE.keys() <= set(KEYS)


def told(size: int, *others: dict, ours: dict | None = None) -> str:
    """What the ranks say if the last ones were told ``others``, and the rest ``ours``."""
    facts = [ours or {"a": 1}] * (size - len(others)) + list(others)
    said = refusals(size, lambda world: agree(world, facts[world.rank]))
    assert len({str(error) for error in said}) == 1
    return str(said[0])


def test_one_sentence_for_many_ranks_and_keys():
    assert told(7, {"a": 1}) == "None"
    assert "a is 1 on ranks 0-5 (n0, n1, n2) and 2 on rank 6 (n3);" in told(7, {"a": 2})
    assert "a is 1 on ranks 0-4 (n0, n1, n2) and 2 on ranks 5, 7 (n2, n3) and 3 on rank 6 (n3);" in told(
        8, {"a": 2}, {"a": 3}, {"a": 2}
    )
    assert 'a is 1 on rank 0 (n0) and "1" on rank 1 (n0);' in told(2, {"a": "1"})
    assert "b is (absent) on rank 0 (n0) and null on rank 1 (n0);" in told(2, {"a": 1, "b": None})
    many = told(2, {f"k{i}": 1 for i in range(20)}, ours={f"k{i}": 0 for i in range(20)})
    assert many.count(" is 0 on ") == 5 and "; and 15 more: k13, k14, k15, k16, k17, …;" in many
    each = told(12, *({"a": rank} for rank in range(12)))
    assert "and 8 more groups of ranks differ" in each and len(each) < 400
    long = told(2, {"a": "x" * 10_000 + "y"}, ours={"a": "x" * 10_000 + "z"})
    assert len(long) < 500 and "(what differs is not shown)" in long


def test_only_the_first_rank_prints_a_difference():
    said = refusals(4, lambda world: agree(world, {"a": world.rank // 2}))
    assert [error.said_by(rank) is not None for rank, error in enumerate(said)] == [True, False, False, False]


def test_secrets_are_compared_and_not_printed():
    text = told(2, {"tracking.uri": "http://me:other@host"}, ours={"tracking.uri": "http://me:first@host"})
    assert text.count('"http://[redacted]@host"') == 2 and "(what differs is not shown)" in text
    assert "other" not in text and "first" not in text


@pytest.mark.parametrize("failing", [(0,), (1,), (2, 3), (0, 1, 2, 3)])
def test_a_rank_that_cannot_read_says_so_and_ends_all(failing):
    def read(rank: int):
        if rank in failing:
            raise UserError("there is no dataset at /here")
        return rank, {"a": 1}

    said = refusals(4, lambda world: read_alike(world, lambda: read(world.rank)))
    printed = {rank: error.said_by(rank) for rank, error in enumerate(said)}
    expected = dict.fromkeys(range(4)) | {failing[0]: "there is no dataset at /here"}
    if 0 not in failing:
        node = failing[0] // 2
        expected[0] = f"rank {failing[0]} on n{node}: there is no dataset at /here"
    assert printed == expected


def test_ranks_that_fail_differently_end_with_one_code():
    """Bad input before trouble with the storage: a rank that met the milder of two ends as the others do."""
    errors = [None, StorageDown("it does not answer"), UserError("no such file"), UserError("no such key")]

    def read(rank: int):
        if errors[rank]:
            raise errors[rank]
        return rank, {}

    said = refusals(4, lambda world: read_alike(world, lambda: read(world.rank)))
    assert [type(error) for error in said] == [UserError] * 4
    assert [error.said_by(rank) for rank, error in enumerate(said)] == [
        "rank 2 on n1: no such file",
        None,
        "no such file",
        "no such key",
    ]


def test_an_error_that_does_not_pickle_is_told_all_the_same():
    class Odd(Exception):
        def __init__(self, a, b):
            super().__init__(f"{a} and {b}")

    def act(world):
        def read():
            if world.rank == 1:
                raise Odd("this", "that")
            return None, {}

        try:
            read_alike(world, read)
        except Exception as error:
            raise UserError(repr(error)) from error

    ours, own = refusals(2, act)
    assert "this and that" in str(ours) and str(own) == "Odd('this and that')"


CHANGES = [
    {"optimizer__lr": 0.5},
    {"ema__decay": 0.0},
    {"flow__label_dropout": 0.9},
    {"optimizer__max_norm": 1e-6},
    {"seed": 1},
    {"layout__max_tokens": 64},
    {"layout__engine": "zero3"},
    {"batch__images": 24},
    {"train__log_every": 2},
    {"checkpoint__every_steps": 2},
]


def refused_in_turn(dataset: str, copies: dict[str, str], folder: Path) -> dict[str, str]:
    """What this rank of two says to each of the changes, which the second is told, and to the other differences."""
    second, said = os.environ["RANK"] == "1", {}
    config = make_tiny(dataset, folder)
    with join() as world:

        def refuse(name: str, read) -> None:
            with pytest.raises(UserError) as caught:
                read_alike(world, read)
            said[name] = str(caught.value)

        for changes in CHANGES:
            own = make_tiny(dataset, folder, **(changes if second else {}))
            refuse(str(changes), lambda own=own: read_request(own, None, world.device))
        for name, copy in copies.items():
            own = make_tiny(copy if second else dataset, folder)
            if name == "the same":
                assert read_alike(world, lambda own=own: read_data(own, world))[1].plan.hash
            else:
                refuse(name, lambda own=own: read_data(own, world))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rank_facts, "code_digest", lambda: "01234567" if second else "89abcdef")
            refuse("code", lambda: read_request(config, None, world.device))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rank_facts, "installed", lambda: {"torch": "2.0.0" if second else "2.1.0"})
            refuse("torch", lambda: read_request(config, None, world.device))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NCCL_ALGO", "Ring" if second else "Tree")
            refuse("NCCL", lambda: read_request(config, None, world.device))
        assert (
            read_alike(world, lambda: read_request(config, None, world.device)) is None
        )  # the group is as good as before
    return said


def copies_of(dataset: str, folder: Path) -> dict[str, str]:
    """Copies of ``dataset`` by what they differ in: nothing, the label of an image, the VAE that encoded the images."""
    paths = {name: folder / name for name in ("the same", "labels", "codec")}
    for path in paths.values():
        shutil.copytree(dataset, path)
    column = paths["labels"] / "manifest" / "label.npy"
    labels = np.load(column)
    labels[0] = (labels[0] + 1) % 5
    np.save(column, labels)
    for name in ("labels", "codec"):
        file = paths[name] / "manifest.json"
        header = json.loads(file.read_text())
        header["columns"]["label.npy"]["xxh3_128"] = xxhash.xxh3_128_hexdigest(column.read_bytes())
        if name == "codec":
            header = json.loads((paths["the same"] / "manifest.json").read_text())
            header["codec"]["digest"] = "0" * 16
        file.write_text(json.dumps(header, indent=1))
    return {name: str(path) for name, path in paths.items()}


def test_differences_between_real_ranks(dataset, tmp_path):
    """All of them in one group of ranks, which is as good as before after each."""
    copies = copies_of(dataset, tmp_path / "copies")
    first, second = run_ranks(2, refused_in_turn, dataset, copies, tmp_path)
    assert first == second
    node = first.pop("code").partition("(")[2].partition(")")[0]
    expected = {
        str({"optimizer__lr": 0.5}): f"optimizer.lr is 0.001 on rank 0 ({node}) and 0.5 on rank 1 ({node});",
        str({"layout__max_tokens": 64}): "layout.max_tokens is 16384 on rank 0 (",
        str({"layout__engine": "zero3"}): 'layout.engine is "fsdp" on rank 0 (',
        str({"seed": 1}): "seed is 0 on rank 0 (",
        "labels": "digest of dataset 0 is ",
        "codec": "digest of dataset 0 is ",
        "torch": 'version of torch is "2.1.0" on rank 0 (',
        "NCCL": '$NCCL_ALGO is "Tree" on rank 0 (',
    }
    for name, start in expected.items():
        assert first[name].startswith(f"the ranks were not told the same: {start}"), first[name]
    for changes in CHANGES:
        (key,) = (name.replace("__", ".") for name in changes)
        assert f"told the same: {key} is " in first[str(changes)]


def train_differently(config: Config, changes: dict) -> tuple[int, str | None]:
    """Exit code, and what the rank prints."""
    rank = int(os.environ["RANK"])
    try:
        return train(make_tiny(config.data.url, Path(config.run).parent, **(changes if rank else {}))), None
    except UserError as error:
        return BAD_INPUT, error.said_by(rank)


@pytest.mark.parametrize(
    "changes,first,second",
    [
        ({"optimizer__lr": 0.1}, "not told the same: optimizer.lr is 0.001 on rank 0", None),
        ({"data__url": "/no/such/set"}, "rank 1 on .*: there is no dataset at /no/such/set", "there is no dataset at"),
    ],
)
def test_nothing_is_trained_by_ranks_that_were_told_differently(tiny, changes, first, second):
    (ours, said), (theirs, told) = run_ranks(2, train_differently, tiny(), changes)
    assert (ours, theirs) == (BAD_INPUT, BAD_INPUT) and not Path(tiny().run).exists()
    assert re.search(first, said) and (told is None if second is None else told.startswith(second))
