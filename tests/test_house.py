"""The house stays as built: short files and functions, tests apart from one another and where their subject lies."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.mutation.tables import TABLE
from tests.support.glossary import OLD_WORDS
from tests.support.repository import ROOT

PACKAGES = ("data_sharding", "fitv2_scale", "launchers")
FILES = [file for folder in (*PACKAGES, "tests") for file in sorted((ROOT / folder).rglob("*.py"))]
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 300, 55
# They know the keys of an old run.json, and the list of old words itself.
OLD_KEYS = {"fitv2_scale/run/run.py", "tests/system/test_old_run.py", "tests/support/glossary.py"}


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_no_file_is_long():
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_function_is_long():
    functions = (
        (file, node)
        for file in FILES
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    lengths = {f"{name_of(file)}: {node.name}": node.end_lineno - node.lineno + 1 for file, node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FUNCTION} == {}


def imported(file: Path) -> Iterator[str]:
    """Every module and name that a file imports, as a dotted path."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(file)} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_test_imports_another():
    """What tests share lies in tests/support; what pytest needs of it, in conftest."""
    for file in FILES:
        for name in imported(file):
            parts = name.split(".")
            of_a_test = parts[0] == "tests" and any(part == "conftest" or part.startswith("test_") for part in parts)
            assert not of_a_test, f"{name_of(file)} imports {name}"
            assert file.is_relative_to(ROOT / "tests") or parts[0] != "tests", f"{name_of(file)} imports {name}"


def test_what_is_written_apart_imports_nothing_of_the_product():
    for file in (ROOT / "tests" / "oracle").glob("*.py"):
        assert not [name for name in imported(file) if name.split(".")[0] in PACKAGES], name_of(file)


def test_the_lines_of_the_named_mutants_are_there():
    """Whoever changes one of them writes the mutant again, so that its fault stays looked for."""
    for mutant in TABLE:
        source = (ROOT / mutant.file).read_text()
        changed = mutant.applied(source)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), mutant.name
        assert [test for test in mutant.tests if not is_there(test)] == [], mutant.name


def is_there(test: str) -> bool:
    """Whether there is such a FILE, or FILE::test."""
    file, _, name = test.partition("::")
    return (ROOT / file).exists() and (not name or f"\ndef {name}(" in (ROOT / file).read_text())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_has_its_mirror(package):
    """A package's tests lie in the folder of its name, and nowhere is a folder of tests without a package."""

    def folders(root: Path) -> set[str]:
        return {str(file.parent.relative_to(root)) for file in (root / package).rglob("*.py")}

    def holding(root: Path, files: str) -> set[str]:
        found = (file for file in (root / package).rglob(files) if file.name != "__init__.py")
        return {str(file.parent.relative_to(root)) for file in found}

    assert folders(ROOT) == folders(ROOT / "tests")
    assert holding(ROOT, "*.py") - holding(ROOT / "tests", "test_*.py") == set()


def test_names_comments_and_sentences_are_in_the_words_of_the_glossary():
    found = {name_of(file): OLD_WORDS.findall(file.read_text()) for file in FILES}
    assert {name: words for name, words in found.items() if words and name not in OLD_KEYS} == {}
    assert all(found[name] for name in OLD_KEYS)
