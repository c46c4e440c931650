"""Which part of a causal language model turns token ids into hidden states."""

from __future__ import annotations

import sys
from typing import Any

from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel


def decoder_of(base: Any) -> Any:
    """What lies before the output head of `base`, a causal language model.

    transformers' own answer is a guess by attributes' names: of some it is the head, or the model itself. Then it is
    the part that has the input embeddings.
    """
    found = base.get_decoder()
    if found is not base and (not isinstance(base, PreTrainedModel) or isinstance(found, PreTrainedModel)):
        return found
    embeddings = base.get_input_embeddings()
    for part in base.children():
        if isinstance(part, PreTrainedModel) and part.get_input_embeddings() is embeddings:
            return part
    return found


def code_of(module: Any) -> Any:
    """The Python module that `module`'s class was written in; where FSDP has put a class of its own before it, what
    that was made from.
    """
    kind = type(module)
    return sys.modules[(kind.__mro__[2] if issubclass(kind, FSDPModule) else kind).__module__]
