"""What launchers/family.sh has made, side by side: one picture, and one table.

    python -m launchers.family_report FOLDER

FOLDER/FAMILY is a run, FOLDER/FAMILY-MODE-SIZE.png samples of it, and FOLDER/FAMILY-MODE-TOKENS.json what `fitv2
validate` says of it; MODE is that of the positions, "auto" for RoPE. Writes FOLDER/family.png and FOLDER/family.md.
"""

import json
import sys
from pathlib import Path

from data_sharding.errors import UserError
from data_sharding.standard_streams import reporting
from fitv2_scale.checkpoint.commit import read_manifest
from fitv2_scale.run.run import Run

_NAMES = {"fitv2": "FiTv2", "fit": "FiT", "sit": "SiT", "dit": "DiT"}
_WAYS = {"auto": "", "none": "", "ei": ", table resized (EI)", "pi": ", positions interpolated (PI)"}
_TRAINED = 100  # tokens
_WIDTH, _HEIGHT = 3.4, 1.35  # inches of a cell of the picture

Row = tuple[str, str]  # family, mode


def rows_of(folder: Path) -> list[Row]:
    """In the order of ``_NAMES`` and ``_WAYS``. Raises UserError if there are none."""
    found = {(family, mode) for family, mode, *_ in (file.stem.split("-") for file in folder.glob("*-*-*.json"))}
    if not found:
        raise UserError(f"{folder} holds no losses: give the folder that launchers/family.sh made, as runs/family/1000")
    return sorted(found, key=lambda row: (list(_NAMES).index(row[0]), list(_WAYS).index(row[1])))


def losses(folder: Path, row: Row) -> dict[int, float]:
    """The loss of the held-out images by the most tokens of one."""
    files = folder.glob(f"{'-'.join(row)}-*.json")
    return dict(sorted((int(f.stem.split("-")[2]), json.loads(f.read_text())["val_loss_ema"]) for f in files))


def table(folder: Path) -> str:
    """Markdown. A flow's loss and a DDPM's are different quantities, so each is also given in parts of its own at the
    size of the training."""
    rows = rows_of(folder)
    heads = ["", "parameters", "images", "TFLOP", *(f"{tokens} tokens" for tokens in losses(folder, rows[0]))]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        run = Run.open(str(folder / row[0]))
        manifest, found = read_manifest(run, run.log.commits()[-1]), losses(folder, row)
        images, flops = sum(manifest["cursor"]["images"]), manifest["accounting"]["flops"]
        cost = f"{run.recorded('parameters'):,}", f"{images:,}", f"{flops / 1e12:.3g}"
        values = (f"{loss:.3f} ({loss / found[_TRAINED]:.2f})" for loss in found.values())
        lines.append("| " + " | ".join([_NAMES[row[0]] + _WAYS[row[1]], *cost, *values]) + " |")
    return "\n".join(lines) + "\n"


def picture(folder: Path, file: Path) -> None:
    """A row for each network and way, a column for each size."""
    from matplotlib.figure import Figure
    from PIL import Image

    rows = rows_of(folder)
    sizes = sorted({f.stem.split("-")[2] for f in folder.glob("*-*-*x*.png")}, key=_pixels)
    figure = Figure(figsize=(1.6 + _WIDTH * len(sizes), _HEIGHT * len(rows)), layout="constrained")
    cells = figure.subplots(len(rows), len(sizes), squeeze=False)
    for row, line in zip(rows, cells, strict=True):
        for size, axes in zip(sizes, line, strict=True):
            with Image.open(folder / f"{'-'.join(row)}-{size}.png") as samples:
                axes.imshow(samples.convert("RGB"))
            axes.set_xticks([])
            axes.set_yticks([])
            if row == rows[0]:
                axes.set_title(size)
        name = (_NAMES[row[0]] + _WAYS[row[1]]).replace(", ", "\n").replace(" (", "\n(")
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(file, dpi=80)


def _pixels(size: str) -> int:
    height, width = size.split("x")
    return int(height) * int(width)


def main(words: list[str]) -> int:
    with reporting():
        try:
            (folder,) = map(Path, words)
            (folder / "family.md").write_text(text := table(folder))
            picture(folder, folder / "family.png")
            print(text)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
