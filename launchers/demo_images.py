"""The demo's images: crops of the colour photographs in the packages of scikit-image and scikit-learn.

    python -m launchers.demo_images DST [--crops 2000] [--scale 1]

    DST/astronaut/astronaut-0000.jpg …   one folder, hence one class, per photograph
    DST/CREDITS.txt                      author and licence of each photograph; written last

Each crop covers 55 to 100 % of its photograph, has its own aspect ratio and is shrunk to its own size, like photographs
collected from many sources. All draws are keyed: the crops are the same on every machine, and the same with another
--scale, only larger or smaller by that factor, but never larger than the photograph.
"""

import argparse
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from data_sharding.errors import UserError
from data_sharding.rng import Purpose, uniform
from data_sharding.storage.failures import as_sentence


@dataclass(frozen=True)
class Photograph:
    """``file`` is relative to the installed ``package``; ``credit`` is from that package's documentation."""

    name: str
    package: str
    file: str
    credit: str


# Left out: everything that is no natural colour photograph, and the Middlebury motorcycle, for which scikit-image
# documents authors but no licence.
PHOTOGRAPHS = (
    Photograph(
        "astronaut", "skimage", "data/astronaut.png",
        "Eileen Collins, American astronaut. NASA Great Images database, https://flic.kr/p/r9qvLn. "
        "No known copyright restrictions, released into the public domain.",
    ),
    Photograph(
        "cat", "skimage", "data/chelsea.png",
        "Chelsea the cat, by Stefan van der Walt. No copyright restrictions, CC0 by the photographer.",
    ),
    Photograph(
        "coffee", "skimage", "data/coffee.png",
        "Coffee cup, by Rachel Michetti, courtesy of Pikolo Espresso Bar. No copyright restrictions, CC0 by the "
        "photographer.",
    ),
    Photograph(
        "flower", "sklearn", "datasets/images/flower.jpg",
        "Dahlia. Creative Commons BY 2.0, https://creativecommons.org/licenses/by/2.0/. Some rights reserved by "
        "vultilion, https://www.flickr.com/photos/vultilion/6056698931/ (scikit-learn's README gives this address "
        "beside the name danielbuechele). Retrieved 21 August 2011 by Robert Layton.",
    ),
    Photograph(
        "pagoda", "sklearn", "datasets/images/china.jpg",
        "Temple in China. Creative Commons BY 2.0, https://creativecommons.org/licenses/by/2.0/. Some rights reserved "
        "by danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/. Retrieved 21 August 2011 by "
        "Robert Layton.",
    ),
    Photograph(
        "rocket", "skimage", "data/rocket.jpg",
        "Falcon 9 carrying DSCOVR, Cape Canaveral, by SpaceX, "
        "https://www.flickr.com/photos/spacexphotos/16511594820/. Released in the public domain by SpaceX.",
    ),
)  # fmt: skip


def crop(photograph: Image.Image, draws: np.ndarray, scale: float = 1.0) -> Image.Image:
    """One crop, determined by five draws in [0, 1): area, aspect, position across, position down, size."""
    area, aspect, across, down, size = draws
    pixels = photograph.width * photograph.height * (0.55 + 0.45 * area)
    ratio = photograph.width / photograph.height * 2 ** (1.5 * aspect - 0.75)  # up to 1.7 times flatter or steeper
    width = min(photograph.width, round((pixels * ratio) ** 0.5))
    height = min(photograph.height, round((pixels / ratio) ** 0.5))
    left, top = round(across * (photograph.width - width)), round(down * (photograph.height - height))
    mean_side = scale * 104 * 2 ** (1.5 * size)  # 104 .. 294 pixels at scale 1
    shrunk = min(1, mean_side / (width * height) ** 0.5)
    box = (left, top, left + width, top + height)
    return photograph.resize((round(width * shrunk), round(height * shrunk)), Image.Resampling.LANCZOS, box=box)


def write_photographs(dst: Path, crops: int, scale: float = 1.0) -> None:
    """Writes ``crops`` crops in all, the same number of each photograph, and their credits."""
    for i, photograph in enumerate(PHOTOGRAPHS):
        image = _open(photograph)
        folder = dst / photograph.name
        folder.mkdir(parents=True, exist_ok=True)
        for j in range(i, crops, len(PHOTOGRAPHS)):
            draws = uniform(0, Purpose.VIEW, 0, j, np.arange(5))
            crop(image, draws, scale).save(folder / f"{photograph.name}-{j // len(PHOTOGRAPHS):04d}.jpg", quality=95)
    lines = [f"{p.name}: {p.credit} Ships with {p.package} as {p.file}.\n" for p in PHOTOGRAPHS]
    (dst / "CREDITS.txt").write_text("The photographs, cropped and resized:\n\n" + "\n".join(lines), encoding="utf-8")


def _open(photograph: Photograph) -> Image.Image:
    try:
        with files(photograph.package).joinpath(photograph.file).open("rb") as file:
            return Image.open(file, formats=["JPEG", "PNG"]).convert("RGB")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError("the photographs are not installed: pip install -e '.[demo]'") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dst", type=Path, metavar="DST")
    parser.add_argument("--crops", type=int, default=2000)
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args(argv)
    try:
        with as_sentence(args.dst):
            write_photographs(args.dst, args.crops, args.scale)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.crops} crops of {len(PHOTOGRAPHS)} photographs are in {args.dst}, their credits in CREDITS.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
