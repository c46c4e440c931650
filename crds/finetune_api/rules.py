"""What a job's keys mean together: every reason to refuse it that can be known without data, model or network.

The models say what shape a spec has; this says whether it can be done. Pure: problems out, nothing raised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from finetune_api.accelerators import accelerator_problems
from finetune_api.job import FineTuneJobSpec
from finetune_api.llmforge import refused_keys
from finetune_api.native_models import native_generation_config
from finetune_api.problem import Problem
from finetune_api.rules_lora import lora_problems
from finetune_api.storage_uri import Scheme, UriError, parse, parse_output
from finetune_api.workers import GPUS_LIMIT, NODES_LIMIT, Workers

GPUS_PER_NODE_LIMIT = 8
"""More num_devices than this are spread over nodes of this many, the usual size of a GPU machine."""

PROMPT_FORMAT_ADVICE = (
    "write generation_config.prompt_format with system, user and assistant, each containing {instruction}, or "
    "`generation_config: {prompt_format: {use_hugging_face_chat_template: true}}` to use the chat template of the "
    "model's tokenizer"
)

QUANTIZED_SHARDING = (
    "quantization does not go with sharding: fsdp, since quantized weights cannot be shared out among processes: "
    "remove one of the two; with quantization every process holds the whole base model."
)

_SECRET_TEXTS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}"), "a Hugging Face token", "secrets.huggingFace"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), "an AWS access key", "secrets.objectStore"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"), "a private key", "workers.volumes with a secret"),
    (re.compile(r"://[^/\s:@]+:[^/\s@]+@"), "a password in an address", "workers.env with valueFrom.secretKeyRef"),
)

_SIGNS_OF_SECRETS = ("hf_", "AKIA", "ASIA", "-----BEGIN", "://")
"""One of them is in whatever the expressions above find; looking for them first is a hundred times faster."""

SECRET_VARIABLE = r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS|API_KEY|ACCESS_KEY|ACCESS_KEY_ID|PRIVATE_KEY)$"
"""Names of environment variables whose value is a secret."""

_SECRET_VARIABLE = re.compile(SECRET_VARIABLE, re.IGNORECASE)


def spec_problems(spec: FineTuneJobSpec) -> list[Problem]:
    """Every reason why `spec` cannot be done; paths start below `spec`. Empty when it can."""
    return [
        *refused_keys(spec),
        *lora_problems(spec.lora_config),
        *_contradictions(spec),
        *accelerator_problems(spec.worker_resources),
        *_format_problems(spec),
        *_address_problems(spec),
        *_worker_problems(spec.workers),
        *_secret_problems(spec),
    ]


def workers_of(spec: FineTuneJobSpec) -> Workers:
    """The workers with num_devices taken into account.

    Raises:
        ValueError: num_devices and workers contradict each other; the text is a sentence.
    """
    workers, total = spec.workers, spec.num_devices
    if total is None:
        return workers
    given = workers.model_fields_set & {"nodes", "gpus_per_node"}
    nodes, gpus = workers.nodes, workers.gpus_per_node
    if not given:
        nodes, gpus = (
            (1, total) if total <= GPUS_PER_NODE_LIMIT else (total // GPUS_PER_NODE_LIMIT, GPUS_PER_NODE_LIMIT)
        )
    elif given == {"nodes"}:
        gpus = total // nodes
    elif given == {"gpus_per_node"} and gpus:
        nodes = total // gpus
    if nodes * gpus != total:
        if not given:
            raise ValueError(
                f"num_devices: {total} does not divide into nodes of {GPUS_PER_NODE_LIMIT} GPUs: write "
                "workers.nodes and workers.gpusPerNode instead."
            )
        shown = " x ".join(
            f"workers.{name}: {value}"
            for name, field, value in (
                ("nodes", "nodes", workers.nodes),
                ("gpusPerNode", "gpus_per_node", workers.gpus_per_node),
            )
            if field in given
        )
        raise ValueError(
            f"num_devices: {total} contradicts {shown}: remove num_devices, or make nodes x gpusPerNode {total}."
        )
    if nodes > NODES_LIMIT or gpus > GPUS_LIMIT:
        raise ValueError(
            f"num_devices: {total} would be {nodes} nodes of {gpus} GPUs, and {NODES_LIMIT} of {GPUS_LIMIT} are the "
            "most: ask for fewer, or write workers.nodes and workers.gpusPerNode."
        )
    return workers.model_copy(update={"nodes": nodes, "gpus_per_node": gpus})


def _contradictions(spec: FineTuneJobSpec) -> Iterator[Problem]:
    if spec.no_gradient_checkpoint is not None and spec.gradient_checkpointing == spec.no_gradient_checkpoint:
        value = str(spec.no_gradient_checkpoint).lower()
        yield Problem(
            "no_gradient_checkpoint",
            f"no_gradient_checkpoint: {value} contradicts gradient_checkpointing: {value}: remove "
            "no_gradient_checkpoint.",
        )
    if spec.quantization is not None and spec.sharding == "fsdp":
        yield Problem("quantization", QUANTIZED_SHARDING)
    if None not in (spec.min_update_steps, spec.min_num_update_steps) and (
        spec.min_update_steps != spec.min_num_update_steps
    ):
        yield Problem(
            "min_num_update_steps",
            f"min_num_update_steps: {spec.min_num_update_steps} contradicts min_update_steps: "
            f"{spec.min_update_steps}, of which it is another spelling: remove one.",
        )
    frequency = spec.checkpoint_and_evaluation_frequency
    if (
        spec.checkpoint_every_n_epochs is not None
        and frequency is not None
        and (frequency.strategy, frequency.value) != ("epochs", spec.checkpoint_every_n_epochs)
    ):
        yield Problem(
            "checkpoint_every_n_epochs",
            f"checkpoint_every_n_epochs: {spec.checkpoint_every_n_epochs} contradicts "
            f"checkpoint_and_evaluation_frequency: {frequency.value} {frequency.strategy}: remove "
            "checkpoint_every_n_epochs, the old spelling.",
        )
    if spec.output_dir is not None and spec.output is not None and spec.output_dir != spec.output.uri:
        yield Problem("output_dir", "output_dir contradicts output.uri, of which it is another spelling: remove one.")
    try:
        workers_of(spec)
    except ValueError as error:
        yield Problem("num_devices", str(error))


def _format_problems(spec: FineTuneJobSpec) -> Iterator[Problem]:
    config = spec.generation_config
    if (config is None or config.prompt_format is None) and native_generation_config(spec.model_id) is None:
        path = "generation_config" if config is None else "generation_config.prompt_format"
        yield Problem(
            path,
            f"{path} is required, since the prompt format of {spec.model_id} is not built in: {PROMPT_FORMAT_ADVICE}.",
        )


def _address_problems(spec: FineTuneJobSpec) -> Iterator[Problem]:
    addresses = {
        "model_id": (spec.model_id, "write the model's name as owner/name"),
        "train_path": (spec.train_path, None),
        "valid_path": (spec.valid_path, None),
        "initial_base_model_ckpt_path": (spec.initial_base_model_ckpt_path, "write {repo_id: owner/name}"),
        "initial_adapter_model_ckpt_path": (spec.initial_adapter_model_ckpt_path, "write {repo_id: owner/name}"),
        "output_dir": (spec.output_dir, None),
        "output.uri": (spec.output.uri if spec.output else None, None),
    }
    for path, (address, instead_of_hub) in addresses.items():
        if not isinstance(address, str):
            continue
        if instead_of_hub and address.startswith("hf://"):
            yield Problem(path, f"hf:// addresses are for data sets: {instead_of_hub}.")
            continue
        try:
            uri = (parse_output if path in ("output_dir", "output.uri") else parse)(address)
        except UriError as error:
            yield Problem(path, str(error))
            continue
        if path in ("train_path", "valid_path") and uri.scheme is not Scheme.LOCAL and not uri.path:
            yield Problem(path, f"{address!r} names no file: add its key or path.")


def _worker_problems(workers: Workers) -> Iterator[Problem]:
    resources = workers.resources
    for kind in ("limits", "requests"):
        quantities = getattr(resources, kind) if resources else None
        if quantities and workers.gpu_resource_name in quantities:
            yield Problem(
                f"workers.resources.{kind}",
                f"{workers.gpu_resource_name} is asked for with workers.gpusPerNode: remove it here.",
            )
    for index, variable in enumerate(workers.env):
        path, source = f"workers.env[{index}]", variable.value_from
        if (variable.value is None) == (source is None):
            yield Problem(path, f"{variable.name} needs exactly one of value and valueFrom.")
        if source is not None and len(source.model_dump(exclude_none=True)) != 1:
            yield Problem(
                f"{path}.valueFrom", "valueFrom needs exactly one of secretKeyRef, configMapKeyRef and fieldRef."
            )
        if variable.value and _SECRET_VARIABLE.search(variable.name):
            yield Problem(
                f"{path}.value",
                f"{variable.name} is a secret, and everybody who may read the job could read it: use secrets, or "
                "valueFrom.secretKeyRef.",
            )
    names = [volume.name for volume in workers.volumes]
    for index, volume in enumerate(workers.volumes):
        kinds = (volume.persistent_volume_claim, volume.config_map, volume.secret, volume.empty_dir)
        if sum(kind is not None for kind in kinds) != 1:
            yield Problem(
                f"workers.volumes[{index}]",
                f"{volume.name} needs exactly one of persistentVolumeClaim, configMap, secret and emptyDir.",
            )
        if names.index(volume.name) != index:
            yield Problem(f"workers.volumes[{index}].name", f"{volume.name} is given twice: rename one.")


def _secret_problems(spec: FineTuneJobSpec) -> Iterator[Problem]:
    # Variables whose very name is a secret's are reported by their name.
    variables = {f"workers.env[{index}].value": variable.name for index, variable in enumerate(spec.workers.env)}
    texts: list[tuple[str, str]] = []
    _find_texts(spec.model_dump(exclude={"generation_config"}, exclude_unset=True), "", texts)
    for path, text in texts:
        for pattern, what, instead in _SECRET_TEXTS:
            if pattern.search(text) and not _SECRET_VARIABLE.search(variables.get(path, "")):
                yield Problem(
                    path,
                    f"this contains {what}, which everybody who may read the job could read: put it into a Secret and "
                    f"name it with {instead}, and revoke this one if the file was shared.",
                )
                break


def _find_texts(value: Any, path: str, found: list[tuple[str, str]]) -> None:
    """Adds every text that may hold a secret, with its path, to `found`."""
    if isinstance(value, str):
        if any(sign in value for sign in _SIGNS_OF_SECRETS):
            found.append((path, value))
    elif isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, str | dict | list):
                _find_texts(inner, f"{path}.{key}" if path else str(key), found)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            if isinstance(inner, str | dict | list):
                _find_texts(inner, f"{path}[{index}]", found)
