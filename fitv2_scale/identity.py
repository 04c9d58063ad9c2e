"""What a run is known by, from its config and its data; and that labels keep their meaning from one run to the next."""

from operator import attrgetter
from typing import Any

from data_sharding.errors import UserError
from data_sharding.format.class_names import class_difference, class_digest
from data_sharding.format.manifest import Manifest, read_header
from data_sharding.plan.plan import Plan
from data_sharding.storage.open_store import open_store
from fitv2_scale.config.model import CLASS_TABLE
from fitv2_scale.config.schema import Config
from fitv2_scale.config.sections import DataConfig
from fitv2_scale.run.class_list import DataIdentity
from fitv2_scale.run.fork import Fork
from fitv2_scale.run.paths import absolute_paths
from fitv2_scale.run.redact import redact
from fitv2_scale.run.reference import find_reference
from fitv2_scale.run.run import Run
from fitv2_scale.run.weights_source import WeightsSource

# Keys that no shape shows, with the values that runs without them have. How positions are extended is free.
_MEANING = {"model.heads": None, "model.qk_norm": "layernorm", "model.position": "rope", "objective": "flow"}


def open_run(config: Config, plan: Plan | None, parent: dict[str, Any] | None = None) -> Run:
    """Makes the run of ``config``, or continues it. ``plan`` is None where weights are imported: then its data are not
    known yet. Raises as ``Run.open_or_create``."""
    data = None
    if plan is not None:
        data = DataIdentity(class_digest(plan.manifests[0].classes), tuple(m.digest for m in plan.manifests))
    return Run.open_or_create(
        config.run,
        absolute_paths(config.model_dump(mode="json")),
        config.recipe(),
        None if plan is None else plan.hash,
        parent,
        data=data,
        complete=config.complete_recipe,
        weights=lambda: WeightsSource.parse(config.init_from).digest(),
    )


def check_finished(config: Config, parent: dict[str, Any] | None = None) -> None:
    """Raises as ``Run.open_or_create`` if the run of ``config``, which has done all its steps, has another recipe or
    another ``parent``. Its data and the weights that it began with are not needed any more, and may be gone."""
    run = Run.open(config.run)

    def weights() -> str | None:
        source = WeightsSource.parse(config.init_from)
        try:
            return source.digest()
        except UserError:
            return run.recorded("init_from")

    new = {"recipe": redact(config.recipe()), "plan_hash": None, "parent": parent}
    run.require_same(new, config.complete_recipe, weights)


def check_start(config: Config, plan: Plan, fork: Fork | None) -> None:
    """Raises UserError if the run of ``config`` has no commit yet, and would begin with weights of another run that
    learned other classes (unless their table is drawn) or other latents than those of its data, so far as it is known
    what they learned; or whose network has tensors of the same shapes and computes something else with them."""
    if open_store(config.run).exists("run.json") and Run.open(config.run).log.commits():
        return
    url, step = find_reference(config.init_from)
    sources = [(fork.run, f"{fork.run.url}@{fork.step}")] if fork else []
    sources += [(Run.open(url), config.init_from)] if step is not None else []
    for run, weights in sources:
        _check_network(run, weights, config)
        if fork or not config.has_new_classes:
            _check_classes(run, weights, plan.manifests[0])
        _check_codec(run, weights, plan.manifests[0])


def _check_network(run: Run, weights: str, config: Config) -> None:
    for key, absent in _MEANING.items():
        *section, name = key.split(".")
        theirs = (run.config.get("model", {}) if section else run.config).get(name, absent)
        if theirs not in (None, wanted := attrgetter(key)(config)):
            raise UserError(
                f"{weights} was trained with {key}={theirs}, and would be another network with {wanted}: give the same "
                f"{key}"
            )


def _check_codec(run: Run, weights: str, training: Manifest) -> None:
    if run.recorded("codec") not in (None, training.header.codec["digest"]):
        raise UserError(
            f"{weights} learned latents of another codec or VAE than {training.header.codec['name']} of "
            f"{training.url}: give data that were written with the same; to train it on others, export its weights and "
            "give the file as init_from"
        )


def _check_classes(run: Run, weights: str, training: Manifest) -> None:
    digest, names = _known_classes(run)
    if digest in (None, class_digest(training.classes)):
        return
    difference = class_difference(run.url, names, training.url, training.classes) if names else None
    raise UserError(
        f"{weights} learned other classes than those of {training.url} ({difference or f'class list {digest:.16}'}): "
        "give data with the same classes; to train it on others, give it as init_from with "
        f"init_new='[\"{CLASS_TABLE}\"]', which draws their table"
    )


def _known_classes(run: Run) -> tuple[str | None, tuple[str, ...] | None]:
    """The digest of the class list of ``run``, and the names if one of its datasets is still where it was; None where
    they are not known."""
    datasets = run.recorded("datasets")
    for url in DataConfig.model_validate(run.config["data"]).urls if datasets else ():
        try:
            header, dataset = read_header(url.rstrip("/"))
        except (UserError, OSError):  # the weights of a run can be used without its data
            continue
        if dataset in datasets and run.classes in (None, class_digest(header.classes)):
            return class_digest(header.classes), header.classes
    return run.classes, None
