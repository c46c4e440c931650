"""Jobs that the schema allows and nobody means: every field at its edges, packed into as few objects as hold them.

What an object says is generated from the schema (`tests/api/extremes.py`); here is what the rules of the API server ask
for besides, so that the server stores it all.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.crd import structural_schema
from finetune_api.llmforge import REFUSED
from finetune_api.prompt_format import PromptFormat
from tests.api.extremes import INSTRUCTION, Node, Path, a_key, at, edges, least, nodes
from tests.api.jobs import LLAMA
from tests.cluster.api import Object

SPEC: Node = structural_schema()["properties"]["spec"]

_FORMAT = ("generation_config", "prompt_format")
_TEXTS = ("system", "user", "assistant")
_ENV = ("workers", "env", "[]")
_VOLUME = ("workers", "volumes", "[]")

_REFUSED_BY_RULE: Mapping[Path, Any] = {
    ("task",): ("classification", "preference_tuning"),
    ("lora_config", "bias"): ("all", "lora_only"),
    ("lora_config", "use_dora"): (True,),
    ("lora_config", "inference_mode"): (True,),
    ("lora_config", "task_type"): ("SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
}
"""Values that the schema knows only to refuse them with a sentence."""

_ONE_OF: tuple[tuple[Path, ...], ...] = (
    *(((*_FORMAT, "use_hugging_face_chat_template"), (*_FORMAT, key)) for key in PromptFormat.model_fields),
    (("num_devices",), ("workers",)),
    (("min_num_update_steps",), ("min_update_steps",)),
    (("no_gradient_checkpoint",), ("gradient_checkpointing",)),
    (("output_dir",), ("output",)),
)
"""Of these keys, a rule takes one at a time."""


@dataclass(frozen=True)
class Edge:
    """One value at the edge of what one field takes."""

    path: Path
    word: str
    value: Any

    @property
    def place(self) -> Path:
        """The field, list or map of the spec that it is in: its path up to the first list or map."""
        marks = (position for position, key in enumerate(self.path) if key in ("[]", "{}"))
        return self.path[: next(marks, len(self.path))]

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {self.word}"


@dataclass
class Pack:
    """A spec that is at the edges of many fields at once."""

    edges: list[Edge] = field(default_factory=list)
    spec: Object = field(default_factory=dict)
    size_bytes: int = 0
    """About, as JSON."""
    _taken: dict[Path, bool] = field(default_factory=dict)
    """Fields with a value, and those around them; whether another entry may be put beside it."""
    _branches: dict[int, int] = field(default_factory=dict)
    """Which one of the keys is here of which the rules take one at a time."""

    def takes(self, edge: Edge, limit_bytes: int) -> bool:
        """Whether `edge` can be added, and is, without contradiction and within that size."""
        size_bytes = len(json.dumps(edge.value, ensure_ascii=False).encode()) + 200
        if self.edges and self.size_bytes + size_bytes > limit_bytes:
            return False
        place = edge.place
        is_entry = len(place) < len(edge.path) and not place[0].endswith("_ckpt_path")
        if place in self._taken and not (is_entry and self._taken[place]):
            return False
        around = [place[:length] for length in range(1, len(place))]
        if any(outer in {other.place for other in self.edges} for outer in around):
            return False
        branches = {
            number: found for number, group in enumerate(_ONE_OF) if (found := _branch(place, group)) is not None
        }
        if any(self._branches.get(number, found) != found for number, found in branches.items()):
            return False
        if not _put(self.spec, edge):
            return False
        self.edges.append(edge)
        self.size_bytes += size_bytes
        self._taken |= dict.fromkeys(around, False) | {place: is_entry}
        self._branches |= branches
        return True


def allowed_edges() -> Iterator[Edge]:
    """Every edge of the spec's fields that no rule refuses; of schemas that several fields have, those of the first."""
    known: set[str] = set()
    for path, node in nodes(SPEC):
        if not path or path[0] in REFUSED or {"[]", "{}"} & set(path):
            continue
        inside = [(path, node)]
        if "properties" not in node and ("additionalProperties" in node or "items" in node):
            schema = json.dumps(node.get("additionalProperties", node.get("items")))
            inside += [] if schema in known else [((*path, *below), inner) for below, inner in nodes(node) if below]
            known.add(schema)
        for inner_path, inner in inside:
            yield from _edges(inner_path, inner)


def _edges(path: Path, node: Node) -> Iterator[Edge]:
    for word, value in edges(node):
        if value in _REFUSED_BY_RULE.get(path, ()) or ("modules_to_save" in path and value != []):
            continue
        yield Edge(path, word, _as_the_rules_want(path, value))


def sorted_out(found: Iterable[Edge], is_accepted: Callable[[Object], bool]) -> tuple[list[Edge], list[Edge]]:
    """`found` as those that are accepted by themselves, and the rest."""
    verdicts: tuple[list[Edge], list[Edge]] = [], []
    for edge in found:
        alone = Pack()
        alone.takes(edge, 0)
        verdicts[0 if is_accepted(completed(alone.spec)) else 1].append(edge)
    return verdicts


def packed(found: Iterable[Edge], limit_bytes: int) -> list[Pack]:
    """All of `found` in as few specs as take no more than that as JSON (one that is larger by itself has its own)."""
    turns: dict[Path, list[Edge]] = {}
    for edge in found:
        turns.setdefault(edge.path, []).append(edge)
    packs: list[Pack] = []
    # The first of every field, then the second of every field: those of one field never fit together.
    for turn in itertools.zip_longest(*turns.values()):
        for edge in filter(None, turn):
            if not any(pack.takes(edge, limit_bytes) for pack in packs):
                packs.append(Pack())
                assert packs[-1].takes(edge, limit_bytes), edge
    return packs


def accepted(packs: Iterable[Pack], is_accepted: Callable[[Object], bool]) -> Iterator[Pack]:
    """`packs`, those that are refused as a whole taken apart until what is left of them is accepted, or is one edge."""
    for pack in packs:
        if len(pack.edges) == 1 or is_accepted(completed(pack.spec)):
            yield pack
            continue
        middle = len(pack.edges) // 2
        halves = (packed(edges, pack.size_bytes) for edges in (pack.edges[:middle], pack.edges[middle:]))
        yield from accepted(itertools.chain(*halves), is_accepted)


def thinned(found: Iterable[Edge], texts_each: int) -> Iterator[Edge]:
    """`found` with so many of the strange texts for each field, others for the next."""
    seen: dict[Path, int] = {}
    for edge in found:
        if not isinstance(edge.value, str) or edge.word.startswith("choice"):
            yield edge
            continue
        number = seen[edge.path] = seen.get(edge.path, -1) + 1
        # Twenty kinds of texts; steps of seven come to all of them.
        if (number - len(seen) * 7) % 20 < texts_each:
            yield edge


def completed(spec: Mapping[str, Any]) -> Object:
    """`spec` with what the schema requires and the rules ask for where it is silent."""
    made: Object = {"model_id": LLAMA, "train_path": "s3://data/train.jsonl", **copy.deepcopy(dict(spec))}
    workers = made.get("workers") or {}
    for variable in workers.get("env") or []:
        if not _given(variable, "value", "valueFrom"):
            variable["value"] = "a"
        source = variable.get("valueFrom")
        if source is not None and not _given(source, "secretKeyRef", "configMapKeyRef", "fieldRef"):
            variable["valueFrom"] = {"fieldRef": {"fieldPath": "metadata.name"}}
    for number, volume in enumerate(workers.get("volumes") or []):
        if volume["mountPath"] == "/a":
            # What is least is the same for all.
            volume["mountPath"] = f"/m{number}"
        if not _given(volume, "persistentVolumeClaim", "configMap", "secret", "emptyDir"):
            volume["emptyDir"] = {}
    prompt_format = (made.get("generation_config") or {}).get("prompt_format")
    if prompt_format is not None and not _given(prompt_format, "use_hugging_face_chat_template"):
        prompt_format |= {key: INSTRUCTION for key in _TEXTS if not _given(prompt_format, key)}
    return made


def _given(held: Mapping[str, Any], *keys: str) -> bool:
    return any(held.get(key) is not None for key in keys)


def _as_the_rules_want(path: Path, value: Any) -> Any:
    if path[:-1] == _FORMAT and path[-1] in _TEXTS and INSTRUCTION not in value:
        return INSTRUCTION + value[len(INSTRUCTION) :]
    return value


def _branch(path: Path, group: tuple[Path, ...]) -> int | None:
    return next((number for number, key in enumerate(group) if path[: len(key)] == key), None)


def _put(spec: Object, edge: Edge) -> bool:
    """Add a value to a spec, in an entry of its own where lists and maps are on its way; False where they are full."""
    place, node, path = spec, SPEC, edge.path
    for position, key in enumerate(path):
        rest = path[position + 1 :]
        inner: Node = node["properties"][key]
        if not rest:
            place[key] = edge.value
            return True
        if rest[0] == "[]":
            entries = place.setdefault(key, [])
            if not isinstance(entries, list) or len(entries) >= inner["maxItems"]:
                return False
            entry = at(rest[1:], edge.value, inner["items"])
            for name in inner.get("x-kubernetes-list-map-keys", ()):
                if rest[1:2] != (name,):
                    entry[name] = f"n{len(entries)}"
            entries.append(entry)
            return True
        if rest[0] == "{}":
            entries = place.setdefault(key, {})
            if not isinstance(entries, dict) or len(entries) >= inner["maxProperties"]:
                return False
            name = a_key(inner) if "anyOf" in inner else f"k{len(entries)}"
            entries[name] = at(rest[1:], edge.value, inner["additionalProperties"])
            return True
        place = place.setdefault(key, least(inner))
        node = inner
    return False
