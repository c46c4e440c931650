"""Manifests are what each project's schema takes.

The schemas below have the fields that are used, written off KServe's and KAITO's resource definitions and Ray's models,
whose versions stand beside them; every other field is refused.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given

from finetune_trainer.publish import serving_cluster as cluster
from finetune_trainer.publish.serving_facts import ServingFacts
from tests.api.formats import texts

_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
_WHOLE = {"type": "integer", "minimum": 1}
_FREE: dict[str, Any] = {"type": "object"}


def _object(**fields: Any) -> dict[str, Any]:
    """All these fields and no other."""
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def _only(value: str) -> dict[str, Any]:
    return {"const": value}


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


_LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
_NAME = {"type": "string", "pattern": _LABEL, "maxLength": 63}
_METADATA = _object(name=_NAME)
_RESOURCES = _object(limits={"type": "object", "additionalProperties": _TEXT})

LLM_INFERENCE_SERVICE = _object(
    apiVersion=_only("serving.kserve.io/v1alpha2"),
    kind=_only("LLMInferenceService"),
    metadata=_METADATA,
    spec=_object(
        model=_object(
            uri=_TEXT, name=_TEXT, lora=_object(maxRank=_WHOLE, adapters=_list(_object(name=_NAME, uri=_TEXT)))
        ),
        replicas=_WHOLE,
        router=_object(gateway=_FREE, route=_FREE, scheduler=_FREE),
        template=_object(containers=_list(_object(name=_only("main"), args=_TEXTS, resources=_RESOURCES))),
    ),
)
"""KServe 0.20, config/crd/full/llmisvc/serving.kserve.io_llminferenceservices.yaml."""

INFERENCE_SERVICE = _object(
    apiVersion=_only("serving.kserve.io/v1beta1"),
    kind=_only("InferenceService"),
    metadata=_METADATA,
    spec=_object(
        predictor=_object(
            model=_object(modelFormat=_object(name=_TEXT), storageUri=_TEXT, args=_TEXTS, resources=_RESOURCES)
        )
    ),
)
"""KServe 0.20, config/crd/full/serving.kserve.io_inferenceservices.yaml."""

WORKSPACE = _object(
    apiVersion=_only("kaito.sh/v1beta1"),
    kind=_only("Workspace"),
    metadata=_METADATA,
    resource=_object(instanceType=_TEXT, labelSelector=_object(matchLabels={"additionalProperties": _TEXT})),
    inference=_object(
        preset=_object(name=_TEXT),
        config=_TEXT,
        adapters=_list(_object(source=_object(name=_NAME, image=_TEXT))),
    ),
)
"""KAITO 0.12, config/crd/bases/kaito.sh_workspaces.yaml."""

CONFIG_MAP = _object(
    apiVersion=_only("v1"),
    kind=_only("ConfigMap"),
    metadata=_METADATA,
    data=_object(**{"inference_config.yaml": _TEXT}),
)

VLLM_ARGUMENTS = _object(vllm={"type": "object", "additionalProperties": _TEXT})
"""KAITO 0.12, InferenceConfig in api/v1beta1/inference_config_validation.go: a map of texts."""

RAY = _object(
    applications=_list(
        _object(
            name=_TEXT,
            route_prefix=_only("/"),
            import_path=_only("ray.serve.llm:build_openai_app"),
            args=_object(
                llm_configs=_list(
                    _object(
                        model_loading_config=_object(model_id=_TEXT, model_source=_TEXT),
                        engine_kwargs={
                            "type": "object",
                            "properties": {
                                "enable_lora": {"const": True},
                                "max_lora_rank": _WHOLE,
                                "revision": _TEXT,
                                "chat_template": _TEXT,
                            },
                            "additionalProperties": False,
                        },
                        lora_config=_object(
                            dynamic_lora_loading_path={"type": "string", "pattern": "^(s3|gs|abfss|azure)://"},
                            max_num_adapters_per_replica=_WHOLE,
                        ),
                    )
                )
            ),
        )
    )
)
"""Ray 2.60, ServeDeploySchema and LLMConfig; the arguments of the engine are fields of vLLM 0.32's."""


def _facts(**more: Any) -> ServingFacts:
    return replace(ServingFacts(name="guard", base="acme/model", rank=12), **more)


@pytest.mark.parametrize("facts", [_facts(), _facts(base=None), _facts(revision="abc", name="Ünder_score!")])
def test_manifests_have_the_fields_of_their_schemas(facts: ServingFacts) -> None:
    for text, schema in (
        (cluster.kserve_llm(facts), LLM_INFERENCE_SERVICE),
        (cluster.kserve_service(facts), INFERENCE_SERVICE),
        (cluster.ray_config(facts, "{{ messages }}\n"), RAY),
    ):
        jsonschema.validate(yaml.safe_load(text), schema)
    config, workspace = yaml.safe_load_all(cluster.kaito_workspace(facts))
    jsonschema.validate(config, CONFIG_MAP)
    jsonschema.validate(workspace, WORKSPACE)
    jsonschema.validate(yaml.safe_load(config["data"]["inference_config.yaml"]), VLLM_ARGUMENTS)
    assert workspace["inference"]["config"] == config["metadata"]["name"]


def test_each_starts_vllm_with_the_rank_the_template_and_the_stops() -> None:
    facts = _facts(revision="abc")
    (container,) = yaml.safe_load(cluster.kserve_llm(facts))["spec"]["template"]["containers"]
    assert container["args"] == [
        "--chat-template=/mnt/lora/guard/chat_template.jinja",
        "--generation-config=/mnt/lora/guard",
    ]
    model = yaml.safe_load(cluster.kserve_llm(facts))["spec"]["model"]
    assert (model["uri"], model["lora"]["maxRank"]) == ("hf://acme/model:abc", 16)
    arguments = yaml.safe_load(cluster.kserve_service(facts))["spec"]["predictor"]["model"]["args"]
    assert arguments == [
        "--model_id=acme/model",
        "--model_revision=abc",
        "--enable-lora",
        "--max-lora-rank=16",
        "--lora-modules",
        "guard=/mnt/models",
        "--chat-template=/mnt/models/chat_template.jinja",
        "--generation-config=/mnt/models",
    ]
    config, _ = yaml.safe_load_all(cluster.kaito_workspace(facts))
    assert yaml.safe_load(config["data"]["inference_config.yaml"])["vllm"] == {
        "max-lora-rank": "16",
        "chat-template": "/mnt/adapter/guard/chat_template.jinja",
        "generation-config": "/mnt/adapter/guard",
    }


@given(template=texts)
def test_rays_template_is_the_adapters(template: str) -> None:
    (application,) = yaml.safe_load(cluster.ray_config(_facts(), template))["applications"]
    assert application["args"]["llm_configs"][0]["engine_kwargs"]["chat_template"] == template


@given(name=texts)
def test_any_name_becomes_one_that_kubernetes_takes(name: str) -> None:
    found = cluster.resource_name(name)
    assert re.fullmatch(_LABEL, found)
    assert len(found) <= 50


@pytest.mark.parametrize(
    ("name", "found"),
    [("guard", "guard"), ("Guard 2!", "guard-2"), ("2b", "adapter-2b"), ("", "adapter"), ("..", "adapter")],
)
def test_a_name_stays_as_it_is_where_it_can(name: str, found: str) -> None:
    assert cluster.resource_name(name) == found
