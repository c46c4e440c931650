"""Building blocks of the spec's models: how strict they are, and the bounded types their fields share.

Every text, list and map is bounded, because the API server refuses rules over unbounded ones.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel


def _integral(value: Any) -> Any:
    """4096.0 and 1e3 are whole numbers to the API server, so they are here."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integrals(value: Any) -> Any:
    """The same for the entries of a list or mapping; what is further down is another model's."""
    if isinstance(value, list):
        return [_integral(item) for item in value]
    return {key: _integral(item) for key, item in value.items()} if isinstance(value, dict) else _integral(value)


class SpecModel(BaseModel):
    """What users write: unknown keys and values of another type are refused."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )

    # Not a validator of the integer type: pydantic leaves the bounds of such types out of the JSON schema.
    @model_validator(mode="before")
    @classmethod
    def _whole_floats_are_whole_numbers(cls, data: Any) -> Any:
        return {key: _integrals(value) for key, value in data.items()} if isinstance(data, dict) else data


class KubernetesModel(SpecModel):
    """Keys that Kubernetes has a name for are spelled its way in YAML, snake_case in Python."""

    model_config = ConfigDict(alias_generator=to_camel)


Name = Annotated[str, StringConstraints(min_length=1, max_length=253)]
"""Name of a Kubernetes object."""

Word = Annotated[str, StringConstraints(min_length=1, max_length=256)]
"""A short text: a module name, a label, a stop sequence."""

LabelKey = Annotated[str, StringConstraints(max_length=317)]
"""Key of a label or a taint: a prefix of at most 253 characters, a slash and 63 more."""

LabelValue = Annotated[str, StringConstraints(max_length=253)]
"""Value of a label, or a name that stands for one."""

Address = Annotated[str, StringConstraints(min_length=1, max_length=2048)]
"""A path or an address with a scheme."""

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""A whole number of at least 1."""

Amount = Annotated[float, Field(allow_inf_nan=False)]
"""A finite number."""

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A share from 0 to 1."""

LabelMap = Annotated[dict[LabelKey, LabelValue], Field(max_length=64)]
