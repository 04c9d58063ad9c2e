"""The command line of the mutation run."""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.mutation.report import to_text
from tests.mutation.rooms import drawn, suite_of
from tests.mutation.runner import copied_tree, preload, run_changed, run_tests
from tests.mutation.tables import TABLE
from tests.support.repository import ROOT


@dataclass(frozen=True)
class Task:
    """A change of ``file``, and the tests to run."""

    name: str
    room: str
    file: str
    changed: str
    tests: list[str]
    what: str


def named_tasks(root: Path) -> Iterator[Task]:
    for one in TABLE:
        changed = one.applied((root / one.file).read_text())
        yield Task(one.name, "named", one.file, changed, list(one.tests), f"{one.search!r} -> {one.replace!r}")


def drawn_tasks(root: Path, seed: int, count: int) -> Iterator[Task]:
    for room, m in drawn(root, seed, count):
        name, what = f"{m.file}:{m.line}+{m.start}", f"{m.kind}: {m.old[:200]!r} -> {m.new[:200]!r}"
        changed = m.applied((root / m.file).read_text())
        yield Task(name, room, m.file, changed, suite_of(root, room, m.file), what)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("--named", action="store_true", help="the named mutants instead of drawn ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--part", default="1/1", help="i/n: every n-th of them, from the i-th on")
    parser.add_argument("--only", default="", help="those in whose name this stands")
    parser.add_argument("--out", type=Path, help="file of results; what stands there already is not run again")
    parser.add_argument("--report", type=Path, help="print the table of such a file, and run nothing")
    args = parser.parse_args(words)
    if args.report:
        print(to_text(read(args.report)))
        return 0
    part, parts = map(int, args.part.split("/"))
    out = args.out or Path("mutation-named.jsonl" if args.named else f"mutation-{args.seed}-{args.count}.jsonl")
    done = {result["name"] for result in read(out)}
    preload()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    with copied_tree(ROOT) as tree:
        tasks = list(named_tasks(tree) if args.named else drawn_tasks(tree, args.seed, args.count))
        for task in tasks[part - 1 :: parts]:
            if task.name in done or args.only not in task.name:
                continue
            result = run(tree, task, commit)
            print(f"{result['status']:9} {task.name}  {task.what}  {result['by']}", flush=True)
            with out.open("a") as file:
                file.write(json.dumps(result) + "\n")
        failing = red_tests(tree, read(out))
    results = read(out)
    print(to_text(results))
    if failing:
        print(f"{failing} fails without any change: mend it, drop what it killed from {out}, and run again")
        return 2
    return int(any(result["status"] != "killed" for result in results) if args.named else rate(results) < 0.9)


def run(tree: Path, task: Task, commit: str) -> dict:
    outcome = run_changed(tree, task.file, task.changed, task.tests)
    return {"name": task.name, "room": task.room, "what": task.what, "commit": commit} | asdict(outcome)


def read(file: Path) -> list[dict]:
    """The results so far; of a mutant that was run again, the last."""
    lines = file.read_text().splitlines() if file.exists() else []
    return list({result["name"]: result for result in map(json.loads, lines)}.values())


def red_tests(tree: Path, results: list[dict]) -> str:
    """One of the tests that killed a mutant and fails in the unchanged tree too; empty if none does."""
    killers = sorted({result["by"] for result in results if "::" in result["by"]})
    return run_tests(tree, killers, cpu_seconds=math.inf).by if killers else ""


def rate(results: list[dict]) -> float:
    """The part that was noticed."""
    return sum(result["status"] in ("killed", "hangs") for result in results) / max(1, len(results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
