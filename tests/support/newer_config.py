"""The config of a version to come, with a key more in three sections of the recipe."""

from fitv2_scale.config.model import ModelConfig
from fitv2_scale.config.schema import Config
from fitv2_scale.config.section import Section
from fitv2_scale.config.sections import DataConfig, OptimizerConfig


class NewerModel(ModelConfig):
    registers: int = 0


class Mixup(Section):
    share: float = 0.5


class NewerData(DataConfig):
    mixup: Mixup | None = None


class Schedule(Section):
    name: str = "constant"
    steps: int = 0


class NewerOptimizer(OptimizerConfig):
    schedule: Schedule = Schedule()


class NewerConfig(Config):
    model: NewerModel
    data: NewerData
    optimizer: NewerOptimizer = NewerOptimizer()


def newer(config: Config, **sections: dict) -> NewerConfig:
    """``config`` as the newer version reads it, with changes to sections, as in ``model={"registers": 4}``."""
    tree = config.model_dump()
    return NewerConfig.model_validate(tree | {name: tree[name] | keys for name, keys in sections.items()})
