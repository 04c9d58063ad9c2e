"""A machine that has torch and little else: the packages that the GPU tests may need, and Pythons without all others.

environment(folder)    for Pythons that cannot import other packages
"""

import os
import re
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

from tests.support.repository import ROOT

# Of the program's own dependencies, what a step on random latents needs; and what runs the tests.
NEEDED = ("torch", "numpy", "pydantic", "zstandard", "xxhash", "pyyaml", "pytest", "pytest-timeout", "hypothesis")
_OURS = {"data_sharding", "fitv2_scale", "launchers", "tests"}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_dependencies(names: tuple[str, ...]) -> set[str]:
    """The distributions, and all that they require without an extra, as far as they are installed."""
    found, waiting = set(), [_canonical(name) for name in names]
    while waiting:
        if (name := waiting.pop()) in found:
            continue
        try:
            required = requires(name) or []
        except PackageNotFoundError:
            continue
        found.add(name)
        waiting += [_canonical(re.match(r"[\w.-]+", line)[0]) for line in required if "extra ==" not in line]
    return found


class _Without:
    """A finder that does not find some modules, as if they were not installed."""

    def __init__(self, finder: Any, hidden: set[str]):
        self._finder, self._hidden = finder, hidden

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if name.partition(".")[0] in self._hidden else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def hide_all_others() -> None:
    """From this process: modules of installed distributions that nothing in ``NEEDED`` requires."""
    there = with_dependencies(NEEDED)
    hidden = {
        module
        for module, distributions in packages_distributions().items()
        if module not in _OURS and not there & {_canonical(name) for name in distributions}
    }
    sys.meta_path[:] = [_Without(finder, hidden) for finder in sys.meta_path]


def environment(folder: Path) -> dict[str, str]:
    """For a Python, and all that it starts, in which nothing can be imported but ``NEEDED`` and what that brings.

    ``folder`` is an empty one, for the file that a Python executes when it starts.
    """
    (folder / "sitecustomize.py").write_text(
        "from tests.support.bare_machine import hide_all_others\nhide_all_others()\n"
    )
    path = os.pathsep.join([str(folder), str(ROOT)])
    # pytest's plugins are loaded by name: those of packages that are hidden would end it.
    return os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
