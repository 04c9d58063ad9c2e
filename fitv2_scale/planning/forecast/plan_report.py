"""The report of `fitv2 plan`, as plain data and as text."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from data_sharding.errors import DataError
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.model import ModelConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.data import Data
from fitv2_scale.model.counts import forward_flops, logical_shapes, parameter_count
from fitv2_scale.planning.forecast.assumptions import Assumptions
from fitv2_scale.planning.forecast.disk_usage import storage_report
from fitv2_scale.planning.forecast.memory_per_rank import memory_report
from fitv2_scale.planning.forecast.node_count import NodeOption, candidates, choose, explain, node_report, until_decided
from fitv2_scale.planning.forecast.pack_statistics import data_statistics, packing_on
from fitv2_scale.planning.forecast.predicted import how_to_time, with_prediction
from fitv2_scale.planning.forecast.run_length import (
    RELEASED_DETECT,
    RELEASED_RESTART,
    RELEASED_SAVE,
    RELEASED_STEPS,
    configured_commits,
    goodput_report,
    recommended_schedule,
    run_length,
)
from fitv2_scale.planning.forecast.step_time import StepTime, estimate_step_time
from fitv2_scale.planning.forecast.words import counted, duration, small

_BESIDE = (4, 16)  # nodes on which FiT's released schedule is compared with ours


def forecast(config: Config, nodes: int, gpus_per_node: int, assumptions: Assumptions) -> dict[str, Any]:
    """The report as plain data. Without a dataset, the parts that need one (``data``, ``time``, ``goodput``,
    ``storage``, ``nodes``) are None, and ``data_missing`` has the reason."""
    assumptions = with_prediction(assumptions, config)
    ranks = nodes * gpus_per_node
    layout = config.layout.over(ranks, nodes)
    report: dict[str, Any] = {
        "gpu": assumptions.gpu,
        "model": _model(config.model, config.trainable),
        "layout": _layout(config, layout),
    }
    try:
        data = Data.open(config, layout.nodes([str(rank // gpus_per_node) for rank in range(ranks)]))
    except DataError as error:
        nothing = dict.fromkeys(("data", "time", "goodput", "storage", "nodes"))
        return report | nothing | {"memory": memory_report(config, layout, None, None), "data_missing": str(error)}
    figures = data_statistics(config, data, layout.data_parallel)
    step = estimate_step_time(config, layout, gpus_per_node, figures["flops_a_step"], figures, assumptions)
    tried = list(_tried(config, data, nodes, gpus_per_node, figures["flops_a_step"], assumptions))
    saving = recommended_schedule(config, step.seconds, nodes, assumptions)
    elsewhere = {c.nodes: c.seconds_a_step for c in tried if c.nodes in _BESIDE}
    goodput = goodput_report(config, step.seconds, nodes, assumptions, elsewhere)
    return report | {
        "data": figures,
        "memory": _memory(config, layout, figures, assumptions),
        "time": _time(config, step, figures["flops_a_step"], assumptions, asdict(run_length(
            config.train.steps, step.seconds, saving, nodes, ranks, assumptions
        ))),
        "goodput": goodput,
        "storage": storage_report(config, ranks, configured_commits(config, step.seconds), data),
        "nodes": node_report(tried, choose(tried, assumptions.gpu), config.batch.images),
        "assumed": assumptions.to_report(),
    }  # fmt: skip


def node_advice(config: Config, data: Data, asked: int, gpus_per_node: int, assumptions: Assumptions) -> str:
    """The number of nodes that the plan would choose, and the gain and cost of more. Computes only what that needs, in
    a second or two. Raises UserError if the state fits on no number of nodes."""
    assumptions = with_prediction(assumptions, config)
    flops = data_statistics(config, data, sum(data.nodes))["flops_a_step"]
    tried = until_decided(_tried(config, data, asked, gpus_per_node, flops, assumptions), assumptions.gpu)
    return explain(tried, choose(tried, assumptions.gpu), config.batch.images)


def _model(model: ModelConfig, trainable: list[str]) -> dict[str, Any]:
    return {
        "parameters": parameter_count(model),
        "trained_parameters": parameter_count(model, trainable),
        "tensors": len(logical_shapes(model)),
        "forward_flops_per_image": {str(n): forward_flops(model, n) for n in (256, 1024)},
        "training_flops_per_image": {str(n): 3 * forward_flops(model, n) for n in (256, 1024)},
    }


def _layout(config: Config, layout: Layout) -> dict[str, Any]:
    return {"ranks": layout.data_parallel * layout.tensor, "engine": config.layout.engine, **asdict(layout)}


def _memory(config: Config, layout: Layout, figures: dict[str, Any], assumptions: Assumptions) -> dict[str, Any]:
    report, room = (
        memory_report(config, layout, figures["packs_per_rank"], figures["capacities"][-1]),
        assumptions.gpu_bytes,
    )
    return report | {"gpu_bytes": room.value, "fits": report["cuda"]["peak_bytes"] <= room.value}


def _time(
    config: Config, step: StepTime, flops: float, assumptions: Assumptions, run: dict[str, float]
) -> dict[str, Any]:
    return {
        "seconds_a_step": step.seconds,
        **asdict(step),
        "not_in_time": list(assumptions.not_in_time),
        "how_to_time": how_to_time(config, assumptions) if assumptions.not_in_time else None,
        "images_per_second": config.batch.images / step.seconds,
        "flops_per_second": flops / step.seconds,
        "steps": config.train.steps,
        **run,
    }


def _tried(
    config: Config, data: Data, asked: int, gpus_per_node: int, flops: float, assumptions: Assumptions
) -> Iterator[NodeOption]:
    """The forecast for each number of nodes; with ``fsdp`` the state is sharded within a node and replicated across
    nodes."""
    tensor = config.layout.tensor if gpus_per_node % config.layout.tensor == 0 else 1
    for nodes in candidates(gpus_per_node, tensor, config.batch.images, asked):
        gpus = nodes * gpus_per_node
        layout = Layout.of(gpus, nodes if config.layout.engine == "fsdp" else 1, tensor)
        packing, capacity = packing_on(data, (gpus_per_node // tensor,) * nodes, config.layout)
        step = estimate_step_time(config, layout, gpus_per_node, flops, packing, assumptions)
        saving = recommended_schedule(config, step.seconds, nodes, assumptions)
        run = run_length(config.train.steps, step.seconds, saving, nodes, gpus, assumptions)
        peak = memory_report(config, layout, packing["packs_per_rank"], capacity)["cuda"]["peak_bytes"]
        yield NodeOption(
            nodes,
            gpus,
            layout.replicate,
            step.seconds,
            step.exposed,
            run.goodput,
            run.days,
            run.gpu_hours,
            peak,
            fits=peak <= assumptions.gpu_bytes.value,
        )


def to_text(report: dict[str, Any]) -> str:
    model, layout, data, memory = (report[key] for key in ("model", "layout", "data", "memory"))
    state = {name: f"{size / 2**30:.2f}" for name, size in memory["state_bytes_per_rank"].items()}
    share = f"({100 * model['trained_parameters'] / model['parameters']:.2f} % of them trained) "
    flops = model["training_flops_per_image"]
    each = f"{flops['256'] / 1e12:.3f} TFLOP per training image of 256 tokens, {flops['1024'] / 1e12:.3f} of 1,024"
    lines = [
        f"model    {model['parameters']:,} parameters {share if '100.00' not in share else ''}in {model['tensors']} "
        f"tensors, {each}",
        f"layout   {counted(layout['ranks'], 'rank')}, {layout['engine']} "
        f"(replicate {layout['replicate']} x shard {layout['shard']} x tensor {layout['tensor']})",
        f"state    {state['held']} GiB per rank: weights {state['weights']}, moments {state['moments']}, "
        f"EMA {state['ema']}; plus gradients {state['gradients']}, {state['accumulated']} kept between packs",
    ]
    if data is None:
        hint = "set data.url=preset:imagenet256 to plan with ImageNet's image sizes"
        return "\n".join([*lines, f"data     {report['data_missing']}; {hint}"])
    capacities, cuda = " or ".join(map(str, data["capacities"])), memory["cuda"]
    room = f"{'of' if memory['fits'] else 'more than'} the {memory['gpu_bytes'] / 2**30:.1f} of an {report['gpu']}"
    classes = f"{data['classes']} class{'' if data['classes'] == 1 else 'es'}"
    lines += [
        f"peak     about {cuda['peak_bytes'] / 2**30:.1f} GiB on a GPU, {room}; {cuda['saved_bytes'] / 2**30:.1f} are "
        f"saved for the backward pass (checkpointing {cuda['checkpointing']})",
        f"data     {counted(data['images'], 'image')}, {classes}, {data['mean_tokens']:.1f} tokens per image on "
        f"average, {data['epochs']:.3g} epochs of {data['steps_per_epoch']:.1f} steps",
        f"packs    {data['packs_per_rank']:.2f} per rank and step, of {capacities} tokens: "
        f"fill {data['fill']:.4f}, slowest rank {data['imbalance']:.4f} times the mean",
        f"compute  {data['training_flops']:.3g} FLOP in total",
    ]
    return "\n".join([*lines, *_run_lines(report), *_assumed_lines(report["assumed"])])


def _run_lines(report: dict[str, Any]) -> list[str]:
    time, good, stored, nodes = (report[key] for key in ("time", "goodput", "storage", "nodes"))
    left_out, simulated, interval = time["not_in_time"], good["simulated"], duration(good["interval_seconds"])
    key = f"checkpoint.every_minutes={good['interval_minutes']:.3g}"
    every = f"best every {interval} ({counted(good['interval_steps'], 'step')}): {key}"
    if good["interval_steps"] >= time["steps"]:
        every = f"best is one save at the end: the run is no longer than the best interval, {interval}"
    lines = [
        f"step     {1000 * time['seconds_a_step']:.4g} ms, {1000 * time['exposed']:.3g} of them waiting for transfers; "
        f"{time['images_per_second']:.4g} images/s ({time['source']})",
        *([f"         not in this time: {', '.join(left_out)}; {time['how_to_time']}"] if left_out else []),
        f"time     {duration(86400 * time['days'])}, {small(time['gpu_hours'])} GPU-hours to step {time['steps']:,}, "
        f"{time['failures']:.2g} failures expected",
        f"commits  {every}",
        f"goodput  {good['expected']:.4f}; {simulated['runs']} simulated runs: mean {simulated['mean']:.4f}, 95 % of "
        f"them {simulated['p5']:.4f} or more, the lowest {simulated['lowest']:.4f}, {simulated['failed_runs']} with a "
        f"failure; with the interval of the config {good['as_configured']:.4f}",
    ]
    lines += [
        f"         {on['nodes']:>2} nodes: {on['ours']:.4f}; with FiT's released schedule {on['released']:.4f}"
        for on in good["beside_released"]
    ]
    lines.append(
        f"storage  {stored['run_bytes'] / 1e9:,.1f} GB and {stored['run_inodes']:,} inodes at most: commits of "
        f"{stored['commit_bytes'] / 1e9:.2f} GB; with the config the run makes {stored['commits_made']:,} and keeps "
        f"{stored['commits_kept']:,}"
    )
    if data := stored["dataset"]:
        about = "about " if data["estimated"] else ""
        lines.append(f"         dataset: {about}{data['bytes'] / 1e9:,.1f} GB, {data['inodes']:,} inodes")
    lines.append(f"nodes    {nodes['why']}")
    shown = [c for c in nodes["tried"] if c["nodes"] in (1, 2, 4, 8, 16, 32, 64, nodes["choice"])]
    lines += [
        f"         {counted(c['nodes'], 'node'):<9} {1000 * c['seconds_a_step']:8.4g} ms per step "
        f"{duration(86400 * c['days']):>12} {small(c['gpu_hours']):>9} GPU-hours, goodput {c['goodput']:.4f}"
        f"{'' if c['fits'] else ', too little GPU memory'}"
        for c in shown
    ]
    return lines


def _assumed_lines(assumptions: dict[str, Any]) -> list[str]:
    """The assumptions behind the figures above, one per line."""
    units = {
        "peak_tflops": (1, "TFLOP/s"),
        "gpu_bytes": (1e9, "GB"),
        "network": (1e9, "GB/s"),
        "nvlink": (1e9, "GB/s"),
    }
    lines = [
        f"assumed  FiT's released schedule: a save every {RELEASED_STEPS:,} steps, as in its script; training waits "
        f"{RELEASED_SAVE:g} s for each save, a failure is noticed after {RELEASED_DETECT:,.0f} s, a restart takes "
        f"{RELEASED_RESTART:g} s"
    ]
    for name, figure in assumptions.items():
        scale, unit = units.get(name, (1, "s" if name.endswith("_seconds") else ""))
        lines.append(f"assumed  {name} {figure['value'] / scale:g}{unit and ' ' + unit}: {figure['source']}")
    return lines
