"""Manifests for what serves models in clusters: KServe, Ray Serve LLM and KAITO.

They were held against each project's schema or source, whose version the notes name, and not run.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from finetune_trainer.publish.serving_commands import BASE_PLACEHOLDER
from finetune_trainer.publish.serving_facts import TEMPLATE, ServingFacts

ADDRESS = "s3://BUCKET/PATH/adapter"
"""Stands for the address in the job's status.adapter.uri."""

RAY_FOLDER = "s3://BUCKET/loras"
_GPU = {"limits": {"nvidia.com/gpu": "1"}}
_LONGEST_LABEL = 40


def resource_name(name: str) -> str:
    """`name` as Kubernetes takes it for an object and for a part of a path."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_LONGEST_LABEL].strip("-")
    return label if label and label[0].isalpha() else f"adapter-{label}".rstrip("-")


def kserve_llm(facts: ServingFacts) -> str:
    """An LLMInferenceService, which knows adapters."""
    name = resource_name(facts.name)
    # Where its controller puts the adapter.
    place = f"/mnt/lora/{name}"
    base = facts.base or BASE_PLACEHOLDER
    revision = f":{facts.revision}" if facts.base and facts.revision else ""
    return _yaml(
        {
            "apiVersion": "serving.kserve.io/v1alpha2",
            "kind": "LLMInferenceService",
            "metadata": {"name": name},
            "spec": {
                "model": {
                    "uri": f"hf://{base}{revision}",
                    "name": base,
                    "lora": {"maxRank": _rank(facts), "adapters": [{"name": name, "uri": ADDRESS}]},
                },
                "replicas": 1,
                "router": {"gateway": {}, "route": {}, "scheduler": {}},
                "template": {
                    "containers": [
                        {
                            "name": "main",
                            "args": [f"--chat-template={place}/{TEMPLATE}", f"--generation-config={place}"],
                            "resources": _GPU,
                        }
                    ]
                },
            },
        }
    )


def kserve_service(facts: ServingFacts) -> str:
    """An InferenceService with the Hugging Face runtime, which passes vLLM's arguments on."""
    name, place = resource_name(facts.name), "/mnt/models"
    revision = [f"--model_revision={facts.revision}"] if facts.base and facts.revision else []
    return _yaml(
        {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {"name": name},
            "spec": {
                "predictor": {
                    "model": {
                        "modelFormat": {"name": "huggingface"},
                        "storageUri": ADDRESS,
                        "args": [
                            f"--model_id={facts.base or BASE_PLACEHOLDER}",
                            *revision,
                            "--enable-lora",
                            f"--max-lora-rank={_rank(facts)}",
                            "--lora-modules",
                            f"{name}={place}",
                            f"--chat-template={place}/{TEMPLATE}",
                            f"--generation-config={place}",
                        ],
                        "resources": _GPU,
                    }
                }
            },
        }
    )


def ray_config(facts: ServingFacts, template: str | None) -> str:
    """A configuration for `serve run`: the template goes in as text, since no path on a replica is known.

    Args:
        facts: the adapter's.
        template: what is in chat_template.jinja.
    """
    engine: dict[str, Any] = {"enable_lora": True, "max_lora_rank": _rank(facts)}
    if facts.base and facts.revision:
        engine["revision"] = facts.revision
    if template is not None:
        engine["chat_template"] = template
    base = facts.base or BASE_PLACEHOLDER
    model = {
        "model_loading_config": {"model_id": base, "model_source": base},
        "engine_kwargs": engine,
        "lora_config": {"dynamic_lora_loading_path": RAY_FOLDER, "max_num_adapters_per_replica": 4},
    }
    application = {
        "name": "llm",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [model]},
    }
    return _yaml({"applications": [application]})


def ray_model(facts: ServingFacts) -> str:
    """What a request to Ray Serve LLM calls the adapter."""
    return f"{facts.base or BASE_PLACEHOLDER}:{resource_name(facts.name)}"


def kaito_workspace(facts: ServingFacts) -> str:
    """A Workspace, and the ConfigMap with vLLM's arguments."""
    name = resource_name(facts.name)
    # Where its puller puts the image's /data.
    place = f"/mnt/adapter/{name}"
    arguments = {
        "max-lora-rank": str(_rank(facts)),
        "chat-template": f"{place}/{TEMPLATE}",
        "generation-config": place,
    }
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-vllm"},
        "data": {"inference_config.yaml": _yaml({"vllm": arguments})},
    }
    workspace = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": name},
        "resource": {"instanceType": "INSTANCE_TYPE", "labelSelector": {"matchLabels": {"apps": name}}},
        "inference": {
            "preset": {"name": facts.base or BASE_PLACEHOLDER},
            "config": f"{name}-vllm",
            "adapters": [{"source": {"name": name, "image": "REGISTRY/IMAGE:TAG"}}],
        },
    }
    return _yaml(config, workspace)


def _rank(facts: ServingFacts) -> int:
    return facts.server_rank or facts.rank


class _Readable(yaml.SafeDumper):
    """Texts of several lines as such, where YAML can."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(str, _text)


def _yaml(*documents: Any) -> str:
    return yaml.dump_all(documents, Dumper=_Readable, sort_keys=False, width=10_000)
