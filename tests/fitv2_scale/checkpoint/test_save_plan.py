"""Ranks exchange once what they save: what each commit lists, what later saves exchange, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fitv2_scale.checkpoint.checkpointer import Checkpointer
from fitv2_scale.checkpoint.commit_files import CommitReader, CommitWriter
from fitv2_scale.model.counts import logical_shapes
from fitv2_scale.parallel import world as world_module
from fitv2_scale.parallel.boxes import Box, LogicalTensor
from fitv2_scale.parallel.world import World
from fitv2_scale.run.run import Attempt, Run
from tests.support.checkpoint_state import CURSOR, State, opened
from tests.support.layout_grid import Cell, engine_of, make_config
from tests.support.ranks import run_ranks

KINDS = ("param", "ema", "exp_avg", "exp_avg_sq")


def saving(world: World, run: Run, state) -> Checkpointer:
    return Checkpointer(state, Attempt(world.run_on_rank0(lambda: run.claim({}).number), run), world)


def sent_bytes(sent: list[int]) -> None:
    """Appends to ``sent`` what this rank sends with each ``gather``."""
    dumps, gather = world_module.pickle.dumps, World.gather

    def counted(self, value):
        before = len(sent)
        world_module.pickle.dumps = lambda value: sent.append(len(data := dumps(value))) or data
        result = gather(self, value)
        world_module.pickle.dumps = dumps
        sent.extend([0] if len(sent) == before else [])
        return result

    World.gather = counted


def save_twice(config, url: str) -> list[int]:
    """What this rank sends to rank 0: when the checkpointer is made, and with each save."""
    sent: list[int] = []
    sent_bytes(sent)
    with opened({}, url) as (world, run):
        checkpoints = saving(world, run, engine_of(config, world))
        for step in (1, 2):
            assert checkpoints.save(step, CURSOR) is None
    return sent


@pytest.mark.parametrize(
    "engine,cell",
    [
        ("fsdp", Cell(3)),
        ("fsdp", Cell(4, replicate=2)),
        ("fsdp", Cell(4, tensor=2, replicate=2)),
        ("zero3", Cell(3)),
        ("zero3", Cell(4, tensor=2)),
        ("fsdp", Cell(3, tensor=3)),
    ],
    ids=str,
)
def test_each_element_is_listed_once_where_it_lies(tmp_path, engine, cell):
    config = make_config(engine, layout__replicate=cell.replicate, layout__tensor=cell.tensor)
    sent = run_ranks(cell.world, save_twice, config, str(tmp_path / "run"))
    shapes = {f"{kind}/{name}": shape for name, shape in logical_shapes(config.model).items() for kind in KINDS}
    commits = sorted((tmp_path / "run" / "steps").iterdir())
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in commits]
    assert len(commits) == 2 and manifests[0]["tensors"] == manifests[1]["tensors"]
    for folder, manifest in zip(commits, manifests, strict=True):
        assert {file.name for file in folder.iterdir()} == {*manifest["files"], "manifest.json"}
        assert {name: tuple(t["shape"]) for name, t in manifest["tensors"].items()} == shapes
        for name, tensor in manifest["tensors"].items():
            count = torch.zeros(tensor["shape"], dtype=torch.int)
            for box in tensor["boxes"]:
                part = count[tuple(slice(o, o + s) for o, s in zip(box["offset"], box["shape"], strict=True))]
                part += 1
                assert stored(folder / box["file"], f"{name}@{','.join(map(str, box['offset']))}", box)
            assert (count == 1).all(), name
    writers = len(manifests[0]["files"])
    assert writers == cell.world // cell.replicate
    for planned, first, second in sent[1:writers]:
        assert planned > 1000 and 0 < first == second < 200
    assert sent[writers:] == [[0, 0, 0]] * (cell.world - writers)  # the other copies are silent


def stored(file: Path, key: str, box: dict) -> bool:
    """Whether the library finds the bytes of ``key`` where the box says they are."""
    with safe_open(file, "pt") as opened_file:
        tensor = opened_file.get_tensor(key)
    data = file.read_bytes()[box["begin"] :][: tensor.nbytes]
    return list(tensor.shape) == box["shape"] and data == tensor.numpy().tobytes()


class Uncovered(State):
    """Of two ranks the second has a row too few of a matrix, or one more, or a tensor of another shape."""

    fault = ""

    def boxes(self) -> dict[str, LogicalTensor]:
        found = super().boxes()
        if self._world.rank == 1:
            (box,) = found["param/w"].boxes
            first, rows = box.offset[0], box.tensor
            if self.fault == "gap":
                found["param/w"] = LogicalTensor((50, 1200), [Box((first, 0), rows[:-1])])
            elif self.fault == "overlap":
                found["param/w"] = LogicalTensor((50, 1200), [Box((first - 1, 0), torch.zeros(len(rows) + 1, 1200))])
            elif self.fault == "outside":
                found["param/w"] = LogicalTensor((50, 1200), [Box((first + 1, 0), rows)])
            else:
                found["param/w"] = LogicalTensor((51, 1200), [box])
        return found


def refused(url: str, fault: str) -> str:
    Uncovered.fault = fault
    with opened({}, url) as (world, run):
        try:
            saving(world, run, Uncovered(1, world))
        except ValueError as error:
            return str(error)
    return "nothing"


@pytest.mark.parametrize(
    "fault,said",
    [
        ("gap", "the boxes of param/w on all ranks are not each element of it, once: it cannot be saved"),
        ("overlap", "the boxes of param/w on all ranks are not each element of it, once: it cannot be saved"),
        ("outside", "a box of param/w lies outside of it: it cannot be saved"),
        ("another shape", "rank 1 has tensors of other names or shapes than rank 0: they cannot be saved"),
    ],
)
def test_a_state_that_is_not_covered_is_refused_on_all_ranks(tmp_path, fault, said):
    assert run_ranks(2, refused, str(tmp_path / "run"), fault) == [said] * 2
    assert not list((tmp_path / "run").glob("steps/*"))


def save_with_failures(url: str, failing: dict[int, list[int]]) -> tuple[list[str | None], list[int], bool]:
    """Saves of steps 1 to 4, of which those in ``failing`` fail on these ranks. Returns what each save said, the steps
    committed, and whether the last is as it should be."""
    write = CommitWriter.write_data

    class Unspeakable(OSError):  # no other process can make one
        pass

    def act(self):
        if self._rank in failing.get(int(self._folder[6:14]), []):
            raise Unspeakable(28, "No space left on device") if self._rank else OSError(28, "No space left on device")
        return write(self)

    CommitWriter.write_data = act
    with opened({}, url) as (world, run):
        state = State(0, world)
        checkpoints, said = saving(world, run, state), []
        for step in range(1, 5):
            state.move_to(step)
            try:
                said.append(checkpoints.save(step, CURSOR))
            except Exception as error:
                said.append(f"raised {error}")
        entry = run.log.commits()[-1]
        manifest = json.loads(Path(run.store.path(f"{entry.fields['path']}/manifest.json")).read_text())
        reader = CommitReader(run.store, entry.fields["path"], manifest)
        whole = all(torch.equal(reader.read_tensor(name), value) for name, value in state.expected(4).items())
        return said, [entry.fields["step"] for entry in run.log.commits()], whole


def test_saves_after_failed_ones_are_whole(tmp_path):
    """The first save of an attempt fails, and a later one."""
    ranks = run_ranks(3, save_with_failures, str(tmp_path / "run"), {1: [0], 3: [0]})
    said = "the save at step {} failed: [Errno 28] No space left on device"
    assert ranks == [([said.format(1), None, said.format(3), None], [2, 4], True)] * 3
    assert not [*(tmp_path / "run").glob("steps/00000001*"), *(tmp_path / "run").glob("steps/00000003*")]


def test_a_failure_that_cannot_be_sent_is_told_in_words(tmp_path):
    ranks = run_ranks(2, save_with_failures, str(tmp_path / "run"), {2: [1]})
    for said, steps, whole in ranks:
        assert steps == [3, 4] and whole  # that of step 1 is retired
        assert said[1].startswith("raised Unspeakable(28")
    assert ranks[0] == ranks[1]


class Few(State):
    """One row: of two ranks the second has nothing to save."""

    def __init__(self, step: int, world: World) -> None:
        super().__init__(step, world, rows=1)
        self.shapes = {"param/w": (1, 1200)}
        self.tensors = {name: self._mine(tensor).clone() for name, tensor in self.expected(step).items()}


def save_few(url: str) -> None:
    with opened({}, url) as (world, run):
        assert saving(world, run, Few(1, world)).save(1, CURSOR) is None


def test_a_rank_that_has_nothing_to_save_writes_no_file(tmp_path):
    run_ranks(2, save_few, str(tmp_path / "run"))
    assert {file.name for file in (tmp_path / "run").glob("steps/*/*")} == {"rank-00000.safetensors", "manifest.json"}
