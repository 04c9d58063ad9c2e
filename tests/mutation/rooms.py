"""The rooms (see CONTRIBUTING.md), and the tests of each, without servers: what runs first is fast and near."""

import random
import re
from functools import cache
from pathlib import Path

from tests.mutation.operators import Mutant, is_python, mutants_of

PACKAGES = ("data_sharding", "fitv2_scale", "launchers")
SYSTEM = ["tests/system/test_layouts.py", "tests/system/test_resume.py"]
# room: (its folder, whether the folders in it belong to it, tests that run after those of the mirrored folder)
ROOMS: dict[str, tuple[str, bool, list[str]]] = {
    "data_sharding": ("data_sharding", False, []),
    "data_sharding/storage": ("data_sharding/storage", True, []),
    "data_sharding/format": ("data_sharding/format", True, ["tests/data_sharding/test_verify.py"]),
    "data_sharding/plan": ("data_sharding/plan", True, ["tests/data_sharding/stream/test_loader.py"]),
    "data_sharding/write": ("data_sharding/write", True, []),
    "data_sharding/stream": ("data_sharding/stream", True, []),
    "fitv2_scale": ("fitv2_scale", False, []),
    "config": ("fitv2_scale/config", True, ["tests/fitv2_scale/cli/test_bad_input.py"]),
    "run": ("fitv2_scale/run", True, []),
    "model": ("fitv2_scale/model", True, SYSTEM),
    "tracking": ("fitv2_scale/tracking", True, []),
    "parallel": ("fitv2_scale/parallel", True, SYSTEM),
    "checkpoint": ("fitv2_scale/checkpoint", True, SYSTEM),
    "planning": ("fitv2_scale/planning", True, []),
    "evaluate": ("fitv2_scale/evaluate", True, ["tests/fitv2_scale/cli/test_evaluate.py"]),
    "launchers": ("launchers", True, []),
    "train": ("fitv2_scale/train", True, ["tests/fitv2_scale/checkpoint/test_background_saves.py", *SYSTEM]),
    "bench": ("fitv2_scale/bench", True, []),
    "cli": ("fitv2_scale/cli", True, ["tests/launchers/test_batch_script.py", "tests/launchers/test_preflight.py"]),
}


def files_of(root: Path, room: str) -> list[str]:
    folder, deep, _ = ROOMS[room]
    found = (root / folder).rglob("*.py") if deep else (root / folder).glob("*.py")
    return sorted(str(file.relative_to(root)) for file in found)


def suite_of(root: Path, room: str, file: str) -> list[str]:
    """Files of tests for a mutant of ``file``: that of its name, those of any room that import it (of a command: that
    call it), those that name it, then what else the room has; of each kind first those that start no ranks."""
    folder, deep, after = ROOMS[room]
    mirror = root / "tests" / folder
    of_room = set(mirror.rglob("test_*.py") if deep else mirror.glob("test_*.py"))
    source, module = Path(file), file.removesuffix(".py").replace("/", ".")
    command = f'"{source.stem}"' if room == "cli" else None

    def uses(text: str) -> bool:
        return module in text or (command is not None and command in text and "cli.__main__" in text)

    def order(test: Path) -> tuple:
        text = _text(test)
        near = test.parent == root / "tests" / source.parent
        served = any(f"mark.{server}" in text for server in ("s3", "slurm", "mlflow", "services"))
        ranks = "support.ranks" in text
        named = re.search(rf"\b{source.stem}\b", text) is not None
        return (test.stem != f"test_{source.stem}", not uses(text), served, not named, ranks, not near, len(text))

    found = [test for test in _tests(root) if test in of_room or uses(_text(test))]
    ordered = [str(test.relative_to(root)) for test in sorted(sorted(found), key=order)]
    return ordered + [test for test in after if test not in ordered]


@cache
def _tests(root: Path) -> list[Path]:
    """Of all packages, and of several at once."""
    return [test for folder in (*PACKAGES, "system") for test in (root / "tests" / folder).rglob("test_*.py")]


@cache
def _text(test: Path) -> str:
    return test.read_text()


@cache
def candidates(root: Path) -> dict[str, dict[tuple[str, int], list[Mutant]]]:
    """room: (file, line): the changes that the line offers."""
    found: dict[str, dict[tuple[str, int], list[Mutant]]] = {}
    for room in ROOMS:
        lines = found.setdefault(room, {})
        for file in files_of(root, room):
            for mutant in mutants_of(file, (root / file).read_text()):
                lines.setdefault((file, mutant.line), []).append(mutant)
    return found


def drawn(root: Path, seed: int, count: int) -> list[tuple[str, Mutant]]:
    """(room, mutant) of ``count`` lines, each as likely as any other; of every room at least one."""
    lines = candidates(root)
    places = [(room, place) for room in lines for place in sorted(lines[room])]
    rng = random.Random(seed)
    chosen = [(room, rng.choice(sorted(lines[room]))) for room in lines if lines[room]]
    taken = set(chosen)
    chosen += [place for place in rng.sample(places, len(places)) if place not in taken][: count - len(chosen)]
    rng.shuffle(chosen)
    found = []
    for room, place in chosen:
        source = (root / place[0]).read_text()
        offered = [mutant for mutant in lines[room][place] if is_python(mutant, source)]
        found += [(room, rng.choice(offered))] if offered else []
    return found
