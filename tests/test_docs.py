"""The pages for users: every command that they show is one, with options, keys and files that there are."""

import re
import shlex
from pathlib import Path

import pytest

from fitv2_scale.cli.__main__ import _parse
from fitv2_scale.config.schema import Config

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
SECTIONS = {
    n: f.annotation.model_fields for n, f in Config.model_fields.items() if hasattr(f.annotation, "model_fields")
}
KEY = re.compile(rf"(?<![\w/])({'|'.join(SECTIONS)})\.(\w+)(?==|`)")
FILE = re.compile(r"\b(?:tests|configs|launchers|fitv2_scale|data_sharding)/[\w/]+(?:\.\w+)+")
LINK = re.compile(r"\]\(([^)#:]+)\)")

pages = pytest.mark.parametrize("page", ["README.md", "PERFORMANCE.md"])


def commands(page: str) -> list[list[str]]:
    """The words of each `fitv2` that a block of ``page`` calls, also under torchrun, and of what it queues as a job."""
    found = []
    for block in BLOCK.findall((ROOT / page).read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            words = words[: words.index(">")] if ">" in words else words
            if called := {"fitv2", "fitv2_scale.cli"} & {*words}:
                found.append(words[words.index(called.pop()) + 1 :])
                found += [found[-1][found[-1].index("--") + 1 :]] if "--" in found[-1] else []
    return found


@pages
def test_every_command_shown_is_one(page, capsys, tmp_path, monkeypatch):
    shown = commands(page)
    (tmp_path / "refs").mkdir()  # as the pages say: a folder to write into is looked for at once
    monkeypatch.chdir(tmp_path)
    assert len(shown) >= 10
    for words in shown:
        try:
            _parse(words)
        except SystemExit:
            pytest.fail(f"{page} shows `fitv2 {shlex.join(words)}`: {capsys.readouterr().err}")


@pages
def test_every_key_named_is_one(page):
    named = set(KEY.findall((ROOT / page).read_text()))
    assert len(named) >= 4
    assert not [f"{section}.{key}" for section, key in named if key not in SECTIONS[section]]


@pages
def test_every_file_named_is_there(page):
    text = (ROOT / page).read_text()
    named = {*FILE.findall(text), *LINK.findall(text)}
    assert len(named) >= 10
    assert not [name for name in named if not (ROOT / name).exists()]
