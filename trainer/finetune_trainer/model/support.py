"""What a configuration tells of a model before a weight is fetched: whether it can be trained, and on how long rows.

The model is built without weights (on torch's meta device), which costs a moment and no memory. So missing packages
and configurations that fit no model are found by the code that will be used, not by a list of ours.
"""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import torch

from finetune_api.outcome import Reason
from finetune_api.problem import printable
from finetune_trainer.errors import JobError, first_line

_CLASSIFIERS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction|Reward\w*)$")
_INSTEAD = "name a causal language model, such as Llama, Qwen or Mistral"
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "n_ctx")
"""Where families write the number of their positions. ALiBi's and state-space models' `seq_length` bounds nothing."""
_SENTENCE_LIMIT = 1500
"""In characters. Names in a foreign file may be of any length."""

_PACKAGES = (
    re.compile(r"pip install (?:-\S+ )*`?([\w.\-\[\]]+(?:[ ,]+(?!and|Please)[\w.\-\[\]]+)*)"),
    re.compile(r"No module named '([\w.]+)'"),
    re.compile(r"requires? (?:the )?([\w.\-]+)"),
)


def unsupported(name: str, why: str) -> JobError:
    """ModelUnsupported: `name` `why`, which may quote what a foreign file holds."""
    return JobError(Reason.MODEL_UNSUPPORTED, f"{name} {printable(why, _SENTENCE_LIMIT)}.")


def missing_package(name: str, error: ImportError) -> JobError:
    """The sentence for a model whose code needs a package that is not installed."""
    found = (pattern.search(str(error)) for pattern in _PACKAGES)
    package = next((match.group(1) for match in found if match), None) or error.name or first_line(error)
    return unsupported(
        name,
        f"needs the Python package {package}, which is not installed here: install it, in a cluster by an image of "
        "your own made from the trainer's (workers.image)",
    )


def text_config(config: Any, name: str) -> Any:
    """The part of `config` that is about text.

    Raises:
        JobError: ModelUnsupported, there are several.
    """
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError as error:
        raise unsupported(
            name,
            f"is a {config.model_type} model, which is made of several language models and is none itself: {_INSTEAD}",
        ) from error


def refuse_by_config(config: Any, name: str, *, trust_remote_code: bool) -> None:
    """Refuse what a configuration shows to be no causal language model.

    Raises:
        JobError: ModelUnsupported.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.model_type or type(config).__name__
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if own_code and not trust_remote_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise unsupported(name, "brings Python code of its own: set trust_remote_code: true if you trust it")
    declared = next(iter(config.architectures or ()), "")
    if _CLASSIFIERS.search(declared) or "RewardModel" in declared:
        raise unsupported(
            name,
            f"holds a {declared}, a classifier or reward model without the output layer of a language model: name the "
            "language model that it was made from",
        )
    if own_code and trust_remote_code:
        return
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = "an encoder-decoder" if config.is_encoder_decoder else "no causal language model"
        raise unsupported(name, f"is a {kind} model, {what} in transformers: {_INSTEAD}")
    text_config(config, name)
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # Encoders that can serve as decoders say so when they are built for it, each in these words.
    if getattr(config, "is_decoder", None) is False and "is_decoder=True" in inspect.getsource(causal.__init__):
        raise unsupported(
            name,
            f"is an encoder ({kind}, is_decoder is false), in which every token sees the ones after it: {_INSTEAD}",
        )


def config_notices(config: Any, name: str) -> list[str]:
    """What a configuration tells that the user may not expect, a sentence each."""
    if not config.is_encoder_decoder:
        return []
    sentence = (
        f"{name} is an encoder-decoder ({config.model_type}): its decoder alone is trained, as a language model that "
        "sees nothing of the encoder, and the adapter is for that decoder."
    )
    return [sentence]


def build_skeleton(config: Any, name: str, *, trust_remote_code: bool) -> Any | None:
    """The model of `config` on the meta device, without weights; None when its own code does not bear that.

    Raises:
        JobError: ModelUnsupported, a package is missing, or transformers makes no model of this configuration.
    """
    from transformers import AutoModelForCausalLM, initialization

    with torch.device("meta"), initialization.meta_device_safe_creation_ops():
        try:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
        except ImportError as error:
            raise missing_package(name, error) from error
        except Exception as error:  # A foreign configuration can make transformers raise anything.
            if trust_remote_code and getattr(config, "auto_map", None):
                return None
            raise unsupported(
                name, f"cannot be made from its config.json ({first_line(error)}): correct that file, or {_INSTEAD}"
            ) from error


def context_limit(config: Any, skeleton: Any | None) -> int | None:
    """Most positions that the model supports, or None when it sets no bound (state-space models).

    Learned positions are counted in the model itself: RoBERTa's begin behind the padding id, and not every family
    writes their number where others do.
    """
    named = [getattr(config, name, None) for name in _POSITIONS]
    limits = [value for value in named if isinstance(value, int) and value > 0][:1]
    if skeleton is not None:
        limits += _learned_positions(skeleton)
    return min(limits, default=None)


def _learned_positions(model: Any) -> list[int]:
    found = []
    for path, module in model.named_modules():
        tower = re.search(r"vision|visual|image|img|audio|encoder\.(?!embed)", path)
        if isinstance(module, torch.nn.Embedding) and re.search(r"pos|wpe", path.rpartition(".")[2]) and not tower:
            before = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - before)
    return [count for count in found if count > 1]
