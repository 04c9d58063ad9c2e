"""Suites: published tables as files, and our metrics beside theirs. They are in published/, a part of this package, so
a job that runs a copy of the code has them everywhere.

title: ImageNet at 256 x 256 and at other aspects of the same area (Tab. IV)
images: 50000
sampling: {solver: dopri5, guided_channels: three}     # for all cells
cells:
  - {size: 256x256, rope: none}                        # other changes to the run's section `sampling`
published:                                             # FID, sFID, IS, precision, recall by size; null: not given
  - model: DiT-XL/2
    seen: 1792M
    config: dit_xl2                                    # of this network, if it can be trained here; in configs/
    sampling: {solver: ddpm, steps: 250}               # of this network: changes to all of the above
    256x256: [2.27, 4.60, 278.24, 0.83, 0.57]

A run of a row's network, which has its ``model`` and ``objective``, is sampled as that row was.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_sharding.errors import UserError
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.config.solvers import solver_facts
from fitv2_scale.config.yaml_text import parse_mapping, read_text
from fitv2_scale.evaluate.published_networks import Network, network_of
from fitv2_scale.evaluate.results import METRICS, guidance

_FOLDER = Path(__file__).with_name("published")
_TABLE_MODES = ("pi", "ei")  # of sampling.sincos, for sizes that the table of positions was not trained at
_HEADS = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "Prec.", "recall": "Rec."}


class Published(BaseModel):
    """A row of a published table; ``metrics`` by size, in the order of ``METRICS``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    seen: str = ""  # images trained on, as in 512M
    config: str = ""  # see network_of; empty: it cannot be trained here
    sampling: dict[str, Any] = {}  # changes to those of the cells
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

    @property
    def rows_of_networks(self) -> dict[str, Published]:
        """A row for each config that one names. Raises UserError if two rows of one have different samplers."""
        found: dict[str, Published] = {}
        for row in self.published:
            if row.config and found.setdefault(row.config, row).sampling != row.sampling:
                raise UserError(
                    f"the suite {self.name} has two samplers for {row.config}, in the rows {found[row.config].model} "
                    f"and {row.model}: give both rows the same sampling"
                )
        return found

    def cells_of(self, network: Network) -> list[dict[str, Any]]:
        """The cells for a network: sampled as published, if a row is of this network, else as ``cells`` say.

        Where a fixed table of positions is not at the size of its training, a cell becomes two, of which one stretches
        the positions and one resizes the table.

        Raises:
            UserError: several rows are of this network, and they have different samplers.
        """
        rows = [row for config, row in self.rows_of_networks.items() if network_of(config) == network]
        if not rows:
            return [dict(cell) for cell in self.cells]
        if differing := [row for row in rows if row.sampling != rows[0].sampling]:
            raise UserError(
                f"the suite {self.name} has two samplers for this network, in the rows {rows[0].model} and "
                f"{differing[0].model}: give both rows the same sampling"
            )
        return [each for cell in self.cells for each in _with_positions(cell | rows[0].sampling, network)]

    def listing(self) -> list[dict[str, Any]]:
        """Each cell of each network that a row names: its ``config``, ``objective``, ``size``, and what of the section
        ``sampling`` is set."""
        found = []
        for config in self.rows_of_networks:
            network = network_of(config)
            for cell in self.cells_of(network):
                size = cell.pop("size")
                found.append({"config": config, "objective": network.objective, "size": size, "sampling": _used(cell)})
        return found


def _with_positions(cell: dict[str, Any], network: Network) -> Iterator[dict[str, Any]]:
    model = network.model
    if model.position != "sincos":
        yield cell
        return
    cell = cell | {"rope": "none", "attention_scale": "none"}
    if cell["size"] == "{0}x{0}".format(model.sincos.train_side * model.pixels_per_token):
        yield cell
    else:
        yield from (cell | {"sincos": mode} for mode in _TABLE_MODES)


def _used(sampling: dict[str, Any]) -> dict[str, Any]:
    """What of ``sampling`` its solver uses."""
    if "solver" not in sampling:
        return sampling
    is_adaptive = solver_facts(sampling["solver"]).evaluations is None
    unused = ("steps",) if is_adaptive else ("atol", "rtol")
    return {key: value for key, value in sampling.items() if key not in unused}


class _FileCell(SamplingConfig):
    size: str


class _FileRow(BaseModel):
    model: str
    seen: str
    config: str
    sampling: SamplingConfig


class _File(BaseModel):
    """The types of the keys in a file; the metrics below ``published`` are under keys of their own, the sizes."""

    title: str
    images: int
    sampling: SamplingConfig
    cells: list[_FileCell]
    published: list[_FileRow]


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
        own = ("model", "seen", "config", "sampling")
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


def listing_text(suite: Suite) -> str:
    """``Suite.listing`` in columns."""
    rows = [("config", "objective", "size", "sampling")]
    rows += [
        (each["config"], each["objective"], each["size"], " ".join(f"{k}={v}" for k, v in each["sampling"].items()))
        for each in suite.listing()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{suite.title}; {suite.images:,} images a cell", "", *lines])


def results_table(results: list[dict[str, Any]]) -> str:
    """Markdown: a table with one row for each cell."""
    return "\n".join(_markdown([(r["size"], "", _how(r), [r[name] for name in METRICS]) for r in results]))


def _how(result: dict[str, Any]) -> str:
    """The settings of a result that differ between tables."""
    return (
        f"{result['weights']}, {result['images']:,} images, {guidance(result)}, {result['solver']}, "
        f"NFE {result['nfe']:g}, {positions(result)}"
    )


def positions(cell: dict[str, Any]) -> str:
    """How positions are extrapolated in a cell or a result, as in "rope vision_ntk" or "sincos pi"."""
    return f"sincos {cell['sincos']}" if "sincos" in cell else f"rope {cell['rope']}"


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
