"""Suites: published tables as files, and our metrics beside theirs. They are in published/, a part of this package, so
a job that runs a copy of the code has them everywhere.

title: ImageNet at 256 x 256 and at other aspects of the same area (Tab. IV)
images: 50000
sampling: {solver: dopri5, guided_channels: three}     # for all cells
cells:
  - {size: 256x256, rope: none}                        # other changes to the run's section `sampling`
published:                                             # FID, sFID, IS, precision, recall by size; null: not given
  - {model: DiT-XL/2, seen: 1792M, 256x256: [2.27, 4.60, 278.24, 0.83, 0.57]}
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_sharding.errors import UserError
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.config.yaml_text import parse_mapping, read_text
from fitv2_scale.evaluate.results import METRICS, guidance

_FOLDER = Path(__file__).with_name("published")
_HEADS = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "Prec.", "recall": "Rec."}


class Published(BaseModel):
    """A row of a published table; ``metrics`` by size, in the order of ``METRICS``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    seen: str = ""  # images trained on, as in 512M
    metrics: dict[str, tuple[float | None, float | None, float | None, float | None, float | None]]


class Suite(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    images: int = Field(50_000, ge=2)
    cells: list[dict[str, Any]] = Field(min_length=1)  # size, and keys of the section sampling
    published: list[Published] = []

    @property
    def sizes(self) -> list[str]:
        return list(dict.fromkeys(cell["size"] for cell in self.cells))


class _FileCell(SamplingConfig):
    size: str


class _File(BaseModel):
    """The types of the keys in a file; the metrics below ``published`` are under keys of their own, the sizes."""

    title: str
    images: int
    sampling: SamplingConfig
    cells: list[_FileCell]
    published: list[Published]


def load_suite(name: str) -> Suite:
    """The suite in a file, given by its path or by its name in published/. Raises UserError."""
    if not name.endswith((".yaml", ".yml")):
        known = {file.stem: file for file in sorted(_FOLDER.glob("*.yaml"))}
        if name not in known:
            raise UserError(f"there is no suite {name}: give the path of a .yaml file, or one of {', '.join(known)}")
        name = str(known[name])
    try:
        tree = parse_mapping(read_text(name), name, _File)
        common, rows = tree.pop("sampling", {}), tree.get("published", [])
        tree["cells"] = [common | cell for cell in tree["cells"]]
        own = ("model", "seen")
        tree["published"] = [
            {k: row[k] for k in own if k in row} | {"metrics": {k: v for k, v in row.items() if k not in own}}
            for row in rows
        ]
        suite = Suite.model_validate({"name": Path(name).stem} | tree)
        if not all(isinstance(cell.get("size"), str) for cell in suite.cells):
            raise ValueError("each cell needs a size, as in 256x256")
        return suite
    except OSError as error:
        raise UserError(f"cannot read the suite {name}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except KeyError as error:
        raise UserError(f"{name} is not a suite: it has no {error.args[0]}; see the examples in {_FOLDER}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{name} is not a suite: {' '.join(str(error).split())}") from error


def suite_table(suite: Suite, results: list[dict[str, Any]]) -> str:
    """Markdown: a table for each size, with the published rows and ours below them."""
    lines = [f"# {suite.title}"]
    for size in suite.sizes:
        rows = [(row.model, row.seen, "", row.metrics[size]) for row in suite.published if size in row.metrics]
        rows += [("**ours**", "", _how(r), [r[name] for name in METRICS]) for r in results if r["size"] == size]
        lines += ["", f"## {size}", "", *_markdown(rows)]
    return "\n".join(lines)


def results_table(results: list[dict[str, Any]]) -> str:
    """Markdown: a table with one row for each cell."""
    return "\n".join(_markdown([(r["size"], "", _how(r), [r[name] for name in METRICS]) for r in results]))


def _how(result: dict[str, Any]) -> str:
    """The settings of a result that differ between tables."""
    return (
        f"{result['weights']}, {result['images']:,} images, {guidance(result)}, {result['solver']}, "
        f"NFE {result['nfe']:g}, rope {result['rope']}"
    )


def _markdown(rows: list[tuple]) -> list[str]:
    heads = ("model", "seen", "how", *_HEADS.values())
    cells = [heads, *((model, seen, how, *map(_number, metrics)) for model, seen, how, metrics in rows)]
    used = [i for i in range(len(heads)) if any(row[i] for row in cells[1:]) or i == 0]
    width = {i: max(len(row[i]) for row in cells) for i in used}
    lines = [
        "| " + " | ".join(row[i].ljust(width[i]) if i < 3 else row[i].rjust(width[i]) for i in used) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width[i] + 2) if i < 3 else "-" * (width[i] + 1) + ":" for i in used) + "|"
    return [lines[0], rule, *lines[1:]]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
