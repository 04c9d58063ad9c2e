"""fitv2 evaluate: FID, sFID, IS, precision and recall."""

import argparse
from typing import TYPE_CHECKING, Any

from data_sharding.errors import UserError
from fitv2_scale.cli.common import (
    SAMPLING_FLAGS,
    before_joining,
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
    from fitv2_scale.evaluate.evaluate import Evaluation, EvaluationOptions
    from fitv2_scale.evaluate.generated_features import Cell
    from fitv2_scale.evaluate.sampling.load_weights import Weights
    from fitv2_scale.parallel.agreement import Facts

# Options that have no effect on weights, or on images, and the sentence that refuses them.
_UNUSED = {
    "weights": (
        ("save_statistics",),
        "{} needs images: make some with `fitv2 sample … --images N --folder DIR`",
    ),
    "images": (
        (
            *("overrides", "config", "out", "keep_features", "suite", "images", "nfe", "classes", "seed"),
            *SAMPLING_FLAGS,
        ),
        "images that exist already are measured as they are: leave out {}",
    ),
    "list": (
        (
            *("overrides", "config", "out", "keep_features", "images", "nfe", "classes", "seed", "size"),
            *SAMPLING_FLAGS,
            *("network", "network_sha256", "reference", "save_statistics"),
        ),
        "--list shows what is in a suite and measures nothing: leave out {}",
    ),
}


def add(commands: Any) -> None:
    evaluate = make(
        commands, "evaluate", evaluate_source, "measure FID, sFID, IS, precision and recall of images", on_ranks=True
    )
    evaluate.add_argument(
        "source",
        metavar="WHAT",
        nargs="?",
        help="RUN, RUN@STEP or a weights file to sample from; or images: a folder, tars, a dataset, an .npz; or "
        "features: an .npz",
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run's config")
    evaluate.add_argument("--network", metavar="FILE", help="feature network as TorchScript, from uint8 (N, 3, H, W)")
    evaluate.add_argument("--network-sha256", metavar="HEX", help="digest of FILE, checked before it is loaded")
    evaluate.add_argument(
        "--reference", metavar="REF", help="an .npz in ADM's format, a folder of HxW.npz, or images as in WHAT"
    )
    evaluate.add_argument(
        "--reference-images", type=whole(1), default=50_000, metavar="N", help="maximum number (default 50000)"
    )
    evaluate.add_argument(
        "--save-statistics",
        type=new_file(".npz"),
        metavar="FILE.npz",
        help="save the images' statistics as a reference",
    )
    evaluate.add_argument("--suite", metavar="NAME", help="in1k256, ood, hr, ablation, or a .yaml file")
    evaluate.add_argument("--list", action="store_true", help="show the networks, sizes and samplers of --suite")
    evaluate.add_argument(
        "--size", action="append", metavar="HxW", help="in pixels, multiples of 8 times model.patch; may be repeated"
    )
    evaluate.add_argument(
        "--images", type=whole(1), metavar="N", help="images of each size (default 50000, or the suite's)"
    )
    evaluate.add_argument("--nfe", metavar="5,10,…", help="table and plot of FID against these numbers of evaluations")
    evaluate.add_argument("--classes", metavar="A,B,…", help="class numbers (default: all)")
    evaluate.add_argument("--cfg", type=float, help="guidance scale; this and the next six as in `fitv2 sample`")
    for name in SAMPLING_FLAGS[1:]:
        evaluate.add_argument(f"--{name.replace('_', '-')}", type=int if name == "steps" else str)
    evaluate.add_argument("--seed", type=whole(0), help="seed of classes and noise (default 0)")
    evaluate.add_argument("--config", metavar="FILE", help="the config of a weights file")
    evaluate.add_argument("--vae", default="", metavar="FOLDER", help="VAE that decodes a dataset of sd-vae latents")
    evaluate.add_argument("--out", metavar="FOLDER", help="folder for the results (default: the run)")
    evaluate.add_argument("--keep-features", action="store_true", help="save the features as an .npz beside the result")


def evaluate_source(args: argparse.Namespace) -> int:
    if args.list:
        return _list_suite(args)
    from fitv2_scale.evaluate.evaluate import EvaluationOptions, evaluate_weights, is_network
    from fitv2_scale.parallel.rank_facts import command_facts

    options = EvaluationOptions(
        network=args.network,
        network_sha256=args.network_sha256,
        reference=args.reference,
        reference_images=args.reference_images,
        vae=args.vae,
        keep_features=args.keep_features,
    )
    with before_joining():
        if args.source is None:
            raise UserError("give WHAT to evaluate: RUN, RUN@STEP, a weights file, images or features")
        kind = "weights" if is_network(args.source) else "images"
        if kind == "weights":
            refuse_unused(args, *_UNUSED[kind])
        if args.nfe is not None:
            refuse_unused(args, ("steps",), "--nfe gives the numbers of steps: leave out {}")
        facts = {"WHAT": kind} | command_facts(args)
    if kind == "images":
        return _measure_images(args, options, facts)
    done = evaluate_weights(
        args.source,
        lambda weights: _cells(args, weights),
        options,
        config_file=args.config,
        overrides=args.overrides,
        out=args.out,
        facts=facts,
    )
    if done is not None:
        _report(args, done)
    return 0


def _list_suite(args: argparse.Namespace) -> int:
    from fitv2_scale.evaluate.suites import listing_text, load_suite

    if args.source is not None:
        raise UserError(f"--list shows what is in a suite and measures nothing: leave out {args.source}")
    refuse_unused(args, *_UNUSED["list"])
    if not args.suite:
        raise UserError("--list shows what is in a suite: give it as --suite NAME")
    suite = load_suite(args.suite)
    show(args, suite.listing(), listing_text(suite))
    return 0


def _measure_images(args: argparse.Namespace, options: "EvaluationOptions", facts: "Facts") -> int:
    from fitv2_scale.evaluate.evaluate import evaluate_images
    from fitv2_scale.evaluate.results import METRICS
    from fitv2_scale.parallel.agreement import agree, read_alike
    from fitv2_scale.parallel.rank_facts import software_facts
    from fitv2_scale.parallel.world import join

    with join() as world:
        agree(
            world, facts | software_facts(world.device)
        )  # first: a rank that does not see the run of the others takes it for images
        read_alike(world, lambda: (refuse_unused(args, *_UNUSED["images"]), {}))
    if not world.is_first:
        return 0  # one process is enough
    if args.size and len(args.size) > 1:
        raise UserError("images are measured at one size: give one --size")
    size = args.size[0] if args.size else None
    result = evaluate_images(args.source, size, options, args.save_statistics, world.device)
    figures = {name: result[name] for name in METRICS if result.get(name) is not None}
    lines = [f"{args.source}: {result['images']:,} images" + (f" of {result['size']}" if result["size"] else "")]
    lines += [*_besides(result), *_of_references([result])]
    lines += [f"{name:>10} {value:.4f}" for name, value in figures.items()]
    lines += [f"{args.save_statistics}: statistics of these images"] if args.save_statistics else []
    show(args, result, "\n".join(lines))
    if left_out := result.get("left_out"):
        raise UserError(
            f"{len(left_out)} of the images cannot be read and were left out of these figures; they are named above, "
            'and all of them as "left_out" with --json'
        )
    return 0


def _cells(args: argparse.Namespace, weights: "Weights") -> "list[Cell]":
    from fitv2_scale.config.load import with_changes
    from fitv2_scale.config.model import RopeConfig, parse_size
    from fitv2_scale.config.solvers import require_fitting
    from fitv2_scale.evaluate.generated_features import Cell
    from fitv2_scale.evaluate.published_networks import Network
    from fitv2_scale.evaluate.sampling.sampler import rope_for_size
    from fitv2_scale.evaluate.suites import load_suite

    model, objective = weights.config.model, weights.config.objective
    refuse_other_positions(args, model.position)
    suite = load_suite(args.suite) if args.suite else None
    if suite and args.size:
        raise UserError("a suite has its own sizes: leave --size out")
    sizes = [{"size": size} for size in args.size or ["256x256"]]
    wanted = suite.cells_of(Network(model, objective)) if suite else sizes
    images = args.images or (suite.images if suite else 50_000)
    labels = class_numbers(args.classes, model.classes) if args.classes else range(weights.classes)
    cells = []
    for cell in wanted:
        size = cell.pop("size")
        rows, columns = parse_size(size, model.pixels_per_token)
        for few in _few_steps(args.nfe, args.solver, objective):
            sampling = with_changes(weights.config.sampling, cell | sampling_changes(args) | few)
            require_fitting(sampling.solver, objective)
            # What "auto" means for it.
            rope = rope_for_size(sampling, model, rows, columns) if model.position == "rope" else RopeConfig()
            sampling = with_changes(sampling, {"rope": rope.mode, "attention_scale": rope.attention_scale})
            cells.append(Cell(size, sampling, images, args.seed or 0, tuple(labels)))
    return cells


def _few_steps(nfe: str | None, solver: str | None, objective: str) -> list[dict]:
    """The changes to ``sampling`` for each number of evaluations; a step of heun takes two."""
    from fitv2_scale.config.solvers import SOLVERS

    if nfe is None:
        return [{}]
    counts, solver = nfe.split(","), solver or ("ddim" if objective == "ddpm" else "euler")
    fixed = {s.name: s.evaluations for s in SOLVERS if s.evaluations is not None and s.objective == objective}
    if (each := fixed.get(solver)) is None:
        *others, last = fixed
        raise UserError(f"--nfe needs a solver of fixed steps: {', '.join(others)} or {last}, not {solver}")
    if not all(count.isdecimal() and int(count) >= each and int(count) % each == 0 for count in counts):
        raise UserError(f"--nfe {nfe}: give {'even ' if each == 2 else ''}numbers as in 4,8,50")
    return [{"solver": solver, "steps": int(count) // each} for count in counts]


def _report(args: argparse.Namespace, done: "Evaluation") -> None:
    from fitv2_scale.evaluate.nfe_sweep import save_plot
    from fitv2_scale.evaluate.results import FOLDER
    from fitv2_scale.evaluate.suites import load_suite, results_table, suite_table

    suite = load_suite(args.suite) if args.suite else None
    table = suite_table(suite, done.results) if suite else results_table(done.results)
    where = done.store.path(f"{FOLDER}/{done.step}.json")
    lines = [
        table,
        "",
        *_other_sizes(done.results),
        *_of_references(done.results),
        f"{where}: all measurements of these weights",
    ]
    if suite:
        done.store.put(f"{FOLDER}/{done.step}/{suite.name}.md", f"{table}\n".encode())
    if args.nfe:
        path = f"{FOLDER}/{done.step}/nfe.png"
        save_plot(done.results, done.store, path)
        lines.append(f"{done.store.path(path)}: FID against NFE")
    if done.run is not None:
        from fitv2_scale.evaluate.mlflow_upload import publish

        lines.append(publish(done.run, done.results))
    show(args, done.results, "\n".join(lines))


def _other_sizes(results: list[dict[str, Any]]) -> list[str]:
    """A line for each reference whose images have another size: it is allowed, but should be known."""
    sizes = {(r["reference"]["source"], r["reference"]["size"], r["size"]) for r in results}
    return [
        f"the images of {where} are {its}, those measured are {ours}"
        for where, its, ours in sorted(sizes)
        if its not in (None, ours)
    ]


def _of_references(results: list[dict[str, Any]]) -> list[str]:
    """What the references hold besides images, each once."""
    found = {r["reference"]["source"]: _besides(r["reference"]) for r in results if "reference" in r}
    return [line for source, lines in found.items() if lines for line in (f"{source}, the reference:", *lines)]


def _besides(about: dict[str, Any]) -> list[str]:
    from data_sharding.write.write_report import counts_to_text

    return counts_to_text(about.get("seen", {}), about.get("left_aside", {}))
