"""What a real vLLM does not do with an adapter, each with the server's own answer: what our warnings rest on."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_api.rules_lora import VLLM_RANKS
from tests.serving.adapters import MAX_TOKENS, Adapter
from tests.serving.cases import BARELY_TRAINED, ELSEWHERE, MIXTRAL_EXPERTS, called
from tests.serving.environment import program
from tests.serving.results import Results
from tests.serving.served import ENVIRONMENT, LOADING, Reply, Served, Servers, command
from tests.serving.server import Server


@dataclass(frozen=True)
class Plain:
    """A server with nothing but `--enable-lora` and an adapter."""

    server: Server
    adapter: Adapter
    others: dict[str, Adapter]

    def load(self, name: str) -> tuple[int, str]:
        """Status and words of the server when it is asked to load another adapter."""
        return load(self.server, self.others[name])


def load(server: Server, adapter: Adapter) -> tuple[int, str]:
    """Status and words of `server` when it is asked to load `adapter`, as PEFT's own."""
    response = server.post("/v1/load_lora_adapter", {"lora_name": "asked", "lora_path": str(adapter.path)})
    return response.status_code, said(response.text if response.is_success else response.json()["error"]["message"])


def said(words: str) -> str:
    """The server's words without what differs from run to run: folders, and the order of sets."""
    plain = re.sub(r"/\S+/adapter\b", "ADAPTER_DIR", " ".join(words.split()))
    return re.sub(r"\{([^{}]*)\}", lambda found: f"{{{', '.join(sorted(found[1].split(', ')))}}}", plain)


@pytest.fixture(scope="module")
def plain(servers: Servers) -> Plain:
    """That server, on Qwen2 with Llama 3's tokenizer, and adapters that it does not know yet."""
    adapter = servers.trained(ELSEWHERE)
    others = {case.name: servers.trained(case) for case in BARELY_TRAINED}
    words = ["serve", str(adapter.base), "--enable-lora", "--lora-modules", f"{adapter.case.name}={adapter.path}"]
    return Plain(servers.alone(words, "plain", **LOADING), adapter, others)


def test_the_legal_ranks_are_the_ones_we_advise(tmp_path: Path, results: Results) -> None:
    words = [str(program()), "serve", str(tmp_path), "--enable-lora", "--max-lora-rank", "24"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    sentence = done.stderr.strip().splitlines()[-1]
    legal = re.search(r"choose from ([\d, ]+)", sentence)
    assert legal is not None, done.stderr[-2000:]
    assert tuple(map(int, legal[1].split(","))) == VLLM_RANKS
    results.words["`--max-lora-rank 24`"] = sentence


def test_a_rank_above_the_servers_is_refused(plain: Plain, results: Results) -> None:
    status, words = plain.load("rank-24")
    assert status >= 400
    assert "LoRA rank 24 is greater than max_lora_rank 16" in words
    results.words["an adapter of rank 24 where `--max-lora-rank` is 16"] = words


def test_adapters_of_embeddings_are_refused_on_qwen2(plain: Plain, results: Results) -> None:
    status, words = plain.load("embeddings")
    assert status >= 400
    assert "embed_tokens" in words
    results.words["`embed_tokens` on Qwen2"] = words


def test_an_adapter_of_another_base_model_is_accepted_without_a_word(plain: Plain, results: Results) -> None:
    status, words = plain.load("another-base")
    assert (status, words) == (200, "Success: LoRA adapter 'asked' added successfully.")
    results.words["an adapter that was trained on another base model"] = words


def ask(plain: Plain, **options: Any) -> Reply:
    ids = plain.adapter.previewed[0]["inference_ids"]
    return Reply.of(plain.server.complete(plain.adapter.case.name, ids, max_tokens=MAX_TOKENS, **options))


def test_a_stop_that_is_not_the_base_models_is_run_over_without_generation_config(
    plain: Plain, results: Results
) -> None:
    stops = plain.adapter.stops["eos_token_id"]
    alone, told = ask(plain), ask(plain, stop_token_ids=stops)
    assert (alone.finish_reason, told.finish_reason) == ("length", "stop")
    assert set(stops) & set(alone.ids)
    assert alone.ids[: len(told.ids)] == told.ids
    results.words["the trained stop, without `--generation-config ADAPTER_DIR`"] = (
        "the answer runs on to `max_tokens`; `stop_token_ids` in the request end it"
    )


def test_a_chat_needs_the_template_from_the_command_line(plain: Plain, results: Results) -> None:
    body: dict[str, Any] = {"model": plain.adapter.case.name, "messages": [{"role": "user", "content": "Hello"}]}
    for what, extra in {
        "chat where neither base model nor command line has a template": {},
        "a template in the request without `--trust-request-chat-template`": {
            "chat_template": plain.adapter.template_file.read_text()
        },
    }.items():
        response = plain.server.post("/v1/chat/completions", body | extra)
        assert response.status_code == 400, response.text
        results.words[what] = said(response.json()["error"]["message"])


@pytest.mark.parametrize("served", called("llama-3", "mistral"), ids=lambda case: case.name, indirect=True)
def test_text_gets_a_second_bos_unless_special_tokens_are_declined(served: Served, results: Results) -> None:
    prompt = served.adapter.previewed[0]
    reply = served.complete(prompt["inference_prompt"])
    assert reply.prompt_ids == [prompt["inference_ids"][0], *prompt["inference_ids"]]
    results.words["text in `/v1/completions` without `add_special_tokens: false`"] = (
        "the prompt begins with two BOS where the tokenizer adds one"
    )


@pytest.mark.parametrize("served", called("own-template", "inst"), ids=lambda case: case.name, indirect=True)
def test_without_a_template_in_the_request_it_is_the_servers(served: Served, results: Results) -> None:
    template = served.adapter.template_file.read_text()
    with_ours, without = (
        served.server.chat(served.name, [{"role": "user", "content": "Hello"}], max_tokens=1, **extra)
        for extra in ({"chat_template": template}, {})
    )
    alike = with_ours["prompt_token_ids"] == without["prompt_token_ids"]
    assert alike == served.leads
    results.words["chat with the second adapter of a server, without `chat_template` in the request"] = (
        "the prompt is made by the server's one template, in silence"
    )


@pytest.mark.parametrize("served", called("mixture-experts"), ids=lambda case: case.name, indirect=True)
def test_adapters_of_experts_need_to_be_called_that(served: Served, results: Results) -> None:
    status, words = load(served.server, served.adapter)
    assert status >= 400
    assert "is_3d_lora_weight" in words
    results.words["an adapter of experts, named to the server without `is_3d_lora_weight: true`"] = words
    assert served.replies


def test_the_experts_of_mixtrals_adapters_are_left_aside_without_a_word(servers: Servers, results: Results) -> None:
    adapter = servers.trained(MIXTRAL_EXPERTS)
    prompts = [row["inference_ids"] for row in adapter.previewed]
    server = servers.alone(command([adapter]), "mixtral", **ENVIRONMENT["mixtral"])
    found = [Reply.of(server.complete(adapter.case.name, ids, max_tokens=MAX_TOKENS)).ids for ids in prompts]
    assert found == adapter.peft_answers(prompts, without=".experts.")
    assert found != adapter.peft_answers(prompts)
    results.words["an adapter of Mixtral's experts"] = (
        "it is loaded, and answers as if its part in the experts were not there"
    )
