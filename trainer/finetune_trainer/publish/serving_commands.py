"""Commands and snippets that serve an adapter as it was trained, complete as they are printed.

Whatever comes from the adapter's folder is quoted for where it goes: the shell, JSON or Python.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_trainer.publish.serving_facts import QUESTION, TEMPLATE, ServingFacts

BASE_PLACEHOLDER = "BASE_MODEL"
SERVER = "http://localhost:8000"
"""Where `vllm serve` listens."""

_MESSAGES = [{"role": "user", "content": QUESTION}]
_LONGEST_ANSWER = 256
_QUANTIZED = {
    "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
    "int8": "load_in_8bit=True",
}
"""What transformers has to be told to quantize the base model as it was for training."""


def vllm_command(facts: ServingFacts, place: str) -> str:
    """The server of this adapter alone, with its template and its stops.

    Args:
        facts: the adapter's.
        place: its folder.
    """
    own = [["--chat-template", f"{place}/{TEMPLATE}"], ["--generation-config", place]]
    return _shell(_vllm(facts, place) + own)


def vllm_shared_command(facts: ServingFacts, place: str) -> str:
    """A server of several adapters, whose requests bring their template and their stops."""
    return _shell([*_vllm(facts, place), ["--trust-request-chat-template"]])


def chat_request(facts: ServingFacts, *, model: str | None = None, **more: Any) -> str:
    """A request to /v1/chat/completions.

    Args:
        facts: the adapter's.
        model: what the server calls it, if not by its name.
        more: further keys of the request.
    """
    body = {"model": model or facts.name, "messages": _MESSAGES, "temperature": 0, **_stop(facts), **more}
    return _curl("/v1/chat/completions", body)


def completions_request(facts: ServingFacts) -> str | None:
    """A request to /v1/completions with the rendered prompt; None where only the template can render it."""
    prompt = facts.example_prompt
    if prompt is None:
        return None
    body = {"model": facts.name, "prompt": prompt, "add_special_tokens": False, "temperature": 0, **_stop(facts)}
    return _curl("/v1/completions", {**body, "max_tokens": _LONGEST_ANSWER})


def client_snippet(facts: ServingFacts, place: str) -> str:
    """A request that brings the adapter's template and stops, with OpenAI's client."""
    stops = f"    stop={_listed(facts.stop_texts)},\n" if facts.stop_texts else ""
    return f"""\
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url="{SERVER}/v1", api_key="none")
answer = client.chat.completions.create(
    model={_literal(facts.name)},
    messages={json.dumps(_MESSAGES)},
    temperature=0,
{stops}    extra_body={{
        "chat_template": Path({_literal(f"{place}/{TEMPLATE}")}).read_text(encoding="utf-8"),
        "stop_token_ids": {list(facts.stop_ids)!r},
    }},
)
print(answer.choices[0].message.content)
"""


def transformers_snippet(facts: ServingFacts, place: str) -> str:
    """One answer with Transformers and PEFT."""
    revision = f", revision={_literal(facts.revision)}" if facts.base and facts.revision else ""
    stops = f"    stop_strings={_listed(facts.stop_texts)},\n" if facts.stop_texts else ""
    options = _QUANTIZED.get(facts.quantization or "")
    if options and facts.left_out:
        options += f", llm_int8_skip_modules={_listed(facts.left_out)}"
    given = f", quantization_config=BitsAndBytesConfig({options})" if options else ""
    imported = (
        "AutoModelForCausalLM, AutoTokenizer, " + ("BitsAndBytesConfig, " if options else "") + "GenerationConfig"
    )
    return f"""\
from peft import PeftModel
from transformers import {imported}

adapter = {_literal(place)}
tokenizer = AutoTokenizer.from_pretrained(adapter)
base = AutoModelForCausalLM.from_pretrained({_literal(facts.base or BASE_PLACEHOLDER)}{revision}, dtype="auto"{given})
model = PeftModel.from_pretrained(base, adapter).eval()
generation = GenerationConfig.from_pretrained(adapter)

messages = {json.dumps(_MESSAGES)}
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(
    **inputs.to(model.device),
    generation_config=generation,
    tokenizer=tokenizer,
{stops}    do_sample=False,
    max_new_tokens={_LONGEST_ANSWER},
)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def lora_module(name: str, place: str, *, experts: bool = False) -> str:
    """An adapter as vLLM's --lora-modules takes it: NAME=PATH, or JSON where that would be read otherwise.

    Args:
        name: the adapter's.
        place: its folder.
        experts: whether it changes experts, of which vLLM has to be told.
    """
    if name and not experts and not set("=,") & {*name, *place}:
        return f"{name}={place}"
    # A comma makes vLLM read JSON.
    return json.dumps({"name": name, "path": place} | ({"is_3d_lora_weight": True} if experts else {}))


def _vllm(facts: ServingFacts, place: str) -> list[list[str]]:
    """A line of the command each."""
    revision = ["--revision", facts.revision] if facts.base and facts.revision else []
    in_4bit = [["--quantization", "bitsandbytes"]] if facts.quantization == "nf4" else []
    rank = ["--max-lora-rank", str(facts.server_rank or facts.rank)]
    return [
        ["vllm", "serve", facts.base or BASE_PLACEHOLDER, *revision],
        *in_4bit,
        ["--enable-lora", *rank, *(["--enable-mixed-moe-lora-format"] if facts.experts else [])],
        ["--lora-modules", lora_module(facts.name, place, experts=facts.experts)],
    ]


def _literal(text: str) -> str:
    """`text` in Python, between double quotation marks where it has none."""
    single = repr(text)
    return single if '"' in single else f'"{single[1:-1]}"'


def _listed(texts: Sequence[str]) -> str:
    return f"[{', '.join(map(_literal, texts))}]"


def _stop(facts: ServingFacts) -> dict[str, Any]:
    return {"stop": list(facts.stop_texts)} if facts.stop_texts else {}


def _curl(path: str, body: Mapping[str, Any]) -> str:
    return _shell([["curl", SERVER + path], ["-H", "Content-Type: application/json"], ["-d", json.dumps(body)]])


def _shell(lines: Sequence[Sequence[str]]) -> str:
    return " \\\n  ".join(shlex.join(line) for line in lines)
