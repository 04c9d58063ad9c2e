"""The layouts of public weights: how the tensors of a network are named, shaped and ordered in other programs' files.

    fit        FiT, FiTv2 and all that is written here: the network's own names, nothing changes
    dit        DiT and SiT: the same names; the patch embedding is a convolution, the rows of the final linear are in
               another order, and the fixed table of positions is stored
    diffusers  diffusers' DiTTransformer2DModel: other names, q, k and v apart, and the embedders copied into each block

A layout is a row of ``LAYOUTS``. What it does not name is as in ``fit``.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from data_sharding.errors import UserError
from data_sharding.plan.pack_layout import PackShape, lay_out
from fitv2_scale.checkpoint.weights_file import Stored
from fitv2_scale.config.model import ModelConfig, SincosConfig
from fitv2_scale.model.sincos import sincos_table
from fitv2_scale.model.to_torch import packing_to_torch

Shape = tuple[int, ...]
_ROUNDING = 1e-6  # of a table in float32, whose values are at most 1
_BLOCK = re.compile(r"(?:blocks|transformer_blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Values:
    """How the values of a tensor are arranged in public files: their shape there, and from there and to there."""

    shape: Callable[[Shape, ModelConfig], Shape]
    from_public: Callable[[Tensor, ModelConfig], Tensor]
    to_public: Callable[[Tensor, ModelConfig], Tensor]


def _pixels_first(rows: Tensor, model: ModelConfig) -> Tensor:
    """Rows (c p1 p2) as (p1 p2 c)."""
    return rows.unflatten(0, (-1, model.patch**2)).transpose(0, 1).flatten(0, 1)


def _channels_first(rows: Tensor, model: ModelConfig) -> Tensor:
    """Rows (p1 p2 c) as (c p1 p2)."""
    return rows.unflatten(0, (model.patch**2, -1)).transpose(0, 1).flatten(0, 1)


def _is_convolution(stored: Stored | None) -> bool:
    return stored is not None and len(stored.shape) == 4


_CONVOLUTION = Values(
    lambda shape, model: (shape[0], model.latent_channels, model.patch, model.patch),
    lambda public, model: public.flatten(1),
    lambda ours, model: ours.unflatten(1, (model.latent_channels, model.patch, model.patch)),
)
_ROWS = Values(lambda shape, model: shape, _channels_first, _pixels_first)
_OF_DIT = {
    "x_embedder.proj.weight": _CONVOLUTION,
    "final_layer.linear.weight": _ROWS,
    "final_layer.linear.bias": _ROWS,
}
_DIT = {"mlp": "gelu", "position": "sincos", "adaln": "full", "qk_norm": "none"}
_IN_EACH = "transformer_blocks.{each}.norm1.emb"


@dataclass(frozen=True)
class Layout:
    """How files of one kind are made.

    ``known_by``: whether tensors are of such a file. ``model``: the keys of the config that all their networks share.
    ``modules``: the name of a module in them: {i} stands for the block's number; several names share its rows equally;
    under a name with {each} all blocks have a copy. ``values``: of tensors that are arranged differently. ``table``:
    the name of the stored table of positions.
    """

    name: str
    known_by: Callable[[Mapping[str, Stored]], bool]
    model: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    values: Mapping[str, Values] = field(default_factory=dict)
    table: str = ""

    def public_names(self, name: str, depth: int) -> list[str]:
        """Under which names a file has the tensor ``name`` of the network: more than one if it is split or copied."""
        module, _, kind = name.rpartition(".")
        block = _BLOCK.match(module)
        templates = self.modules.get(_BLOCK.sub("blocks.{i}.", module), (module,))
        several = range(depth) if "{each}" in templates[0] else range(1)
        return [f"{t.format(i=block and block[1], each=each)}.{kind}" for t in templates for each in several]

    def is_copied(self, name: str) -> bool:
        return "{each}" in self.modules.get(name.rpartition(".")[0], ("",))[0]


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        layout.name: layout
        for layout in (
            Layout(
                "diffusers",
                lambda tensors: any(name.startswith("transformer_blocks.") for name in tensors),
                model=_DIT,
                modules={
                    "x_embedder.proj": ("pos_embed.proj",),
                    "t_embedder.mlp.0": (f"{_IN_EACH}.timestep_embedder.linear_1",),
                    "t_embedder.mlp.2": (f"{_IN_EACH}.timestep_embedder.linear_2",),
                    "y_embedder.embedding_table": (f"{_IN_EACH}.class_embedder.embedding_table",),
                    "blocks.{i}.attn.qkv": tuple(f"transformer_blocks.{{i}}.attn1.to_{part}" for part in "qkv"),
                    "blocks.{i}.attn.proj": ("transformer_blocks.{i}.attn1.to_out.0",),
                    "blocks.{i}.mlp.fc1": ("transformer_blocks.{i}.ff.net.0.proj",),
                    "blocks.{i}.mlp.fc2": ("transformer_blocks.{i}.ff.net.2",),
                    "blocks.{i}.adaLN_modulation.1": ("transformer_blocks.{i}.norm1.linear",),
                    "final_layer.adaLN_modulation.1": ("proj_out_1",),
                    "final_layer.linear": ("proj_out_2",),
                },
                values=_OF_DIT,
            ),
            Layout(
                "dit",
                lambda tensors: "pos_embed" in tensors or _is_convolution(tensors.get("x_embedder.proj.weight")),
                model=_DIT,
                values=_OF_DIT,
                table="pos_embed",
            ),
            Layout("fit", lambda tensors: True),
        )
    }
)


@dataclass(frozen=True)
class Piece:
    """A tensor of the network in a layout: ``public`` are its names and shapes there."""

    name: str
    shape: Shape
    public: Mapping[str, Shape]
    layout: Layout
    model: ModelConfig

    def read(self, file: str, tensors: Mapping[str, Stored]) -> Tensor:
        """From the public tensors, one after the other. Raises UserError if copies differ."""
        first, *others = self.public
        whole = tensors[first].read()
        if self.layout.is_copied(self.name):
            for other in others:
                if not torch.equal(_bits(tensors[other].read()), _bits(whole)):
                    raise UserError(
                        f"{file}: {other} differs from {first}, but all blocks share this embedder in DiT: these are "
                        "no weights of a DiT, fetch the file again"
                    )
        elif others:
            whole = torch.cat([whole, *(tensors[other].read() for other in others)])
        values = self.layout.values.get(self.name)
        return values.from_public(whole, self.model).contiguous() if values else whole

    def part(self, public: str, whole: Tensor) -> Tensor:
        """The public tensor ``public``, of the network's."""
        values = self.layout.values.get(self.name)
        arranged = values.to_public(whole, self.model) if values else whole
        if self.layout.is_copied(self.name) or len(self.public) == 1:
            return arranged
        return arranged.chunk(len(self.public))[list(self.public).index(public)]


def pieces(layout: Layout, model: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, Piece]:
    """Each tensor of ``shapes``, those of the network of ``model``, as it is in files of ``layout``."""
    found = {}
    for name, shape in shapes.items():
        names = layout.public_names(name, model.depth)
        values = layout.values.get(name)
        public = values.shape(shape, model) if values else shape
        if len(names) > 1 and not layout.is_copied(name):
            public = (public[0] // len(names), *public[1:])
        found[name] = Piece(name, shape, dict.fromkeys(names, public), layout, model)
    return found


def layout_of(tensors: Mapping[str, Stored]) -> Layout:
    """That of a file with these tensors."""
    return next(layout for layout in LAYOUTS.values() if layout.known_by(tensors))


def table_of(model: ModelConfig) -> Tensor:
    """The table of the square images trained on, as files hold it: float32 (1, N, D)."""
    side = model.sincos.train_side
    packing = packing_to_torch(lay_out([(side, side)], PackShape(side**2, 1, side**2)))
    return sincos_table(packing, SincosConfig(), model.hidden)[None]


def check_table(file: str, name: str, stored: Stored, model: ModelConfig) -> None:
    """Raises UserError unless it is the table that the network adds by formula."""
    off = float((stored.read() - table_of(model)).abs().max())
    if not off <= _ROUNDING:
        raise UserError(
            f"{file}: {name} is up to {off:.2g} off the fixed table of sines and cosines, which the network computes "
            "and cannot store: take weights whose table was not changed"
        )


def shown_by(layout: Layout, tensors: Mapping[str, Stored], new: Collection[str]) -> dict[str, Any]:
    """The keys of the config's section ``model`` that a file shows by its tensors, where it has them. Those that are
    ``new`` in the network say nothing."""

    def shape(name: str, dims: int) -> Shape | None:
        found = None if name in new else tensors.get(layout.public_names(name, 1)[0])
        return found.shape if found is not None and len(found.shape) == dims and all(found.shape) else None

    shown: dict[str, Any] = dict(layout.model)
    fc2 = shape("blocks.0.mlp.fc2.weight", 2)
    if not shown and fc2:
        wide = "swiglu_4d" if fc2[1] == 4 * fc2[0] else "swiglu"
        shown["mlp"] = "gelu" if "blocks.0.mlp.fc1.weight" in tensors else wide
        shown["adaln"] = "lora" if "global_adaLN_modulation.1.weight" in tensors else "full"
    shown["depth"] = len({found[1] for name in tensors if (found := _BLOCK.match(name))})
    convolution, proj = (shape("x_embedder.proj.weight", dims) for dims in (4, 2))
    if embedding := convolution or proj:
        shown["hidden"] = embedding[0]
        if final := shape("final_layer.linear.weight", 2):
            shown["outputs"] = final[0] // math.prod(embedding[1:])
    if convolution:
        shown |= {"latent_channels": convolution[1], "patch": convolution[2]}
    if table := shape("y_embedder.embedding_table.weight", 2):
        shown["classes"] = table[0] - 1
    if layout.table in tensors and len(grid := tensors[layout.table].shape) == 3:
        shown["sincos.train_side"] = math.isqrt(grid[1])
    return shown


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)
