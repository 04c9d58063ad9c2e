"""What srun has printed, and what is concluded from it."""

import pytest

from fitv2_scale.run.run import Run
from launchers.chain_log import outcome_of
from launchers.srun_output import first_failed_node, killed_task, refusing_log

KILLED = "srun: error: node2: task 1: Killed\n"
CANCELLED = "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.\n"


@pytest.mark.parametrize(
    "said,nodes,names",
    [
        (KILLED, ["node1", "node2"], ["node2"]),
        (CANCELLED + KILLED + "srun: error: node1: task 0: Terminated\n", ["node1", "node2"], ["node2"]),
        (KILLED, ["node2"], []),  # the only one: nothing says that it is the node
        ("srun: error: node[1-2]: tasks 0-1: Exited with exit code 1\n" + KILLED, ["node1", "node2"], []),
        ("srun: error: Node failure on node1\n" + KILLED, ["node1", "node2"], ["node1"]),
        ("srun: error: node1: tasks 0-7: Exited with exit code 1\n", ["node1", "node2"], ["node1"]),
        ("srun: error: eio_handle_mainloop: Abandoning IO\n", ["node1", "node2"], []),
        ("", ["node1", "node2"], []),
    ],
)
def test_whose_task_failed_first(said, nodes, names):
    assert first_failed_node(said, nodes) == names


@pytest.mark.parametrize(
    "said,expected",
    [
        (CANCELLED + KILLED + "srun: error: node1: task 0: Exited with exit code 1\n", "node2: task 1: Killed"),
        ("srun: error: node1: task 0: Out Of Memory\n", "node1: task 0: Out Of Memory"),
        ("srun: error: node1: task 0: Exited with exit code 1\n" + KILLED, ""),
        ("srun: error: eio_handle_mainloop: Abandoning IO\n", ""),
    ],
)
def test_how_a_task_was_killed(said, expected):
    assert killed_task(said) == expected


EXITED = "srun: error: node{}: {}: Exited with exit code 2\n"


@pytest.mark.parametrize(
    "said,log",
    [
        (CANCELLED + EXITED.format(2, "task 3") + "srun: error: node1: task 0: Terminated\n", "/jobs/a/rank-3.log"),
        (EXITED.format(2, "tasks 3-5,7") + EXITED.format(1, "task 1"), "/jobs/a/rank-3.log"),
        (EXITED.format("[1-2]", "tasks 0-7"), "/jobs/a/rank-0.log"),
        (EXITED.format(2, "task 3") + EXITED.format(1, "tasks 0-2"), "/jobs/a/rank-0.log"),  # joined: it repeats it
        ("srun: error: node1: task 4: Exited with exit code 1\n", "the logs of the ranks in /jobs/a"),
        ("srun: error: node1: task 4: Exited with exit code 22\n", "the logs of the ranks in /jobs/a"),
        ("", "the logs of the ranks in /jobs/a"),
    ],
)
def test_where_bad_input_is_named(said, log, tmp_path):
    assert refusing_log(said, "/jobs/a") == log
    run = Run.open_or_create(str(tmp_path / "run"), {}, {}, None)
    outcome = outcome_of(run, 0, 2, refusing_log(said, "/jobs/a"))
    assert outcome == (2, f"bad input, see {log}", True)


def test_ranks_that_lost_one_have_not_ended_by_themselves(tmp_path):
    """What srun says of the killed one is still looked for; the one that stands in for rank 0 records it."""
    run = Run.open_or_create(str(tmp_path / "run"), {}, {}, None)
    run.claim({}).end(75, "SIGUSR1: saved at step 3")
    assert outcome_of(run, 0, 137, "") == (75, "SIGUSR1: saved at step 3", True)
    run.claim({}).end(75, "rank 0 on n1 ended or was killed", [0], stands_in=True)
    assert outcome_of(run, 1, 137, "") == (75, "rank 0 on n1 ended or was killed", False)
