"""The network whose features are compared: a TorchScript file that the user gives.

Its forward takes uint8 (N, 3, H, W), RGB of 0 to 255 at the images' own size, and does all preprocessing itself. For
metrics like ADM's it resizes the whole image, square or not, to 299 x 299 bilinearly as TensorFlow 1 does (pixel i of
the output is taken at i * side / 299, no antialiasing), and maps it to (x - 128) / 128. It returns one of

* a dict of ``pool`` (N, D); ``spatial`` (N, S) or (N, C, h, w); ``logits`` or ``probabilities`` (N, K);
* a tensor: only ``pool``, so there is neither sFID nor IS;
* or it takes ``return_features`` and ``no_output_bias``, like the Inception file that came with StyleGAN2-ADA: it is
  called twice, for ``pool`` and for ``probabilities``; without spatial features, so there is no sFID.

Loading TorchScript runs code from the file, hence the digest, which is compared before anything is loaded.
"""

import hashlib
import hmac
import io
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_sharding.errors import UserError
from data_sharding.storage.filesystems import refuse_pipe
from fitv2_scale.evaluate.features import Features

_BATCH = 50  # images


class FeatureNetwork:
    """``digest`` is the sha256 of its file, in hex."""

    def __init__(self, module: torch.jit.ScriptModule, digest: str, device: torch.device):
        self._module, self.device, self.digest = module, device, digest
        # A ScriptMethod, although torch's annotation is of a plain function.
        names = {argument.name for argument in module.forward.schema.arguments}  # pyrefly: ignore[missing-attribute]
        self._by_flags = {"return_features", "no_output_bias"} <= names

    @classmethod
    def load(cls, file: str, sha256: str | None, device: torch.device | str = "cpu") -> "FeatureNetwork":
        """Raises UserError if the file does not have this sha256, or is not TorchScript."""
        if not sha256:
            raise UserError(
                f"{file} is a program: give its digest as --network-sha256; its publisher names it, and "
                f"`sha256sum {file}` computes it"
            )
        refuse_pipe(file)
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the network {file}: {error.strerror}") from error
        found = hashlib.sha256(data).hexdigest()
        if not hmac.compare_digest(found, sha256.lower()):
            raise UserError(f"{file} has the sha256 {found}, not {sha256}: it is another network, and is not loaded")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated
                module = torch.jit.load(io.BytesIO(data), map_location=device).eval()
        except RuntimeError as error:
            raise UserError(f"{file} is not TorchScript: {str(error).strip().splitlines()[0]}") from error
        return cls(module, found, torch.device(device))

    @torch.inference_mode()
    def __call__(self, images_NHWC: np.ndarray) -> Features:
        """The features of uint8 (N, H, W, 3).

        Raises:
            UserError: the network does not accept them, or its output is not as the module's docstring says.
        """
        parts = []
        for at in range(0, len(images_NHWC), _BATCH):
            batch_NHWC = torch.from_numpy(images_NHWC[at : at + _BATCH]).to(self.device)
            images_NCHW = batch_NHWC.permute(0, 3, 1, 2).contiguous()
            try:
                named = self._named(images_NCHW)
            except RuntimeError as error:
                raise UserError(
                    f"the network does not accept uint8 {list(images_NCHW.shape)}: "
                    f"{str(error).strip().splitlines()[-1]}"
                ) from error
            arrays = {name: np.asarray(tensor.float().cpu()) for name, tensor in named.items()}
            part = Features.from_arrays(arrays, "the network")
            if len(part) != len(images_NCHW):
                raise UserError(f"the network returned {len(part)} rows for {len(images_NCHW)} images")
            parts.append(part)
        return Features.joined(parts)

    def _named(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        if self._by_flags:
            pool = self._module(images_NCHW, return_features=True)
            return {"pool": pool, "probabilities": self._module(images_NCHW, no_output_bias=True)}
        output = self._module(images_NCHW)
        if isinstance(output, Tensor):
            output = {"pool": output}
        if not isinstance(output, dict) or "pool" not in output:
            raise UserError(
                "the network must return a tensor, or a dict with `pool`; see fitv2_scale/evaluate/feature_network.py"
            )
        pool = output["pool"]
        named = {"pool": pool.flatten(1) if pool.ndim > 2 else pool}
        if (spatial := output.get("spatial")) is not None:
            # ADM flattens with channels fastest, which the published mu_s and sigma_s follow.
            named["spatial"] = spatial.movedim(1, -1).flatten(1) if spatial.ndim == 4 else spatial
        if (logits := output.get("logits")) is not None:
            named["probabilities"] = logits.double().softmax(1)
        elif (probabilities := output.get("probabilities")) is not None:
            named["probabilities"] = probabilities
        return named
