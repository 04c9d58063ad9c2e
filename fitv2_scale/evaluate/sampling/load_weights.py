"""Loads a network to generate images with: from a run's commit or from a file of weights, in any layout."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from data_sharding.errors import DataError, UserError
from data_sharding.format.class_names import class_digest
from data_sharding.format.codec import Codec
from data_sharding.format.codecs import codec_of, decoding_vae
from data_sharding.format.manifest import Header, read_header
from fitv2_scale.checkpoint.init_from import load_initial_weights
from fitv2_scale.checkpoint.restore import restore
from fitv2_scale.config.layout import Layout
from fitv2_scale.config.load import load_config, parse_config
from fitv2_scale.config.schema import Config
from fitv2_scale.model.counts import logical_shapes, matching
from fitv2_scale.parallel.agreement import Facts, read_alike
from fitv2_scale.parallel.build import make_engine
from fitv2_scale.parallel.engine import Engine
from fitv2_scale.parallel.rank_facts import config_facts
from fitv2_scale.parallel.world import World
from fitv2_scale.run.reference import find_reference
from fitv2_scale.run.run import Run
from fitv2_scale.run.weights_source import WeightsSource, is_weights

# Sampling does not need the layout of training. Every pass gathers the weights, so each node keeps a copy of them; and
# packs have many shapes, each of which would be compiled.
_LAYOUT = {"engine": "fsdp", "replicate": "auto", "tensor": 1, "checkpointing": "none", "compile": False}


@dataclass(frozen=True)
class Weights:
    """A network with the EMA weights in ``engine.network``, from ``open_weights``."""

    name: str  # runs/first@1000, or the file
    digest: str  # of the content, wherever they lie
    step: int | None  # None: a file of weights
    config: Config
    engine: Engine
    layout: Layout
    world: World
    run: Run | None = None

    @property
    def described(self) -> str:
        """As in a sentence. Which weights of a run a file holds, it does not say."""
        return f"the EMA weights of {self.name}" if self.run else f"the weights in {self.name}"

    def codec(self) -> Codec:
        """The codec that decodes its latents: that of the dataset, or if that cannot be read the VAE of sampling.vae.

        Raises:
            UserError: there is neither, or the codec is not that of the latents that the network makes.
        """
        codec, channels = self._codec(), self.config.model.latent_channels
        if codec.channels != channels:
            raise UserError(
                f"{self.name} makes latents of {channels} channels, and the codec {codec.name} decodes "
                f"{codec.channels}: give a dataset of theirs as data.url=FOLDER, or their VAE as sampling.vae=FOLDER"
            )
        return codec

    def _codec(self) -> Codec:
        vae = self.config.sampling.vae
        try:
            return codec_of(self.header().codec, vae)
        except DataError as error:
            if vae:
                return decoding_vae(vae, self.run.recorded("codec") if self.run else None)
            raise UserError(
                f"the codec of these latents is not known: {error}; give the dataset as data.url=FOLDER, or the "
                "diffusers AutoencoderKL as sampling.vae=FOLDER"
            ) from error

    def shared_codec(self) -> Codec:
        """``codec``, which each rank reads for itself, and the same on all of them. A collective."""

        def read() -> tuple[Codec, Facts]:
            codec = self.codec()
            return codec, {"digest of the codec": codec.digest}

        return read_alike(self.world, read)

    @property
    def classes(self) -> int:
        """The number of classes it was trained on; those of the model if the dataset cannot be read."""
        try:
            return min(len(self.header().classes), self.config.model.classes)
        except DataError:
            return self.config.model.classes

    def header(self) -> Header:
        """Of the dataset that it was trained on, or of another with the same classes and codec."""
        header, _ = read_header(url := self.config.data.urls[0].rstrip("/"))
        if self.run is not None:
            for what, now, then in (
                ("class list", class_digest(header.classes), self.run.classes),
                ("codec", header.codec["digest"], self.run.recorded("codec")),
            ):
                if then not in (None, now):
                    raise UserError(
                        f"{url} has another {what} than the data of {self.name}: give that as data.url=FOLDER"
                    )
        return header


@contextmanager
def open_weights(
    source: str, world: World, config_file: str | None = None, overrides: list[str] | None = None
) -> Generator[Weights]:
    """The EMA weights of ``source``: RUN (its newest intact commit), RUN@STEP, or a file of weights with the config in
    ``config_file``. A collective.

    Raises:
        UserError: there are no such weights, they do not match the config, or the ranks did not read the same.
    """
    config, run, step = read_alike(world, lambda: _read(source, config_file, overrides))
    engine, layout = _engine(config, world)
    if run is None:
        file = WeightsSource.parse(source)
        digest = world.run_on_rank0(file.digest)  # while they are loaded, the ranks compare what they read
        load_initial_weights(file, engine, config.model, world)
        weights = Weights(source, digest, None, config, engine, layout, world)
    else:
        restored = restore(engine, run, world, step)
        if restored is None:
            raise UserError(f"{run.url} has no commit" + (" yet" if step is None else f" at step {step}"))
        name = f"{run.url}@{restored.step}"
        weights = Weights(name, restored.digest, restored.step, config, engine, layout, world, run)
    with engine.ema_weights():
        yield weights


def _read(
    source: str, config_file: str | None, overrides: list[str] | None
) -> tuple[tuple[Config, Run | None, int | None], Facts]:
    """What each rank reads for itself: the config, the run (None for a file of weights) and the step that is asked for;
    and the facts in which all must agree."""
    if is_weights(source):
        if config_file is None:
            raise UserError(f"{source}: give the config of these weights as --config FILE, one like those in configs/")
        tree = load_config(config_file, overrides).model_dump(mode="json")
        config = parse_config(tree | {"layout": tree["layout"] | _LAYOUT}, config_file, overrides)
        return (config, None, None), config_facts(config) | _data_facts(config)
    if config_file is not None:
        raise UserError(f"{source} is a run, which has its own config: leave out --config")
    url, step = find_reference(source)
    run = Run.open(url)
    tree = run.config | {"layout": run.config["layout"] | _LAYOUT}
    config = parse_config(tree, f"{run.url}/run.json", overrides)
    positions = {"rope": config.model.rope, "sincos": config.model.sincos}
    # Also keys that leave every shape alone: with other heads the weights load, and mean nothing. Positions may change.
    trained = parse_config(tree, run.url)
    if config.model != trained.model.model_copy(update=positions):
        raise UserError(f"{source}: these overrides describe another network than the run's; leave out model.…")
    if config.objective != trained.objective:
        raise UserError(f"{source} was trained with objective={trained.objective}: leave out objective=…")
    return (config, run, step), config_facts(config) | _data_facts(config) | {"id of the run": run.id}


def _data_facts(config: Config) -> Facts:
    """Classes and codec are those of the dataset, where it can be read."""
    try:
        return {"digest of dataset 0": read_header(config.data.urls[0].rstrip("/"))[1]}
    except DataError:
        return {"digest of dataset 0": None}


def _engine(config: Config, world: World) -> tuple[Engine, Layout]:
    """An engine for sampling. It must have optimizer state, so it gets the moments of a single tensor."""
    names = matching(logical_shapes(config.model), config.trainable)
    config = config.model_copy(update={"trainable": names[-1:] or config.trainable})
    layout = config.layout.over(world.size, len(set(world.hosts)))
    return make_engine(config, layout, world), layout
