"""Parts of a job as Kubernetes spells them: the contract's models know the names, this leaves out what is absent."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def plain(model: BaseModel) -> dict[str, Any]:
    """`model` as plain JSON, without what is not given."""
    return model.model_dump(exclude_none=True)
