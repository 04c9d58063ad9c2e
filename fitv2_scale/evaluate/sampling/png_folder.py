"""Many pictures: a folder of PNGs that any number of processes fill, that a killed call goes on with, and the .npz that
ADM's evaluator reads."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_sharding.errors import UserError
from data_sharding.format.codec import Codec
from data_sharding.rng import Purpose, uniform
from data_sharding.storage.atomic_write import atomic_write
from data_sharding.storage.local_store import LocalStore
from fitv2_scale.config.model import parse_size
from fitv2_scale.config.sections import SamplingConfig
from fitv2_scale.evaluate.sampling.image_grid import decode
from fitv2_scale.evaluate.sampling.load_weights import Weights
from fitv2_scale.evaluate.sampling.sampler import Request, sample
from fitv2_scale.run.run import differences

_RECORD = "request.json"
_MAX_IMAGES = 256  # of one rank at once: the more, the more a killed call makes again


@dataclass(frozen=True)
class Done:
    made: int  # now; the others were there
    nfe: float  # mean over the images made now


def random_requests(sizes: list[str], images: int, labels: list[int], seed: int) -> list[Request]:
    """Images 0 to ``images`` - 1, each of a class drawn from ``labels`` by (seed, index); sizes take turns."""
    shapes = [parse_size(size) for size in sizes]
    draw = uniform(seed, Purpose.SAMPLER_LABEL, 0, np.arange(images))
    chosen = (draw * len(labels)).astype(np.int64)
    return [Request(i, labels[chosen[i]], *shapes[i % len(shapes)]) for i in range(images)]


def make_pictures(
    weights: Weights, requests: list[Request], sampling: SamplingConfig, seed: int, folder: str, codec: Codec
) -> Done:
    """Makes those pictures of ``requests`` that ``folder`` does not hold yet, as ``<index>.png``, all ranks together.
    A call that was killed goes on, with any number of ranks.

    Raises:
        UserError: ``folder`` holds the pictures of something else.
    """
    world, model = weights.world, weights.config.model
    to_do = world.run_on_rank0(lambda: _missing(weights, requests, sampling, seed, folder))
    requests, evaluations = [r for r in requests if r.index in to_do], 0
    with tqdm(total=len(requests), unit="image", disable=not world.is_first, dynamic_ncols=True) as bar:
        for chunk in chunks(requests, weights, sampling):
            made = sample(
                weights.engine.network,
                chunk,
                model=model,
                sampling=sampling,
                seed=seed,
                world=world,
                tensor=weights.layout.tensor,
                gather=False,
            )
            for request, one in made.items():
                evaluations += one.nfe
                _write(picture_file(folder, request.index), decode(one.tokens, codec))
            bar.update(len(chunk))
    return Done(len(requests), sum(world.all_gather(evaluations)) / max(1, len(requests)))  # all have written


def picture_file(folder: str, index: int) -> Path:
    return Path(folder) / f"{index:06d}.png"


def write_npz(folder: str, requests: list[Request], file: str) -> None:
    """``arr_0`` uint8 (N, H, W, 3) and ``arr_1`` int64 (N,), the classes, in the order of ``requests``, a picture at a
    time. One process calls this.

    Raises:
        UserError: the pictures are not all of one size.
    """
    sizes = {(r.rows, r.columns) for r in requests}
    if len(sizes) != 1:
        raise UserError("an .npz for ADM's evaluator holds pictures of one size: give one --size")
    first = np.asarray(Image.open(picture_file(folder, requests[0].index)))
    with atomic_write(file, durable=False) as npz, zipfile.ZipFile(npz, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as out:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(requests), *first.shape)}
            np.lib.format.write_array_header_1_0(out, header)
            for request in tqdm(requests, desc=file, unit="image", dynamic_ncols=True):
                out.write(np.asarray(Image.open(picture_file(folder, request.index)).convert("RGB")).tobytes())
        with archive.open("arr_1.npy", "w") as out:
            np.lib.format.write_array(out, np.array([r.label for r in requests], np.int64))


def _missing(weights: Weights, requests: list[Request], sampling: SamplingConfig, seed: int, folder: str) -> set[int]:
    """The indices of the pictures that are not there yet. Marks an empty folder as that of these requests."""
    how = sampling.model_dump(mode="json", exclude={"every_steps", "sizes", "columns", "vae"})
    what = {str(r.index): [r.label, r.rows, r.columns] for r in requests}
    record = {"weights": weights.name, "seed": seed, "sampling": how}
    store = LocalStore(folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    if there := store.read_json(_RECORD):
        shared = {index: there["images"][index] for index in there["images"].keys() & what.keys()}
        changes = differences(there | {"images": shared}, record | {"images": {index: what[index] for index in shared}})
        if changes:
            raise UserError(f"{folder} holds other pictures ({'; '.join(changes[:3])}): give another folder")
        what = there["images"] | what
    store.put_json(_RECORD, record | {"images": what})
    return {r.index for r in requests if not picture_file(folder, r.index).exists()}


def chunks(requests: list[Request], weights: Weights, sampling: SamplingConfig) -> Iterator[list[Request]]:
    """As many images at a time as the packs of all ranks hold."""
    ranks, copies = weights.layout.data_parallel, 1 if sampling.cfg == 1.0 else 2
    room = ranks * weights.config.layout.max_tokens // copies
    chunk: list[Request] = []
    tokens = 0
    for request in requests:
        if chunk and (tokens + request.tokens > room or len(chunk) == ranks * _MAX_IMAGES):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(request)
        tokens += request.tokens
    if chunk:
        yield chunk


def _write(path: Path, picture: Image.Image) -> None:
    with atomic_write(path, durable=False) as file:
        picture.save(file, "PNG")
