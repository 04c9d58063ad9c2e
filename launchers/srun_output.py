"""What the errors that srun prints say of the tasks of a job: which failed first, which refused its input, which was
killed."""

import re
from collections.abc import Sequence

_FAILED = re.compile(r"^srun: error: (?:Node failure on )?([^:\s]+)(?:: tasks? [\d,-]+: (.*))?$", re.MULTILINE)


def first_failed_node(srun_output: str, nodes: Sequence[str]) -> list[str]:
    """The node of the first task that failed, if that is one of several nodes: the others fail because of it."""
    for failure in _FAILED.finditer(srun_output):
        if failure[1] in nodes and len(nodes) > 1:
            return [failure[1]]
        if failure[2]:  # several nodes at once: no node's fault
            return []
    return []


_REFUSED = re.compile(r"^srun: error: [^:\s]+: tasks? (\d+)[\d,-]*: Exited with exit code 2$", re.MULTILINE)


def refusing_log(srun_output: str, home: str) -> str:
    """Where the sentence about bad input stands. Ranks that have joined end together, and rank 0 repeats what another
    one says; before, a rank ends alone, and srun ends the others."""
    lowest = [int(task) for task in _REFUSED.findall(srun_output)]  # of each group of tasks
    return f"{home}/rank-{0 if 0 in lowest else lowest[0]}.log" if lowest else f"the logs of the ranks in {home}"


def killed_task(srun_output: str) -> str:
    """How the first task that ended was killed, if it was: srun then ends the others, and they know only what broke."""
    tasks = (failure for failure in _FAILED.finditer(srun_output) if failure[2])
    first = next(tasks, None)
    killed = first is not None and not first[2].startswith("Exited")
    return first[0].removeprefix("srun: error: ") if killed else ""
