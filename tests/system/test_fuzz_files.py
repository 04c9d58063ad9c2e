"""Configs and weights files survive what a stranger could have written."""

import json
from argparse import Namespace
from random import Random

import pytest
import torch
from safetensors.torch import save

from data_sharding.errors import UserError
from fitv2_scale.checkpoint.weights import open_weights
from fitv2_scale.config.load import explain, load_config
from fitv2_scale.config.model import ModelConfig
from tests.support.fuzzing import COUNTS, edited_bytes, fuzz, one_of, text
from tests.support.public_weights import MODEL, diffusers_weights, dit_weights
from tests.support.repository import ROOT
from tests.support.tiny_networks import TINY, build


@COUNTS
def test_configs(count, tmp_path):
    names = ("demo", "demo_hr", "dit_s2", "fitv2_3b2")
    good = [(ROOT / "configs" / f"{name}.yaml").read_bytes() for name in names]
    file = tmp_path / "config.yaml"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        list(explain(load_config(str(file), ["run=x"])))

    fuzz(edited_bytes([*good, b"a: &a [1]\nb: [*a, *a]\n", b"model: {depth: 1}\nrun: 2024-01-01\n"]), read, count)


@COUNTS
def test_overrides(count, tmp_path):
    keys = ["run", "seed", "model.depth", "data.url", "slurm.extra", "optimizer", "data.weights", "x", ""]
    word = lambda rng: rng.choice(keys) + rng.choice(("=", "", "==")) + text(12)(rng)  # noqa: E731
    config = tmp_path / "config.yaml"  # short, as most of the time goes into reading it
    config.write_text("model: {depth: 1}\n")
    words = lambda rng: [word(rng) for _ in range(rng.randint(1, 2))]  # noqa: E731
    fuzz(words, lambda overrides: load_config(str(config), overrides), count)


def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in build(TINY).state_dict().items()}


def read_all(file: str, model: ModelConfig = TINY) -> None:
    for stored in open_weights(file, model).tensors.values():
        stored.read()


@COUNTS
def test_safetensors(count, tmp_path):
    good, file = save(weights()), tmp_path / "w.safetensors"
    length = int.from_bytes(good[:8], "little")
    header, body = good[8 : 8 + length], good[8 + length :]

    def read(data: bytes) -> None:
        file.write_bytes(data)
        read_all(str(file))

    def with_header(rng: Random) -> bytes:
        edited = edited_bytes([header])(rng)
        return len(edited).to_bytes(8, "little") + edited + body

    fuzz(one_of(with_header, edited_bytes([good])), read, count)


@COUNTS
def test_pickled_weights(count, tmp_path):
    file = tmp_path / "w.bin"
    torch.save(weights(), file)
    good = file.read_bytes()
    pickled = good.index(b"\x80\x02")
    head = good[pickled : pickled + 4000]

    def read(data: bytes) -> None:
        file.write_bytes(data)
        read_all(str(file))

    # Most edits of the whole file hit the values, so half of them are of the pickle.
    fuzz(one_of(edited_bytes([good]), lambda rng: good.replace(head, edited_bytes([head])(rng))), read, count)


@COUNTS
def test_pickled_training_files_of_dit(count, tmp_path):
    file, model = tmp_path / "dit.pt", ModelConfig.model_validate(MODEL)
    torch.save({"ema": dit_weights(), "opt": {"lr": 0.1, "betas": [0.9]}, "args": Namespace(lr=1)}, file)
    read_all(str(file), model)
    good = file.read_bytes()
    pickled = good.index(b"\x80\x02")
    head = good[pickled : pickled + 6000]

    def read(data: bytes) -> None:
        file.write_bytes(data)
        read_all(str(file), model)

    fuzz(one_of(edited_bytes([good]), lambda rng: good.replace(head, edited_bytes([head])(rng))), read, count)


@COUNTS
def test_safetensors_of_diffusers(count, tmp_path):
    file, model = tmp_path / "d.safetensors", ModelConfig.model_validate(MODEL)
    good = save(diffusers_weights(dit_weights()))
    length = int.from_bytes(good[:8], "little")

    def read(data: bytes) -> None:
        file.write_bytes(len(data).to_bytes(8, "little") + data + good[8 + length :])
        read_all(str(file), model)

    read(good[8 : 8 + length])
    fuzz(edited_bytes([good[8 : 8 + length]]), read, count)


def test_the_seeds_are_valid(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(save(weights()))
    read_all(str(tmp_path / "w.safetensors"))
    torch.save(weights(), tmp_path / "w.bin")
    read_all(str(tmp_path / "w.bin"))
    with pytest.raises(UserError):
        load_config(str(tmp_path / "none.yaml"), [])
    assert json.loads("{}") == {}
