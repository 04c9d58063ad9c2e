"""Lets Inductor write the code of a block for a GPU that is not there, and counts its kernels."""

import types
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import ir
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode

from data_sharding.plan.pack_layout import PackShape
from fitv2_scale.bench.kernels.counts import FLOAT8, CompiledBlock, Kernel
from fitv2_scale.bench.kernels.fake_gpu import fake_gpu
from fitv2_scale.bench.kernels.gpus import Gpu
from fitv2_scale.config.schema import Config
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.parallel.engine_spec import EngineSpec

_DEVICE = "cuda"
_FACTORS = dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), slice(-2, None)) | {FLOAT8: slice(2)}  # among the inputs


def compile_block(config: Config, gpu: Gpu, shape: PackShape) -> CompiledBlock:
    """The kernels of one block of ``config``'s network for packs of ``shape``, compiled as a training step would.

    To be called once in a process of its own (see ``fake_gpu``).
    """
    spec = EngineSpec.of(config, on_cuda=True)
    found: dict[bool, tuple[Kernel, ...]] = {}
    counters.clear()
    with fake_gpu(gpu), _instead_of_loading(found), FakeTensorMode():
        network = _in_bf16(replace(spec, model=spec.model.model_copy(update={"depth": 1})))
        _train(network, shape)
    return CompiledBlock(
        graphs=counters["stats"]["unique_graphs"],
        breaks=sum(counters["graph_break"].values()),
        forward=found[False],
        backward=found[True],
    )


def _in_bf16(spec: EngineSpec) -> DiffusionTransformer:
    """The network with fake weights in bf16, as FSDP gives them to a block that computes."""
    network = spec.network(spec.linear)
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            fake = torch.empty(weight.shape, dtype=torch.bfloat16, device=_DEVICE)
            module.register_parameter(name, nn.Parameter(fake, weight.requires_grad))
    return network


def _train(network: DiffusionTransformer, shape: PackShape) -> None:
    """A forward and a backward pass over a pack of ``shape``."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=_DEVICE)

    packing = Packing(
        cu_seqlens_I1=empty(shape.images + 1, dtype=torch.int32),
        image_T=empty(shape.tokens, dtype=torch.int64),
        place_T=empty(shape.tokens, dtype=torch.int64),
        positions_T3=empty(shape.tokens, 3, dtype=torch.int64),
        max_seqlen=shape.max_seqlen,
    )
    latents_TC = empty(shape.tokens, network.config.token_channels)
    t_I, label_I = empty(shape.images), empty(shape.images)
    network(latents_TC, t_I, label_I.long(), packing).float().square().mean().backward()


@contextmanager
def _instead_of_loading(found: dict[bool, tuple[Kernel, ...]]) -> Generator[None]:
    """Inside, what Inductor compiles is added to ``found``, by whether it is a backward pass, and not loaded."""
    names: dict[str, str] = {}  # by a node that the kernel computes
    define = TritonScheduling.define_kernel

    def define_kernel(self: Any, source: str, nodes: Any, *rest: Any) -> str:
        name = define(self, source, nodes, *rest)
        names.update({node.get_name(): name for node in nodes if isinstance(node, BaseSchedulerNode)})
        return name

    def compile_to_module(self: GraphLowering) -> Any:
        names.clear()
        self.codegen()
        removed = self.scheduler.removed_ops  # another kernel also computes these
        kernels = (_kernel(node, names) for node in self.scheduler.nodes if node.get_name() not in removed)
        found[self.is_backward] = tuple(kernel for kernel in kernels if kernel)
        return _module_with_results(self.graph_outputs)

    with (
        patch.object(TritonScheduling, "define_kernel", define_kernel),
        patch.object(GraphLowering, "compile_to_module", compile_to_module),
        torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def _kernel(node: BaseSchedulerNode, names: dict[str, str]) -> Kernel | None:
    """None for what starts no kernel: a view, or one of several results of a call."""
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return None
    moved = node.get_read_write_buffers_sizes()
    if not node.is_extern():
        return Kernel(names[node.get_nodes()[0].get_name()], "triton", moved)
    call: Any = node.node
    name = str(call.python_kernel_name or call.op_overload).removeprefix("extern_kernels.").removeprefix("torch.ops.")
    if name.startswith("fitv2_scale."):
        return Kernel(name, "triton", moved)  # written by hand
    if name in _FACTORS:
        left, right = (value.get_size() for value in call.inputs[_FACTORS[name]])
        rows = 1
        for size in left[:-1]:
            rows *= int(size)
        return Kernel(name, "product", moved, (rows, int(right[-1]), int(left[-1])))
    return Kernel(name, "attention" if "attn" in name or "attention" in name else "other", moved)


def _module_with_results(outputs: list[Any]) -> Any:
    """What takes the place of a loaded module: it gives fake results of the right shapes."""
    layouts = [None if isinstance(out, ir.NoneAsConstantBuffer) else out.get_layout() for out in outputs]

    def call(inputs: list[Any]) -> tuple[torch.Tensor | None, ...]:
        inputs.clear()
        return tuple(
            layout
            and torch.empty_strided(
                [int(n) for n in layout.size],
                [int(n) for n in layout.stride],
                dtype=layout.dtype,
                device=layout.device,
            )
            for layout in layouts
        )

    module = types.ModuleType("not_loaded")
    module.call, module.__file__ = call, __file__  # pyrefly: ignore[missing-attribute]
    return module
