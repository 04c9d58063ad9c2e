"""The pages for users: commands parse, keys, files, links and anchors exist, maps match the disk, Python blocks run."""

import json
import re
import shlex
import shutil
from itertools import chain
from pathlib import Path

import pytest

from fitv2_scale.cli.__main__ import _parse
from fitv2_scale.config.schema import Config
from tests.support.glossary import OLD_WORDS
from tests.support.repository import ROOT

FOLDERS = ("data_sharding", "fitv2_scale", "launchers", "configs", "tests")
OLD = ROOT / "tests" / "fixtures" / "made_by_a2e80d5"
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in chain(ROOT.glob("*.md"), *((ROOT / folder).rglob("*.md") for folder in FOLDERS))
    if "fixtures" not in page.parts
)

CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
SHELL, PYTHON = (re.compile(rf"^```{kind}\n(.*?)^```", re.DOTALL | re.MULTILINE) for kind in ("bash", "python"))
INLINE = re.compile(r"`(fitv2 [^`…]+)`")
SECTIONS = {
    n: f.annotation.model_fields for n, f in Config.model_fields.items() if hasattr(f.annotation, "model_fields")
}
KEY = re.compile(rf"(?<![\w./])({'|'.join(SECTIONS)})\.(?!py\b)(\w+)(?==|`)")
PATH = re.compile(rf"(?<![\w./])(?:{'|'.join(FOLDERS)})/[\w/]+(?:\.\w+)+")
ROOM = re.compile(rf"(?<![\w./])(?:{'|'.join(FOLDERS)})(?:/\w+)+(?=/?(?:[`,\s]|$))", re.MULTILINE)
NAME = re.compile(r"`((?:\w+/)*\w+\.(?:py|sh))`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
ROW = re.compile(r"^\| (.+?) \| (.+) \|$", re.MULTILINE)
LISTED = re.compile(r"`(\w+(?:\.\w+)+)`")
SOURCES = {".py", ".sh", ".in", ".txt"}

pages = pytest.mark.parametrize("page", PAGES)


def text(page: str) -> str:
    return (ROOT / page).read_text()


def prose(page: str) -> str:
    """The page without its blocks of code."""
    return CODE.sub("", text(page))


def commands(page: str) -> list[list[str]]:
    """The words of each `fitv2` that a block of ``page`` calls, also under torchrun, and of what it queues as a job."""
    found = []
    for block in SHELL.findall(text(page)):
        if block.startswith("#!"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            words = words[: words.index(">")] if ">" in words else words
            if called := {"fitv2", "fitv2_scale.cli"} & {*words}:
                found.append(words[words.index(called.pop()) + 1 :])
                found += [found[-1][found[-1].index("--") + 1 :]] if "--" in found[-1] else []
    return found


def anchors(page: str) -> set[str]:
    """The names that GitHub gives to the page's headings."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in HEADING.findall(prose(page))}


def sources(folder: Path) -> set[str]:
    return {f.name for f in folder.iterdir() if f.suffix in SOURCES and f.name != "__init__.py"}


def refusal(words: list[str], capsys) -> str:
    """What the command line says against ``words``; empty if it takes them."""
    try:
        _parse(words)
    except SystemExit:
        return capsys.readouterr().err
    return ""


@pages
def test_every_command_shown_parses(page, capsys, tmp_path, monkeypatch):
    (tmp_path / "refs").mkdir()  # as the pages show: a folder to write into is looked for at once
    monkeypatch.chdir(tmp_path)
    assert not [f"fitv2 {shlex.join(words)}: {said}" for words in commands(page) if (said := refusal(words, capsys))]


@pages
def test_every_command_named_exists(page, capsys):
    for words in map(shlex.split, INLINE.findall(prose(page))):
        said = refusal(words[1:], capsys)
        assert not said or "arguments are required" in said, f"{page} names `{shlex.join(words)}`: {said}"


@pages
def test_every_key_named_exists(page):
    named = KEY.findall(text(page))
    assert not [f"{section}.{key}" for section, key in named if key not in SECTIONS[section]]


@pages
def test_every_file_named_exists(page):
    assert not [name for name in PATH.findall(text(page)) if not (ROOT / name).is_file()]
    assert not [name for name in ROOM.findall(text(page)) if not (ROOT / name).is_dir()]
    tree = [f"/{file.relative_to(ROOT)}" for folder in FOLDERS for file in (ROOT / folder).rglob("*.*")]
    assert not [name for name in NAME.findall(prose(page)) if not any(path.endswith(f"/{name}") for path in tree)]


@pages
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(prose(page)):
        if not link.startswith("https://"):
            target, _, anchor = link.partition("#")
            file = (ROOT / page).parent / target if target else ROOT / page
            assert file.exists(), f"{page} links to {link}"
            assert not anchor or anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{page} links to {link}"


@pages
def test_pages_are_short_and_in_the_words_of_the_glossary(page):
    lines = text(page).count("\n")
    assert lines <= (150 if page == "README.md" else 300)
    if page != "CHANGELOG.md":  # which names what has another name now
        assert not OLD_WORDS.findall(prose(page))


def test_what_is_looked_for_is_there():
    """The patterns above find something."""
    assert {f"{folder}/README.md" for folder in FOLDERS} | {"README.md", "CONTRIBUTING.md"} <= {*PAGES}
    assert sum(len(commands(page)) for page in PAGES) >= 50
    assert sum(len(KEY.findall(text(page))) for page in PAGES) >= 60
    assert sum(len(PATH.findall(text(page)) + NAME.findall(prose(page))) for page in PAGES) >= 150
    assert sum("#" in link for page in PAGES for link in LINK.findall(prose(page))) >= 30


def test_the_map_of_the_root_page_is_that_of_the_disk():
    rows = [(re.match(r"\[?`(.+?)/`", cell), rest) for cell, rest in ROW.findall(text("README.md"))]
    named = {folder[1]: rest.split(" | ")[-1] for folder, rest in rows if folder}
    packages = {str(p.parent.relative_to(ROOT)) for folder in FOLDERS[:2] for p in ROOT.glob(f"{folder}/*/__init__.py")}
    assert named.keys() == {*FOLDERS} | packages
    for folder, begin in named.items():
        for file in re.findall(r"`(.+?)`", begin):
            assert (ROOT / folder / file).is_file(), f"{folder}/{file}"


def test_the_page_of_the_tests_names_their_folders():
    named = re.findall(r"`(\w+)/`", "".join(cell for cell, _ in ROW.findall(text("tests/README.md"))))
    assert sorted(named) == sorted(f.name for f in (ROOT / "tests").iterdir() if f.is_dir() and f.name[0] not in "_.")


@pytest.mark.parametrize("page", [page for page in PAGES if "\n## Files\n" in text(page)])
def test_the_list_of_files_is_that_of_the_disk(page):
    here, listed = (ROOT / page).parent, {}
    for cell, rest in ROW.findall(text(page).partition("\n## Files\n")[2]):
        if files := LISTED.findall(rest):
            listed.setdefault(here / cell.strip("`") if cell.endswith("/`") else here, set()).update(files)
    elsewhere = {file.parent for file in here.rglob("README.md")} - {here}
    inside = [f for f in (here, *here.rglob("*")) if f.is_dir() and not elsewhere & {f, *f.parents} and sources(f)]
    named = {folder / name for folder, names in listed.items() for name in names}
    there = {folder / name for folder in inside for name in sources(folder)}
    assert sorted(named ^ there) == [], f"{page} lists these under Files and they are not there, or the reverse"


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """The current folder, with the dataset and the run that the pages speak of."""
    shutil.copytree(OLD / "dataset", tmp_path / "data" / "mine")
    shutil.copytree(OLD / "run", tmp_path / "runs" / "mine")
    identity = tmp_path / "runs" / "mine" / "run.json"
    record = json.loads(identity.read_text())
    record["config"]["data"]["url"] = "data/mine"  # where it lies is no part of what the run is
    identity.write_text(json.dumps(record))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("page", "block"), [(page, i) for page in PAGES for i in range(len(PYTHON.findall(text(page))))]
)
def test_every_python_block_runs(page, block, workplace, capsys):
    exec(compile(PYTHON.findall(text(page))[block], f"{page}, block {block}", "exec"), {"__name__": "__main__"})
    if page == "data_sharding/README.md":
        printed = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in printed] == ["0", "1", "2"]
