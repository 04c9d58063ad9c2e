"""Features of generated images: computed by all ranks, in parts, so that a killed evaluation can be continued.

Image i has the class and the noise of (seed, i), so any number of ranks generates the same set. A rank writes the
features of the images that it has just generated to one object ``part-<lowest index>.npz``; images are not stored.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from data_sharding.storage.store import Store
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.config.solvers import solver_facts
from fitv2_scale.evaluate.feature_network import FeatureNetwork
from fitv2_scale.evaluate.features import Features, npz_bytes, read_npz
from fitv2_scale.evaluate.sampling.image_grid import decode
from fitv2_scale.evaluate.sampling.load_weights import Weights
from fitv2_scale.evaluate.sampling.png_folder import chunk_requests, random_requests
from fitv2_scale.evaluate.sampling.sampler import ImageRequest, sample

_PART = re.compile(r"part-\d{6,}\.npz", re.ASCII)
_TRIES = 3  # rounds of generating those images whose features are not in the storage


@dataclass(frozen=True)
class Cell:
    """One set of images to generate and measure: ``images`` of ``size`` (as in "160x320"), with classes drawn from
    ``labels``."""

    size: str
    sampling: SamplingConfig
    images: int
    seed: int
    labels: tuple[int, ...]

    def record(self) -> dict[str, Any]:
        """How the images are generated, for the result: the settings of ``sampling`` that its solver uses.

        Newer ones are left out at their defaults, so that results of earlier versions are found.
        """
        s = self.sampling
        steps = {"atol": s.atol, "rtol": s.rtol} if self._adaptive else {"steps": s.steps}
        names = ("cfg", "guided_channels", "solver", "rope", "attention_scale")
        how = {name: getattr(s, name) for name in names} | steps
        if self._limited:
            how["guidance_interval"] = s.guidance_interval
        if s.sincos != "auto":
            how["sincos"] = s.sincos
        return {"size": self.size, "images": self.images, "seed": self.seed, "classes": len(self.labels)} | how

    @property
    def label(self) -> str:
        """A readable name, the same for all weights."""
        s = self.sampling
        steps = "" if self._adaptive else str(s.steps)
        positions = s.rope if s.sincos == "auto" else f"sincos_{s.sincos}"
        within = "from{:g}to{:g}".format(*s.guidance_interval) if self._limited else ""
        return f"{self.size}-cfg{s.cfg:g}{within}-{s.solver}{steps}-{positions}-{self.images}"

    @property
    def _adaptive(self) -> bool:
        return solver_facts(self.sampling.solver).evaluations is None

    @property
    def _limited(self) -> bool:
        return self.sampling.guidance_interval != [0, 1]

    @property
    def class_numbers(self) -> str:
        """A digest of ``labels``, for the result; not in ``record``, by which results of earlier versions are found."""
        return hashlib.sha256(json.dumps(self.labels).encode()).hexdigest()[:16]

    def name(self, *made_by: str) -> str:
        """The name of its objects in the storage: readable, and unique for the cell and what it is ``made_by``: digests
        of weights, network, codec and feature network."""
        identity = [self.record(), self.labels, *made_by]
        return f"{self.label}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]}"

    def requests(self, pixels_per_token: int) -> list[ImageRequest]:
        return random_requests([self.size], self.images, list(self.labels), self.seed, pixels_per_token)


def generate_features(weights: Weights, cell: Cell, network: FeatureNetwork, store: Store, folder: str) -> None:
    """Generates those images of ``cell`` whose features ``folder`` lacks, and writes these there. A collective."""
    world, requests = weights.world, cell.requests(weights.config.model.pixels_per_token)
    codec = weights.codec()
    for _ in range(_TRIES):
        existing = world.run_on_rank0(lambda: _indices(store, folder))
        to_do = [request for request in requests if request.index not in existing]
        if not to_do:
            return
        with tqdm(
            total=len(requests), initial=len(existing), desc=cell.size, unit="image", disable=not world.is_first
        ) as bar:
            for chunk in chunk_requests(to_do, weights, cell.sampling):
                samples = sample(
                    weights.engine.network,
                    chunk,
                    model=weights.config.model,
                    objective=weights.config.objective,
                    sampling=cell.sampling,
                    seed=cell.seed,
                    world=world,
                    tensor=weights.layout.tensor,
                    gather=False,
                )
                if samples:
                    images = np.stack([np.asarray(decode(one.tokens, codec)) for one in samples.values()])
                    index = np.array([request.index for request in samples])
                    nfe = np.array([one.nfe for one in samples.values()])
                    arrays = {"index": index, "nfe": nfe} | network(images).arrays()
                    store.put(f"{folder}/part-{index.min():06d}.npz", npz_bytes(arrays))
                bar.update(len(chunk))
        world.all_gather(None)  # all have written
    raise RuntimeError(f"{store.path(folder)}: the storage does not list the objects that were written")


def collect_features(cell: Cell, store: Store, folder: str) -> tuple[Features, float]:
    """The features that ``generate_features`` wrote, in the order of the images, and their mean NFE."""
    parts = [read_npz(store.read(path)) for path in _parts(store, folder)]
    names = [name for name in parts[0] if name not in ("index", "nfe")]
    index, rows = np.unique(np.concatenate([part["index"] for part in parts]), return_index=True)
    assert np.array_equal(index, np.arange(cell.images))
    nfe = np.concatenate([part["nfe"] for part in parts])[rows].mean()
    return Features(**{n: np.concatenate([part[n] for part in parts])[rows] for n in names}), float(nfe)


def _indices(store: Store, folder: str) -> set[int]:
    return {int(i) for path in _parts(store, folder) for i in read_npz(store.read(path))["index"]}


def _parts(store: Store, folder: str) -> list[str]:
    return [path for path in store.list(f"{folder}/") if _PART.fullmatch(path.removeprefix(f"{folder}/"))]
