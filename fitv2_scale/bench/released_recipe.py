"""Trains as the released recipe does, in code of our own: `fitv2 bench step --against reference` compares with it.

As in the released code: micro-batches of 16 images padded to the longest of them; a dense boolean mask (B, 1, N, N) for
SDPA; bf16 autocast over float32 weights; nothing compiled; gate and value, modulation, QK-norm and RoPE as separate
operators; torch's AdamW and clip_grad_norm_ with their defaults; an EMA tensor by tensor in Python; and numbers fetched
from the device in every step. Conditioning is computed once per image and broadcast, also as released.

Unlike the released code: gradients of all micro-batches of a step are added up (the released accumulation loses all but
the last), and blocks are checkpointed only on request (the released 256-token config checkpoints nothing), whatever
the config's ``layout.checkpointing`` says of ours.
"""

from collections.abc import Iterator
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data_sharding.errors import UserError
from data_sharding.stream.batch import StepBatch
from fitv2_scale.config.families import switches
from fitv2_scale.config.schema import Config
from fitv2_scale.model.block import Block, SwiGLU
from fitv2_scale.model.init import fill_initial
from fitv2_scale.model.modulation import layer_norm
from fitv2_scale.model.network import DiffusionTransformer
from fitv2_scale.model.rope import by_channel, rope_table, rotate

ReferenceCheckpointing = Literal["none", "full"]  # full: whole blocks are computed again in the backward pass

_RELEASED = switches("FiTv2") | {"patch": 2}
_MICRO_BATCH = 16  # images on one GPU, in the released configs


class ReleasedTrainer:
    """Trains on the images of a StepBatch as the released code does, on one device."""

    def __init__(self, config: Config, device: torch.device, checkpointing: ReferenceCheckpointing = "none"):
        network = config.model.model_dump(include=set(_RELEASED))
        if others := [f"model.{key}={value}" for key, value in _RELEASED.items() if network[key] != value]:
            raise UserError(f"--against reference needs the released network: set {' '.join(others)}")
        if config.objective != "flow":
            raise UserError("--against reference needs the released objective: set objective=flow")
        self._config, self._device, self._checkpointing = config, device, checkpointing
        self.network = DiffusionTransformer(config.model).to(device)
        with torch.no_grad():
            for name, p in self.network.named_parameters():
                fill_initial(p, name, p.shape, (0,) * p.dim(), config.seed, config.model)
        self._ema = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        adamw = config.optimizer
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=adamw.lr,
            betas=(adamw.beta1, adamw.beta2),
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
        )

    def step(self, batch: StepBatch) -> float:
        """One step. Returns the loss, read from the device as in the released code."""
        config, total = self._config, 0.0
        for group in self.micro_batches(batch):
            latents_BNC, position_BN2, mask_BN, label_B = (t.to(self._device) for t in group)
            longest = int(mask_BN.sum(-1).max().item())
            t_B = torch.sigmoid(torch.randn(len(label_B))).to(self._device)
            drop_B = torch.rand(len(label_B), device=self._device) < config.flow.label_dropout
            label_B = torch.where(drop_B, config.model.classes, label_B)
            x1, mask_BN = latents_BNC[:, :longest], mask_BN[:, :longest]
            x0 = torch.randn_like(x1)
            share = len(label_B) / batch.step_images
            loss = self.loss(x1, x0, t_B, label_B, position_BN2[:, :longest], mask_BN) * share
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.optimizer.max_norm)
        norm.item()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._update_ema()
        return total

    def loss(self, x1: Tensor, x0: Tensor, t_B: Tensor, label_B: Tensor, position_BN2: Tensor, mask_BN: Tensor):
        """The mean over images of the mean over the image's tokens and channels: 0-dim."""
        t_B11, bf16 = t_B[:, None, None], self._config.layout.precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
            velocity = self._forward(t_B11 * x1 + (1 - t_B11) * x0, t_B, label_B, position_BN2, mask_BN)
        error_BNC = ((velocity - (x1 - x0)) * mask_BN[..., None]) ** 2
        return (error_BNC.mean((1, 2)) * mask_BN.shape[1] / mask_BN.sum(-1)).mean()

    def _forward(self, x: Tensor, t_B: Tensor, label_B: Tensor, position_BN2: Tensor, mask_BN: Tensor) -> Tensor:
        network, config = self.network, self._config
        mask_BN1 = mask_BN[..., None].to(x.dtype)
        same_B1NN = (mask_BN[:, None, :] == mask_BN[:, :, None])[:, None]
        rope = by_channel(*rope_table(position_BN2.flatten(0, 1), config.model.head_dim, config.model.rope_theta))
        x_BND = network.x_embedder(x)
        c_BD = network.t_embedder(t_B) + network.y_embedder(label_B)
        assert network.global_adaLN_modulation is not None
        shared_B6D = network.global_adaLN_modulation(c_BD)
        for block in network.blocks:
            assert isinstance(block, Block)
            inputs = (block, x_BND, c_BD, shared_B6D, rope, same_B1NN, mask_BN1)
            if self._checkpointing == "none":
                x_BND = _block(*inputs)
            else:
                x_BND = checkpoint(_block, *inputs, use_reentrant=False)
        shift, scale = network.final_layer.adaLN_modulation(c_BD)[:, None].chunk(2, -1)
        return network.final_layer.linear(layer_norm(x_BND) * (1 + scale) + shift) * mask_BN1

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = self._config.ema.decay
        for name, p in self.network.named_parameters():
            self._ema[name].mul_(decay).add_(p.data, alpha=1 - decay)

    def micro_batches(self, batch: StepBatch) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Latents, positions, mask and labels of 16 images each, padded; in random order, as in a shuffled epoch."""
        images = list(_images(batch))
        order = np.random.default_rng(batch.step).permutation(len(images))
        room = max(len(latents) for latents, _, _ in images)
        for start in range(0, len(order), _MICRO_BATCH):
            chosen = [images[i] for i in order[start : start + _MICRO_BATCH]]
            latents = np.zeros((len(chosen), room, self._config.model.token_channels), np.float32)
            position = np.zeros((len(chosen), room, 2), np.int64)
            mask = np.zeros((len(chosen), room), bool)
            for row, (values, places, _) in enumerate(chosen):
                latents[row, : len(values)], position[row, : len(values)] = values, places
                mask[row, : len(values)] = True
            label = np.array([label for _, _, label in chosen])
            yield torch.from_numpy(latents), torch.from_numpy(position), torch.from_numpy(mask), torch.from_numpy(label)


def _block(
    block: Block, x: Tensor, c_BD: Tensor, shared: Tensor, rope: tuple[Tensor, Tensor], same: Tensor, mask: Tensor
) -> Tensor:
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (block.adaLN_modulation(c_BD) + shared)[:, None].chunk(6, -1)
    x = x + gate_a * _attention(block, layer_norm(x) * (1 + scale_a) + shift_a, rope, same, mask)
    y, mlp = layer_norm(x) * (1 + scale_m) + shift_m, cast(SwiGLU, block.mlp)
    return x + gate_m * mlp.fc2(F.silu(mlp.fc1_g(y)) * mlp.fc1_x(y))


def _attention(block: Block, x: Tensor, rope: tuple[Tensor, Tensor], same: Tensor, mask: Tensor) -> Tensor:
    images, tokens, _ = x.shape
    q, k, v = block.attn.qkv(x).unflatten(-1, (3, -1, block.attn.head_dim)).unbind(2)  # (B, N, H, head_dim)
    q, k = (rotate(layer_norm(a).flatten(0, 1), *rope).unflatten(0, (images, tokens)) for a in (q, k))
    q, k, v = (a.to(v.dtype).transpose(1, 2) for a in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=same)
    return block.attn.proj(out.transpose(1, 2).flatten(2) * mask.to(out.dtype))


def _images(batch: StepBatch) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Latents (n, 16), rows and columns (n, 2) and label of each image."""
    for pack in batch.packs:
        for slot in np.flatnonzero(pack.weight).tolist():
            a, b = pack.layout.cu_seqlens[slot : slot + 2]
            yield pack.latents[a:b], pack.layout.positions[a:b, 1:], int(pack.label[slot])
