"""The shapes of records that are read back from storage, where anybody may have changed them."""

from datetime import datetime
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, ValidationError


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("it has no time zone")
    return text


Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Seconds = Annotated[float, Field(ge=0, lt=1e12, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Time = Annotated[str, AfterValidator(_moment)]  # ISO 8601


class _Checked(BaseModel):
    @classmethod
    def check(cls, record: Any) -> Any:
        """``record`` itself. Raises ValueError, in one line, unless it has this shape."""
        try:
            cls.model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "it"
            raise ValueError(f"{key}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
        return record


class Shape(_Checked):
    """The fields that a JSON object must have, by their types. It may have others."""

    model_config = ConfigDict(strict=True, extra="ignore")


Item = TypeVar("Item", bound=Shape)


class ListOf(_Checked, RootModel[list[Item]], Generic[Item]):
    """A JSON list of objects of one shape."""

    model_config = ConfigDict(strict=True)
