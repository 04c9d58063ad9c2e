"""How tokens know their places: another way is another row in the table."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from torch import Tensor

from fitv2_scale.config.model import ModelConfig, RopeConfig, SincosConfig
from fitv2_scale.model.extrapolation import extrapolated_table
from fitv2_scale.model.packed_batch import Packing
from fitv2_scale.model.rope import by_channel, rope_table
from fitv2_scale.model.sincos import sincos_table

Extrapolation = RopeConfig | SincosConfig


class Positions(NamedTuple):
    """What a network makes of the places of a pack's tokens, once for all blocks."""

    added_TD: Tensor | None = None  # float32, to the embedded tokens
    rope_TD: tuple[Tensor, Tensor] | None = None  # by which q and k are turned (see ``rope.by_channel``)


def positions_of(config: ModelConfig, packing: Packing, own: Sequence[Extrapolation] | None = None) -> Positions:
    """``own`` is an extrapolation for each slot of the pack, of the kind of ``config.position``; None: that of
    ``config`` for all."""
    return _POSITIONS[config.position](config, packing, own)


def _rope(config: ModelConfig, packing: Packing, own: Sequence[Extrapolation] | None) -> Positions:
    if own is None and config.rope.mode == config.rope.attention_scale == "none":
        return Positions(rope_TD=by_channel(*rope_table(packing.positions_T2, config.head_dim, config.rope_theta)))
    ropes = config.rope if own is None else cast(Sequence[RopeConfig], own)
    return Positions(rope_TD=by_channel(*extrapolated_table(packing, ropes, config.head_dim, config.rope_theta)))


def _sincos(config: ModelConfig, packing: Packing, own: Sequence[Extrapolation] | None) -> Positions:
    configs = config.sincos if own is None else cast(Sequence[SincosConfig], own)
    return Positions(added_TD=sincos_table(packing, configs, config.hidden))


def _none(config: ModelConfig, packing: Packing, own: Sequence[Extrapolation] | None) -> Positions:
    return Positions()


_POSITIONS: dict[str, Callable[[ModelConfig, Packing, Sequence[Extrapolation] | None], Positions]] = {
    "rope": _rope,
    "sincos": _sincos,
    "none": _none,
}
