"""The base of every section of a run's configuration: typed, frozen, without unknown keys, and of finite numbers."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
