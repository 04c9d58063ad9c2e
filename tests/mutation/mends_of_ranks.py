"""Each mend of a fault in how ranks wait for each other and end together, taken out again."""

from tests.mutation.named import Named

UNIT = "tests/fitv2_scale"

OF_RANKS = (
    Named(
        "what is left of a killed rank's attempt ends with 1", "fitv2_scale/parallel/failures.py",
        "class RankLost(RanksMissing):", "class RankLost(RuntimeError):",
        (f"{UNIT}/train/test_lost_ranks.py::test_a_killed_rank_is_named_by_the_others",),
    ),
    Named(
        "nobody stands in for a killed rank 0", "fitv2_scale/train/loop.py",
        "if world.rank == min(set(range(world.size)) - set(end.lost)):", "if world.is_first:",
        (f"{UNIT}/train/test_loop.py::test_lost_ranks_are_recorded_by_the_lowest_that_is_left",),
    ),
    Named(
        "a bug elsewhere is taken for a killed rank", "fitv2_scale/parallel/failures.py",
        "if not isinstance(error, UserError) or isinstance(error, RankLost):", "if not isinstance(error, UserError):",
        (f"{UNIT}/parallel/test_failures.py::test_a_bug_that_was_told_wins_over_the_loss_of_its_rank",),
    ),
    Named(
        "the node of a killed rank is not avoided", "launchers/chain_log.py", ' and not end.get("lost"))', ")",
        ("tests/launchers/test_srun_output.py::test_ranks_that_lost_one_have_not_ended_by_themselves",),
    ),
    Named(
        "a rank that waits for the others is deaf", "fitv2_scale/parallel/group_store.py",
        "if stop is None and (stop := noted()):", "if False:",
        (f"{UNIT}/cli/test_stopped_wait.py",),
    ),
)  # fmt: skip
