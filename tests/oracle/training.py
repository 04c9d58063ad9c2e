"""Training in float64, image by image: the loss of a flow or of a DDPM, clipping, AdamW, warm-up and EMA, each in its
textbook form.

``Recipe`` repeats a run's settings by hand; nothing is read from a config.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from torch import Tensor

from tests.oracle.bound import bits, kept
from tests.oracle.draws import initial_weight, is_dropped, level_of, noise_of, time_of
from tests.oracle.network import Form, Weights, shapes, velocity


@dataclass(frozen=True)
class Image:
    """What the plan and the dataset say of an image of a step."""

    epoch: int
    number: int  # its id
    label: int
    latents: np.ndarray  # float16 (rows, columns, channels), the view that was chosen, mirrored or not


@dataclass(frozen=True)
class Recipe:
    seed: int
    form: Form = Form()
    dropout: float = 0.1
    sampler: str = "logit_normal"
    objective: str = "flow"
    lr: float = 1e-3
    warmup: int = 10
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_norm: float = 1.0
    decay: float = 0.9

    def lr_at(self, step: int) -> float:
        """The first step, 0, already has a part of it; step ``warmup`` - 1 is the first to have all."""
        return self.lr * (step + 1) / self.warmup if step < self.warmup else self.lr


@dataclass(frozen=True)
class Noised:
    """What the network is given for an image, and is to answer."""

    t: np.float32
    label: int
    x: np.ndarray  # float32 (tokens, channels)
    target: np.ndarray

    @classmethod
    def of(cls, image: Image, recipe: Recipe) -> "Noised":
        dropped = is_dropped(recipe.seed, image.epoch, image.number, recipe.dropout)
        data = image.latents.astype(np.float32).reshape(-1, recipe.form.channels)
        noise = noise_of(recipe.seed, image.epoch, image.number, *data.shape)
        label = recipe.form.classes if dropped else image.label
        if recipe.objective == "ddpm":
            level = level_of(recipe.seed, image.epoch, image.number)
            x = np.float32(math.sqrt(kept(level))) * data + np.float32(math.sqrt(1 - kept(level))) * noise
            return cls(np.float32(level), label, x, noise)
        t = time_of(recipe.seed, image.epoch, image.number, recipe.sampler)
        return cls(t, label, t * data + (np.float32(1) - t) * noise, data - noise)

    def record(self, image: Image) -> tuple:
        """As the audit has it: (epoch, id, bits of t, label, digest of x, digest of the target)."""
        digests = (xxhash.xxh3_64_hexdigest(values.astype("<f4").tobytes()) for values in (self.x, self.target))
        return image.epoch, image.number, f"{int(self.t.view(np.uint32)):08x}", self.label, *digests


@dataclass
class Trained:
    """Losses and gradient norms by step, counted from 1; weights and EMA at the end, float64."""

    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)
    ema: Weights = field(default_factory=dict)
    gradients: list[Weights] = field(default_factory=list)  # of each step, before clipping


def trained_apart(recipe: Recipe, step_images: Callable[[int], list[Image]], steps: int) -> Trained:
    """A training of ``steps`` steps, of which step k is on ``step_images(k)``."""
    drawn = {
        name: initial_weight(recipe.seed, name, shape, recipe.form.hidden // recipe.form.heads)
        for name, shape in shapes(recipe.form).items()
    }
    weights = {name: torch.from_numpy(values).double() for name, values in drawn.items()}
    ema = {name: w.clone() for name, w in weights.items()}
    first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    found = Trained(weights=weights, ema=ema)
    for step in range(steps):
        loss, gradients = loss_and_gradients(weights, recipe, step_images(step))
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        clipping = min(1.0, recipe.max_norm / (norm + 1e-6))
        lr, count = recipe.lr_at(step), step + 1
        for name, weight in weights.items():
            g = gradients[name] * clipping
            first[name] = recipe.beta1 * first[name] + (1 - recipe.beta1) * g
            second[name] = recipe.beta2 * second[name] + (1 - recipe.beta2) * g**2
            mean, square = first[name] / (1 - recipe.beta1**count), second[name] / (1 - recipe.beta2**count)
            weight *= 1 - lr * recipe.weight_decay
            weight -= lr * mean / (square.sqrt() + recipe.eps)
            ema[name].copy_(recipe.decay * ema[name] + (1 - recipe.decay) * weight)
        found.losses[count], found.norms[count] = loss, norm
        found.gradients.append(gradients)
    return found


def loss_and_gradients(weights: Weights, recipe: Recipe, images: list[Image]) -> tuple[float, dict[str, Tensor]]:
    """The mean over the images of each one's mean squared error over tokens and channels; its gradients."""
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    total = torch.zeros((), dtype=torch.float64)
    for image in images:
        noised = Noised.of(image, recipe)
        rows, columns, _ = image.latents.shape
        x, target = (torch.from_numpy(values).double() for values in (noised.x, noised.target))
        out = velocity(leaves, recipe.form, x, float(noised.t), noised.label, rows, columns)
        predicted, *v = out.split(target.shape[1], -1)  # a flow learns nothing of the second half
        loss = (predicted - target).square()
        if v and recipe.objective == "ddpm":
            latents = torch.from_numpy(image.latents.astype(np.float64)).reshape(x.shape)
            loss = loss + bits(predicted, v[0], latents, x, int(noised.t))
        total = total + loss.mean() / len(images)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return total.item(), dict(zip(leaves, gradients, strict=True))
