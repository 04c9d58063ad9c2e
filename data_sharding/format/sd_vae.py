"""SD-VAE, the codec that FiT is trained on: diffusers' AutoencoderKL from a local folder. Imports torch.

Latents depend on weights, pixels and (with ``sample``) the image's id only: convolutions run in float32, with
deterministic algorithms, and on a CPU on one thread, since writers parallelise over processes. Another kind of device,
or another version of torch or cuDNN, may change the last bits.
"""

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from data_sharding.errors import UserError
from data_sharding.format.codec import LATENT_CHANNELS, SD_VAE, CodecRecord, Draw, Latent
from data_sharding.rng import Purpose, uniform
from data_sharding.worker_pool import WORKER

_ARITHMETIC = (
    "act_fn",
    "norm_num_groups",
    "scaling_factor",
)  # settings that the names and shapes of the weights do not show


@lru_cache(maxsize=1)  # a writer process calls this once per shard
def load_vae(folder: str, latent: Latent) -> "SdVae":
    """The VAE in ``folder``. Raises UserError if there is none that fits, or diffusers is missing."""
    try:
        from diffusers import AutoencoderKL
        from diffusers.utils import logging
    except ImportError as error:
        raise UserError(
            "the codec sd-vae needs the package diffusers: pip install -e '.[vae]', or use --codec dct"
        ) from error
    try:
        config = json.loads((Path(folder) / "config.json").read_bytes())
        kind = config.get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder} holds no VAE (config.json: {error}): give the folder of a diffusers AutoencoderKL"
        ) from error
    if kind != "AutoencoderKL":
        raise UserError(f"{folder} holds a {kind}: give the folder of a diffusers AutoencoderKL")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # low_cpu_mem_usage would need another package. .bin files load with weights_only.
        # diffusers' annotation leaves out what output_loading_info adds to the result.
        vae, info = AutoencoderKL.from_pretrained(  # pyrefly: ignore[not-iterable]
            folder, local_files_only=True, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # OSError, SafetensorError, RuntimeError, ValueError, UnpicklingError …
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the VAE in {folder} cannot be loaded: {reason}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if missing := info["missing_keys"]:  # diffusers would initialise them at random
        raise UserError(
            f"the weights in {folder} lack {len(missing)} tensors, such as {min(missing)}: download them again"
        )
    downsample = 2 ** (len(vae.config.block_out_channels) - 1)
    shifted = vae.config.shift_factor or vae.config.latents_mean or vae.config.latents_std
    if downsample != SdVae.downsample or shifted:
        kind = "shifted channels" if shifted else "channels"
        raise UserError(
            f"the VAE in {folder} has {vae.config.latent_channels} {kind} at 1/{downsample} of the side; give one "
            f"without a shift at 1/{SdVae.downsample}, as those of Stable Diffusion 1, 2 and XL"
        )
    return SdVae(vae, latent)


def writers(cores: int) -> int:
    """The number of writer processes for this machine: eight keep a GPU busy with reading and resizing."""
    gpus = torch.cuda.device_count()
    return min(cores, 8 * gpus) if gpus else cores


def own_device() -> torch.device:
    """The GPU of this process, or the CPU if there is none. That of a rank which has joined the others is its current
    device; before, and for a writer, it goes by the number of the process on its node."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return torch.device("cpu")
    if torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))
    return torch.device("cuda", (int(local) + int(os.environ.get(WORKER, 0))) % gpus)


class SdVae:
    """Encodes to the posterior's mean, or a sample with noise keyed by image id, times ``scale``."""

    name = SD_VAE
    downsample = 8
    batch_pixels = 1 << 21  # 32 pictures of 256 pixels squared, 8 of 512: activations of a few GB

    def __init__(self, vae, latent: Latent):
        self._device = own_device()
        self._vae = vae.requires_grad_(False).eval().to(self._device)
        self._latent = latent
        self.channels = int(vae.config.latent_channels)
        self.scale = float(vae.config.scaling_factor)

    @cached_property
    def weights(self) -> str:
        """Hex sha256 of the weights, in whatever file they were stored, and of the settings in ``_ARITHMETIC``."""
        digest = sha256(json.dumps([(key, self._vae.config[key]) for key in _ARITHMETIC]).encode())
        for name, tensor in sorted(self._vae.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    @property
    def digest(self) -> str:
        return self.digest_as(self._latent)

    def digest_as(self, latent: Latent) -> str:
        """Hex sha256 of ``weights`` and of the posterior's use (mean or sample)."""
        return sha256(f"sd-vae 1 {latent} {self.weights}".encode()).hexdigest()

    @property
    def record(self) -> CodecRecord:
        record: CodecRecord = {
            "name": self.name,
            "digest": self.digest,
            "scale": self.scale,
            "latent": self._latent,
            "vae": self.weights,
        }
        if self.channels != LATENT_CHANNELS:
            record["channels"] = self.channels
        return record

    def encode(self, pixels: np.ndarray, draws: list[Draw]) -> np.ndarray:
        """As in ``Codec``."""
        count, height, width, _ = pixels.shape
        assert pixels.dtype == np.uint8 and height % 16 == 0 and width % 16 == 0, (pixels.dtype, pixels.shape)
        pixels_BCHW = torch.from_numpy(np.array(pixels)).to(self._device).permute(0, 3, 1, 2)
        with _reproducibly():
            posterior = self._vae.encode(pixels_BCHW.float() / 127.5 - 1).latent_dist
            latent = posterior.mean
            if self._latent == "sample":
                latent = latent + posterior.std * torch.from_numpy(_noise(draws, latent.shape[1:])).to(self._device)
        return (latent * self.scale).cpu().numpy()

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """As in ``Codec``."""
        latent_BCHW = torch.from_numpy(np.ascontiguousarray(latent, np.float32)).to(self._device)[None]
        with _reproducibly():
            picture = self._vae.decode(latent_BCHW / self.scale).sample[0]
        return (127.5 * picture + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def _noise(draws: list[Draw], shape: tuple[int, ...]) -> np.ndarray:
    """Standard normals float32 (B, *shape), by Box-Muller on neighbouring draws, as ``fitv2_scale.model.rng``."""
    count = int(np.prod(shape))
    ids, pictures = (np.array(column)[:, None] for column in zip(*draws, strict=True))
    u = uniform(0, Purpose.POSTERIOR, pictures, ids, np.arange(count)) + 2.0**-33  # of the open interval (0, 1)
    radius, angle = np.sqrt(-2 * np.log(u[:, 0::2])), 2 * np.pi * u[:, 1::2]
    normals = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1)
    return normals.reshape(-1, *shape).astype(np.float32)


@contextmanager
def _reproducibly() -> Generator[None]:
    """Without gradients, and with the same bits each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exact = {"benchmark": False, "deterministic": True, "allow_tf32": False}
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, **exact):
            yield
    finally:
        torch.set_num_threads(threads)
