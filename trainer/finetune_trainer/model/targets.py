"""Which layers get an adapter: one function from a loaded model and a lora_config to full module paths.

PEFT's own `all-linear` differs by family: it adapts vision towers, takes layers that it fails on later, and turns the
experts of a mixture into something else. So it is decided here, and PEFT is told the result. By default a layer is
adapted when all of this holds; a list or an expression of the job chooses among the same layers:

- it is a plain linear layer (`nn.Linear`, GPT-2's `Conv1D`, or a subclass that computes the same);
- a text runs through it and sends a gradient back, which `reach.py` measures: towers, cross-attention without an
  encoder, indexers, and weights that a kernel reads past their layer drop out by themselves;
- it is no router, none of a mixture's experts (`lora_config.experts` adds them), nothing that PEFT refuses, and not the
  embedding or the output head, unless the job names them.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from finetune_api.lora import ALL_LINEAR, LoraConfig
from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.adapter_state import cannot_be_reloaded
from finetune_trainer.model.reach import Reach

_FORBIDDEN = dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("out_proj", "conv1d"))
"""Layers that PEFT refuses by name, by model type (`_check_lora_target_modules_mamba` in its tuners_utils)."""

_EXPERT_NAMES = frozenset({"experts", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w2", "w3"})
"""What the matrices of experts are called in checkpoints. In memory they are slices of one parameter, so that a list
with these names may match no layer."""

_EXPERTS = re.compile(r"(?<!Shared)Experts?(?![a-z])")
"""In the name of a class that holds experts, as GraniteMoeParallelExperts."""

_NAMES_SHOWN = 6


@dataclass(frozen=True)
class Targets:
    """What is adapted, and what the user is to know of the rest."""

    modules: tuple[str, ...]
    """Full paths of layers, in the model's order."""
    parameters: tuple[str, ...]
    """Full paths of experts' parameters, [E, …, …] for E experts."""
    notices: tuple[str, ...]
    """A sentence each."""
    untouched_experts: float
    """Share of the base model's weights that lies in experts without an adapter, 0 to 1."""

    def summary(self, trained: int) -> str:
        """In short, for status: `q,k,v,o x 32 layers: 13.6 M parameters`.

        Args:
            trained: number of the adapter's parameters.
        """
        experts = (f"experts.{_short(path)}" for path in self.parameters)
        counts = Counter([*map(_short, self.modules), *experts])
        alike: dict[int, list[str]] = {}
        for name, count in counts.items():
            alike.setdefault(count, []).append(name)
        parts = [f"{','.join(names)} x {count} layer{'s' * (count > 1)}" for count, names in alike.items()]
        rest = (
            f"; the experts ({self.untouched_experts:.0%} of the weights) untouched" if self.untouched_experts else ""
        )
        return f"{', '.join(parts)}: {_counted(trained)} parameters{rest}"

    def in_full(self) -> list[str]:
        """All of it, layers of a kind together: `model.layers.[0-31].self_attn.q_proj`."""
        numbers: dict[tuple[str, str], list[int]] = {}
        for path in (*self.modules, *self.parameters):
            head, number, tail = re.fullmatch(r"(.*?)(?:(?<=\.)(\d+)(?=\.)(.*))?", path).groups()  # type: ignore[union-attr]
            numbers.setdefault((head, tail or ""), []).extend([int(number)] if number else [])
        return [f"{head}[{_ranges(found)}]{tail}" if found else head for (head, tail), found in numbers.items()]


def candidates(model: Any) -> dict[str, nn.Module]:
    """Every module that an adapter could be put on, by full path: linear layers, embeddings, owners of experts."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) or _expert_parameters(path, module)
    }


def share_of_experts(model: Any) -> float:
    """Share of the base model's weights that its experts hold, 0 to 1; adapters do not count."""
    owners = {path for path, module in model.named_modules() if _expert_parameters(path, module)}
    experts = total = 0
    for path, parameter in model.named_parameters():
        if ".lora_" not in path:
            total += parameter.numel()
            if path.rpartition(".")[0] in owners or is_expert(path):
                experts += parameter.numel()
    return experts / max(total, 1)


def resolve_targets(model: Any, config: LoraConfig, reach: Reach | None) -> Targets:
    """What `config` adapts of `model`.

    Args:
        model: a causal language model without adapters; its weights are not read, so they may be on no device.
        config: the job's.
        reach: what a text reaches of `candidates(model)`; None where none can be run: every layer then counts.

    Raises:
        JobError: InvalidSpec, a name takes no layer that can be trained, or nothing is left to train.
    """
    view = _ModelView(model, reach)
    matched = [path for path in view.paths if _matches(config, path)]
    all_linear = config.target_modules == ALL_LINEAR
    if all_linear:
        matched = [path for path in matched if path not in view.ends]
    experts = config.experts or _names_experts(config, matched, view)
    if not all_linear:
        _check_names(config, view, experts=experts)
    taken = {path for path in matched if view.obstacle(path) is None}
    modules = [path for path in view.layers if path in taken or (experts and view.is_expert_layer(path))]
    parameters = view.expert_parameters if experts else []
    if not modules and not parameters:
        raise JobError(
            Reason.INVALID_SPEC,
            "lora_config leaves nothing to train (target_modules and exclude_modules take no layer that can be "
            f"trained): name some of {_listed(view.trainable_names())}, or write target_modules: all-linear without "
            "exclude_modules.",
        )
    notices = [*_left_out(view, matched), *_about_experts(view, config, experts)]
    return Targets(tuple(modules), tuple(parameters), tuple(notices), 0.0 if experts else view.expert_share)


class _Obstacle(StrEnum):
    """Why a layer gets no adapter, as the end of a sentence."""

    TIED = "they share their weights, and an adapter on one would not be on the others"
    NOT_LINEAR = "it is no linear layer"
    EXPERT = "it belongs to the experts, which lora_config.experts: true trains"
    REFUSED = "PEFT refuses it for this kind of model"
    LOST = "PEFT renames it on loading, and would not find its adapter again"
    FOREIGN = "its class computes something else than a linear layer"
    UNREACHED = "no text reaches it"
    ROUTER = "it is a router"


class _ModelView:
    """A model's modules, and what keeps an adapter from one."""

    def __init__(self, model: Any, reach: Reach | None) -> None:
        self.layers = candidates(model)
        self.paths = [path for path, _ in model.named_modules() if path]
        self.ends = _embedding_and_head(model)
        self._owners = Counter(id(getattr(module, "weight", module)) for module in self.layers.values())
        self._reach = reach or Reach(frozenset(self.layers), frozenset())
        self._forbidden = _FORBIDDEN.get(model.config.model_type, ())
        self._lost = set(cannot_be_reloaded(model, list(self.layers)))
        self.expert_parameters = [
            f"{path}.{name}"
            for path, module in self.layers.items()
            for name in _expert_parameters(path, module)
            if path in self._reach.reached
        ]
        self.expert_share = share_of_experts(model)

    def obstacle(self, path: str) -> _Obstacle | None:
        """What keeps an adapter from the layer at `path`, or None."""
        module = self.layers.get(path)
        if path not in self.ends and not isinstance(module, (nn.Linear, Conv1D)):
            return _Obstacle.NOT_LINEAR
        # Merged, each of them would get the others' adapters too.
        if self._owners[id(getattr(module, "weight", module))] > 1:
            return _Obstacle.TIED
        if path in self.ends:
            return None
        if is_expert(path):
            return _Obstacle.EXPERT
        if self._is_router(path):
            return _Obstacle.ROUTER
        if leaf(path) in self._forbidden:
            return _Obstacle.REFUSED
        if path in self._lost:
            return _Obstacle.LOST
        if path in self._reach.foreign:
            return _Obstacle.FOREIGN
        return None if path in self._reach.reached else _Obstacle.UNREACHED

    def is_expert_layer(self, path: str) -> bool:
        """Whether it is a linear layer of one expert. A short text need not reach each of them, so its likes count."""
        is_layer = isinstance(self.layers[path], (nn.Linear, Conv1D)) and not self._is_router(path)
        if not is_layer or not is_expert(path):
            return False
        return any(_likes(path) == _likes(other) for other in self._reach.reached)

    @property
    def has_trainable_experts(self) -> bool:
        """Whether PEFT can adapt them, as parameters or as layers."""
        return bool(self.expert_parameters) or any(self.is_expert_layer(path) for path in self.layers)

    def trainable_names(self) -> list[str]:
        """Last parts of the names of the linear layers that can have an adapter, the head's not among them."""
        return sorted({leaf(path) for path in self.layers if path not in self.ends and self.obstacle(path) is None})

    def _is_router(self, path: str) -> bool:
        parts = path.split(".")
        if parts[-1] == "shared_expert_gate" or any("router" in part for part in parts):
            return True
        # A gate is a router where there are experts beside it.
        parents = [".".join(parts[:number]) for number, part in enumerate(parts) if part in ("gate", "wg")]
        return any(f"{parent}.experts" in self.layers or f"{parent}.experts" in self.paths for parent in parents)


def _matches(config: LoraConfig, path: str) -> bool:
    """By PEFT's own rule, in which all-linear takes every path."""
    keys = config.model_dump(include={"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"})
    if config.target_modules == ALL_LINEAR:
        keys["target_modules"] = ".*"
    # Its third answer, "excluded", is false as well.
    return bool(check_target_module_exists(SimpleNamespace(**keys), path))


def _names_experts(config: LoraConfig, matched: list[str], view: _ModelView) -> bool:
    """Whether a list names experts as their checkpoint does, where no layer of that name is beside them."""
    if isinstance(config.target_modules, str) or not view.expert_parameters:
        return False
    layers = {leaf(path) for path in matched if view.obstacle(path) is None}
    return any(leaf(name) in _EXPERT_NAMES - layers for name in config.target_modules)


def _check_names(config: LoraConfig, view: _ModelView, *, experts: bool) -> None:
    """Refuse a name that takes nothing; PEFT complains only when none of them does.

    Raises:
        JobError: InvalidSpec.
    """
    asked = config.target_modules
    for name in [asked] if isinstance(asked, str) else asked:
        alone = config.model_copy(
            update={"target_modules": name if isinstance(asked, str) else [name], "layers_to_transform": None}
        )
        found = [path for path in view.paths if _matches(alone, path)]
        usable = [path for path in found if path in view.ends or view.obstacle(path) is None]
        if usable or (experts and leaf(name) in _EXPERT_NAMES):
            continue
        obstacles = dict.fromkeys(view.obstacle(path) for path in found)
        if found:
            why = f"which cannot be trained: {next(iter(obstacles))}. Remove it"
        else:
            near = difflib.get_close_matches(name, view.trainable_names(), 3, 0.4) or view.trainable_names()
            why = f"which this model does not have: write {_listed(near)}"
        raise JobError(
            Reason.INVALID_SPEC, f"lora_config.target_modules names {name}, {why}, or write target_modules: all-linear."
        )


def _left_out(view: _ModelView, matched: list[str]) -> Iterator[str]:
    """A sentence for each reason why layers that the job's words take are left out."""
    found: dict[_Obstacle, list[str]] = {}
    silent = (_Obstacle.NOT_LINEAR, _Obstacle.EXPERT, _Obstacle.ROUTER)
    taken = [path for path in matched if view.obstacle(path) is None]
    for path in matched:
        obstacle = view.obstacle(path)
        if path in view.layers and obstacle is not None and obstacle not in silent:
            found.setdefault(obstacle, []).append(path)
    for obstacle, paths in found.items():
        places = _listed(list(dict.fromkeys(_likes(_apart_from(path, taken)) for path in paths)))
        yield f"No adapter on {places} ({len(paths)} layer{'s' * (len(paths) > 1)}): {obstacle}."


def _apart_from(path: str, others: list[str]) -> str:
    """The shortest beginning of `path`, in whole parts, that none of `others` has."""
    parts = path.split(".")
    heads = (".".join(parts[:number]) for number in range(1, len(parts)))
    return next((head for head in heads if not any(other.startswith(f"{head}.") for other in others)), path)


def _about_experts(view: _ModelView, config: LoraConfig, experts: bool) -> Iterator[str]:
    share = f"{view.expert_share:.0%} of the weights"
    if not view.expert_share:
        if config.experts:
            yield "lora_config.experts has no effect: this model has no experts."
    elif not view.has_trainable_experts:
        yield f"The experts are not trained, {share}: PEFT knows no adapter for experts of this kind."
    elif not experts:
        yield f"The experts are not trained, {share}: lora_config.experts: true trains them, without dropout."
    elif view.expert_parameters and config.lora_dropout:
        yield (
            f"lora_dropout is 0 instead of {config.lora_dropout}: experts are adapted by their parameters, where PEFT "
            "knows no dropout."
        )


def _expert_parameters(path: str, module: nn.Module) -> list[str]:
    """Names of the module's own parameters that hold the matrices of all experts."""
    if isinstance(module, (nn.Linear, Conv1D)) or not (is_expert(path) or _EXPERTS.search(type(module).__name__)):
        return []
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]


def is_expert(path: str) -> bool:
    """Whether what is at `path` belongs to a mixture's experts; shared ones do not count."""
    return any(part in ("experts", "expert") for part in path.split("."))


def _embedding_and_head(model: Any) -> set[str]:
    """Paths of the input embedding and the output head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {path for path, module in model.named_modules() if any(module is end for end in modules)}


def _ranges(numbers: list[int]) -> str:
    """`0-3, 7` of 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _likes(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".N", path)


def leaf(path: str) -> str:
    """The last part of a module's path."""
    return path.rsplit(".", 1)[-1]


def _short(path: str) -> str:
    return leaf(path).removesuffix("_proj")


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _counted(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"
