"""Compares all methods of RoPE extrapolation at one size, with the same noise: numbers, and images."""

import io
from dataclasses import dataclass, replace

import torch
from PIL import Image

from data_sharding.errors import UserError
from fitv2_scale.config.model import ModelConfig, RopeConfig, parse_size
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.evaluate.sampling.image_grid import decode
from fitv2_scale.evaluate.sampling.load_weights import Weights
from fitv2_scale.evaluate.sampling.sampler import ImageRequest, rope_for_size, sample
from fitv2_scale.model.extrapolation import turns

_VARIANTS = (
    ("none", "none"),
    ("pi", "none"),
    ("ntk", "none"),
    ("yarn", "none"),
    ("vision_ntk", "none"),
    ("vision_yarn", "none"),
    ("vision_ntk", "paper"),
    ("vision_ntk", "released"),
)


@dataclass(frozen=True)
class RopeVariant:
    rope: RopeConfig
    is_default: bool  # `fitv2 sample` uses it at this size
    frequency_2F: torch.Tensor  # radians per token, rows then columns
    attention: float  # factor of q·k
    nfe: float | None = None  # mean over the images
    images: tuple[Image.Image, ...] = ()

    @property
    def name(self) -> str:
        scale = self.rope.attention_scale
        return self.rope.mode + ("" if scale == "none" else f" + {scale}")

    def report(self) -> dict:
        slowest = (2 * torch.pi / self.frequency_2F[:, -1]).tolist()
        return {
            "way": self.name,
            "default": self.is_default,
            "longest_wave_tokens": {"rows": slowest[0], "columns": slowest[1]},
            "attention_factor": self.attention,
            "nfe": self.nfe,
        }


def variants(model: ModelConfig, sampling: SamplingConfig, size: str) -> list[RopeVariant]:
    """Each variant at ``size``, without images. Raises UserError for a network without RoPE."""
    if model.position != "rope":
        raise UserError(
            f"--compare compares ways of RoPE, and this network has model.position={model.position}: leave it out"
            + ("; sampling.sincos=ei and pi are the ways of a table" if model.position == "sincos" else "")
        )
    rows, columns = parse_size(size, model.pixels_per_token)
    default, found = rope_for_size(sampling, model, rows, columns), []
    for mode, scale in _VARIANTS:
        rope = model.rope.model_copy(update={"mode": mode, "attention_scale": scale})
        frequency_I2F, factor_I = turns(rope, torch.tensor([[rows, columns]]), model.head_dim, model.rope_theta)
        found.append(RopeVariant(rope, rope == default, frequency_I2F[0], factor_I.item()))
    return found


def compare(weights: Weights, sampling: SamplingConfig, size: str, labels: list[int], seed: int) -> list[RopeVariant]:
    """Images of ``labels`` by each variant, all in one call. A collective; only rank 0 has the images."""
    rows, columns = parse_size(size, weights.config.model.pixels_per_token)
    codec = weights.shared_codec()
    model, found = weights.config.model, variants(weights.config.model, sampling, size)
    requests = [[ImageRequest(i, label, rows, columns, one.rope) for i, label in enumerate(labels)] for one in found]
    samples = sample(
        weights.engine.network,
        [request for row in requests for request in row],
        model=model,
        objective=weights.config.objective,
        sampling=sampling,
        seed=seed,
        world=weights.world,
        tensor=weights.layout.tensor,
    )
    done = []
    for one, row in zip(found, requests, strict=True):
        images = tuple(decode(samples[request].tokens, codec) for request in row) if weights.world.is_first else ()
        nfe = sum(samples[request].nfe for request in row) / len(row)
        done.append(replace(one, nfe=nfe, images=images))
    return done


def to_text(found: list[RopeVariant]) -> str:
    lines = [f"{'':2}{'RoPE':24}{'longest wave, tokens':>24}{'q·k times':>12}{'NFE':>8}"]
    for one in found:
        wave = one.report()["longest_wave_tokens"]
        lines.append(
            f"{'*' if one.is_default else '':2}{one.name:24}"
            f"{wave['rows']:14.1f} x {wave['columns']:7.1f}{one.attention:12.4f}{one.nfe:8.1f}"
        )
    return "\n".join([*lines, "* the default of `fitv2 sample` at this size"])


def plot(found: list[RopeVariant], size: str) -> bytes:
    """A PNG: the frequencies of each axis relative to plain RoPE, and below them a row of images for each variant."""
    from matplotlib.figure import Figure

    count, (width, height) = len(found[0].images), found[0].images[0].size
    cell = 1.5  # inches
    row = cell * height / width
    figure = Figure(figsize=(max(7.0, 1.6 + cell * count), 2.8 + (row + 0.05) * len(found)), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.8, (row + 0.05) * len(found)]).flat
    above.suptitle(f"RoPE at {size}", fontsize=11)
    for axes, axis in zip(above.subplots(1, 2, sharey=True), (0, 1), strict=True):
        for one, line in zip(found, range(len(found), 0, -1), strict=True):  # ever thinner, since some lines coincide
            if one.rope.attention_scale == "none":
                ratio_F = one.frequency_2F[axis] / found[0].frequency_2F[axis]
                axes.plot(range(len(ratio_F)), ratio_F, linewidth=line, label=one.name)
        axes.set_title(("along the height", "along the width")[axis], fontsize=9)
        axes.set_xlabel("pair of channels", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_ylim(0, 1.05)
        if axis == 0:
            axes.set_ylabel("frequency / plain RoPE's", fontsize=8)
            axes.legend(fontsize=6)
    grid = below.subplots(len(found), count, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for one, row_of_axes in zip(found, grid, strict=True):
        for axes, image in zip(row_of_axes, one.images, strict=True):
            axes.imshow(image)
            axes.set_xticks([])
            axes.set_yticks([])
        label = one.name.replace(" + ", "\n+ ") + ("\n(default)" if one.is_default else "")
        row_of_axes[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
