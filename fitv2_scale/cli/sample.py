"""fitv2 sample: images of any size from trained weights."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_sharding.errors import UserError
from fitv2_scale.cli.common import (
    class_numbers,
    make,
    new_file,
    refuse_other_positions,
    refuse_unused,
    sampling_changes,
    show,
    whole,
)

if TYPE_CHECKING:  # torch is imported when there is something to do
    import torch

    from fitv2_scale.config.sections import SamplingConfig
    from fitv2_scale.evaluate.sampling.load_weights import Weights
    from fitv2_scale.parallel.agreement import Facts

_GRID, _COLUMNS = "samples.png", 8
# Options that have no effect on each kind of call, and the sentence that refuses them.
_UNUSED = {
    "single images": (("compare", "out", "columns"), "--images makes single images, no grid: leave out {}"),
    "comparison": (("folder", "npz"), "--compare makes one grid: leave out {}"),
    "grid": (("folder", "npz"), "without --images one grid is made: give their number as --images N, or leave out {}"),
}


def add(commands: Any) -> None:
    sample = make(commands, "sample", sample_images, "sample images of any size from EMA weights", on_ranks=True)
    sample.add_argument("weights", metavar="RUN_OR_WEIGHTS", help="RUN, RUN@STEP, or .safetensors/.bin with --config")
    sample.add_argument("overrides", nargs="*", metavar="key=value", help="config changes, as in layout.tensor=2")
    sample.add_argument("--config", metavar="FILE", help="the config of a weights file")
    sample.add_argument(
        "--size", action="append", metavar="HxW", help="in pixels, multiples of 8 times model.patch; may be repeated"
    )
    sample.add_argument("--classes", metavar="A,B,…", help="class numbers (default: spread evenly over all)")
    sample.add_argument("--columns", type=whole(1), help="number of classes, if --classes is not given (default 8)")
    sample.add_argument("--cfg", type=float, help="guidance scale; 1: none (default: the config's sampling.cfg, 1.5)")
    sample.add_argument(
        "--guided-channels",
        metavar="all|three",
        help="channels guided (default all; released: three)",
    )
    sample.add_argument(
        "--solver", metavar="euler|heun|dopri5|sde|ddpm|ddim", help="solver (default: the config's, euler)"
    )
    sample.add_argument("--steps", type=int, help="steps of all but dopri5 (default: the config's, 50)")
    sample.add_argument(
        "--rope",
        metavar="MODE",
        help="RoPE of large images: none, pi, ntk, yarn, vision_ntk, vision_yarn (default: as published)",
    )
    sample.add_argument(
        "--sincos",
        metavar="none|ei|pi",
        help="positions of a table of sines in other sizes than the trained one (default: the model's own)",
    )
    sample.add_argument(
        "--attention-scale", metavar="none|paper|released", help="of the logits (default: as published)"
    )
    sample.add_argument("--seed", type=whole(0), default=0, help="of the noise, with each image's index (default 0)")
    sample.add_argument(
        "--out",
        type=new_file(".png"),
        metavar="FILE.png",
        help="the grid: one row per size, one column per class (default samples.png)",
    )
    sample.add_argument("--compare", action="store_true", help="compare all RoPE modes at one --size, in --out")
    sample.add_argument(
        "--images", type=whole(1), metavar="N", help="sample N single images of random classes into --folder"
    )
    sample.add_argument("--folder", metavar="DIR", help="folder of the single images; a killed call continues there")
    sample.add_argument(
        "--npz",
        type=new_file(".npz"),
        metavar="FILE.npz",
        help="the single images in the format of ADM's evaluator; needs --images",
    )


def sample_images(args: argparse.Namespace) -> int:
    from fitv2_scale.config.load import with_changes
    from fitv2_scale.evaluate.sampling.load_weights import open_weights
    from fitv2_scale.parallel.agreement import read_alike
    from fitv2_scale.parallel.world import join

    with join() as world:
        sample_as, sizes = read_alike(world, lambda: _request(args, world.device))
        with open_weights(args.weights, world, args.config, args.overrides) as weights:
            refuse_other_positions(args, weights.config.model.position)
            sampling = with_changes(weights.config.sampling, sampling_changes(args))
            report, text = sample_as(args, weights, sampling, sizes)
            if world.is_first:
                show(args, {"weights": weights.name, "step": weights.step, "solver": sampling.solver} | report, text)
    return 0


def _request(args: argparse.Namespace, device: "torch.device") -> "tuple[tuple[Callable, list[str]], Facts]":
    """What makes the images and their sizes, and the facts in which all ranks must agree."""
    from fitv2_scale.parallel.rank_facts import command_facts, software_facts

    sizes = args.size or ["256x256"]
    if args.compare and len(sizes) > 1:
        raise UserError("--compare shows one size: give one --size")
    kind = "single images" if args.images is not None else "comparison" if args.compare else "grid"
    refuse_unused(args, *_UNUSED[kind])
    sample_as = {"single images": _single_images, "comparison": _compare, "grid": _grid}[kind]
    return (sample_as, sizes), command_facts(args) | software_facts(device)


def _grid(args: argparse.Namespace, weights: "Weights", sampling: "SamplingConfig", sizes: list[str]) -> tuple:
    from fitv2_scale.evaluate.sampling.image_grid import decode, grid_png, grid_requests
    from fitv2_scale.evaluate.sampling.sampler import sample

    file = args.out or _GRID
    codec, labels = weights.shared_codec(), _labels(args, weights)
    requests = grid_requests(sizes, labels, weights.config.model.pixels_per_token)
    made = sample(
        weights.engine.network,
        requests,
        model=weights.config.model,
        objective=weights.config.objective,
        sampling=sampling,
        seed=args.seed,
        world=weights.world,
        tensor=weights.layout.tensor,
    )
    if weights.world.is_first:
        png = grid_png([decode(made[r].tokens, codec) for r in requests], rows=len(sizes))
        _write(file, png)
    nfe = sum(one.nfe for one in made.values()) / len(made)
    return {"file": file, "nfe": nfe}, f"{file}: images from {weights.described}, NFE {nfe:g}"


def _single_images(args: argparse.Namespace, weights: "Weights", sampling: "SamplingConfig", sizes: list[str]) -> tuple:
    from fitv2_scale.evaluate.sampling.png_folder import fill_folder, random_requests, write_npz

    if args.npz and len(sizes) > 1:
        raise UserError("an .npz for ADM's evaluator holds images of one size: give one --size")
    labels = _labels(args, weights) if args.classes else list(range(weights.classes))
    pixels_per_token = weights.config.model.pixels_per_token
    requests = random_requests(sizes, args.images, labels, args.seed, pixels_per_token)
    folder = args.folder or f"{args.npz or 'samples'}.pictures"
    done = fill_folder(weights, requests, sampling, args.seed, folder, weights.shared_codec())
    if args.npz and weights.world.is_first:
        write_npz(folder, requests, args.npz, pixels_per_token)
    text = f"{folder}: {args.images} images from {weights.described}, NFE {done.nfe:g}, {done.made} new"
    report = {"folder": folder, "images": args.images, "made": done.made, "nfe": done.nfe, "npz": args.npz}
    return report, text + (f"; {args.npz}" if args.npz else "")


def _compare(args: argparse.Namespace, weights: "Weights", sampling: "SamplingConfig", sizes: list[str]) -> tuple:
    from fitv2_scale.evaluate.sampling.rope_comparison import compare, plot, to_text

    file = args.out or _GRID
    found = compare(weights, sampling, sizes[0], _labels(args, weights), args.seed)
    if weights.world.is_first:
        _write(file, plot(found, sizes[0]))
    return {"file": file, "ways": [way.report() for way in found]}, f"{to_text(found)}\n{file}"


def _labels(args: argparse.Namespace, weights: "Weights") -> list[int]:
    from fitv2_scale.evaluate.sampling.image_grid import evenly_spaced_labels

    if args.classes is None:
        return evenly_spaced_labels(args.columns or _COLUMNS, weights.classes)
    return class_numbers(args.classes, weights.config.model.classes)


def _write(file: str, data: bytes) -> None:
    try:
        Path(file).write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
