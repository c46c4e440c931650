"""Tokenizer classes of causal models that transformers has in Python only: rebuilt with the same ids, or refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from finetune_api.outcome import Reason
from finetune_trainer.data.load_tokenizer import PROBES, agrees, load_fast_tokenizer, rebuild, save_tokenizer
from finetune_trainer.data.tokenizer import ModelTokenizer, load_tokenizer
from finetune_trainer.errors import JobError
from finetune_trainer.storage.model_files import tokenizer_files
from tests.models import smollm2_folder
from tests.real_tokenizers import llama_3, mistral, smollm2
from tests.trainer.data.slow_tokenizers import CORPUS, MAKERS

REBUILT = {
    "BertGenerationTokenizer",
    "GPTSw3Tokenizer",
    "PLBartTokenizer",
    "ProphetNetTokenizer",
    "RoCBertTokenizer",
}
REFUSED = {"BlenderbotSmallTokenizer", "CTRLTokenizer", "GPTNeoXJapaneseTokenizer", "MarianTokenizer"}
WANT_A_PACKAGE = {"BioGptTokenizer": "sacremoses", "CpmAntTokenizer": "jieba", "XLMTokenizer": "sacremoses"}
"""Python implementations that the trainer does not install what they need for, since they would be refused as well."""
OWN_LIBRARY = {"MistralCommonBackend"}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tokenizer of each class, made once."""
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


def test_every_class_without_a_fast_implementation_is_in_the_table() -> None:
    """A new version of transformers may bring another."""
    names = {TOKENIZER_MAPPING_NAMES.get(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    classes = {name: tokenizer_class_from_name(name) for name in names if name is not None}
    python_only = {name for name, kind in classes.items() if kind and not issubclass(kind, PreTrainedTokenizerFast)}
    assert python_only == REBUILT | REFUSED | set(WANT_A_PACKAGE) | OWN_LIBRARY
    assert set(MAKERS) == REBUILT | REFUSED


def test_the_vocabulary_of_every_class_is_fetched() -> None:
    """Whatever its files are called."""
    names = {TOKENIZER_MAPPING_NAMES.get(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    classes = [tokenizer_class_from_name(name) for name in names if name is not None]
    files = {file for kind in classes if kind is not None for file in kind.vocab_files_names.values()}
    assert len(files) > 10
    assert set(tokenizer_files(files)) == files


@pytest.mark.parametrize("name", sorted(REBUILT))
def test_a_rebuilt_tokenizer_gives_the_same_ids(slow: dict[str, Any], tmp_path: Path, name: str) -> None:
    """As a job loads it, and again as it is published: reloaded from what it saves."""
    slow[name].save_pretrained(tmp_path / "slow")
    fast = load_fast_tokenizer(tmp_path / "slow", trust_remote_code=False)
    assert fast.is_fast
    assert agrees(slow[name], fast)
    fast.save_pretrained(tmp_path / "fast")
    assert agrees(slow[name], load_fast_tokenizer(tmp_path / "fast", trust_remote_code=False))
    for attribute in ("eos_token_id", "pad_token_id", "unk_token_id", "bos_token_id"):
        assert getattr(fast, attribute) == getattr(slow[name], attribute)


@pytest.mark.parametrize("name", sorted(REBUILT))
def test_a_rebuilt_tokenizer_gives_the_same_ids_for_any_text(slow: dict[str, Any], name: str) -> None:
    fast: Any = rebuild(slow[name])
    words = [word for text in (*PROBES, *CORPUS) for word in (text, *text.split(" "))]
    letters = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=8)
    texts = st.lists(st.one_of(st.sampled_from(words), letters), max_size=6).map(" ".join)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(texts)
    def same(text: str) -> None:
        ids = [list(one(text, add_special_tokens=False)["input_ids"]) for one in (slow[name], fast)]
        assert ids[0] == ids[1]

    same()


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_rebuilt_is_refused_by_name(slow: dict[str, Any], tmp_path: Path, name: str) -> None:
    slow[name].save_pretrained(tmp_path)
    with pytest.raises(JobError, match=rf"\({name}\) has no fast implementation.*add a tokenizer\.json") as failure:
        load_fast_tokenizer(tmp_path, trust_remote_code=False)
    assert failure.value.reason is Reason.MODEL_UNSUPPORTED
    assert "\n" not in failure.value.message


@pytest.mark.parametrize(("name", "package"), sorted(WANT_A_PACKAGE.items()))
def test_what_wants_a_package_is_refused_by_name(tmp_path: Path, name: str, package: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "vocab.txt").write_text("a")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(JobError, match=rf"{name}.*|{package}.*add a tokenizer\.json") as failure:
        load_fast_tokenizer(tmp_path, trust_remote_code=False)
    assert failure.value.reason is Reason.MODEL_UNSUPPORTED


@pytest.mark.parametrize("name", ["CTRLTokenizer", "BioGptTokenizer"])
def test_a_tokenizer_json_replaces_a_python_implementation(slow: dict[str, Any], tmp_path: Path, name: str) -> None:
    """What the refusal advises helps."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    if name in slow:
        slow[name].save_pretrained(tmp_path)
    shutil.copyfile(smollm2_folder() / "tokenizer.json", tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path, trust_remote_code=False)
    assert tokenizer.ids("Hello world") == load_tokenizer(smollm2_folder(), trust_remote_code=False).ids("Hello world")


def test_mistrals_own_format_alone_is_enough(tmp_path: Path) -> None:
    """Ids of Mistral's library, which the trainer need not have, and its BOS."""
    source = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    shutil.copyfile(source, tmp_path / "tekken.json")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    fast = load_fast_tokenizer(tmp_path, trust_remote_code=False)
    original = AutoTokenizer.from_pretrained(tmp_path)
    assert type(original).__name__ == "MistralCommonBackend"
    for text in PROBES:
        for added in (False, True):
            ids = [list(one(text, add_special_tokens=added)["input_ids"]) for one in (original, fast)]
            assert ids[0] == ids[1]
    tokenizer = load_tokenizer(tmp_path, trust_remote_code=False)
    assert tokenizer.automatic_bos == "<s>"
    assert tokenizer.ids("[INST]</s>") == [3, original.eos_token_id]


def test_a_tokenizer_that_differs_for_one_text_is_not_taken(slow: dict[str, Any]) -> None:
    fast: Any = rebuild(slow["ProphetNetTokenizer"])
    assert not agrees(slow["RoCBertTokenizer"], fast)
    assert agrees(slow["ProphetNetTokenizer"], fast)
    fast.add_tokens(["naïve"])
    assert not agrees(slow["ProphetNetTokenizer"], fast)


@pytest.mark.parametrize("model", [smollm2, llama_3, mistral])
def test_a_saved_tokenizer_names_nothing_that_only_one_version_of_transformers_knows(
    tmp_path: Path, model: Callable[[], ModelTokenizer]
) -> None:
    """Version 4 has no TokenizersBackend and stumbles over a list of extra tokens."""
    tokenizer = copy.deepcopy(model().tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|extra|>"]})
    tokenizer.init_kwargs["local_files_only"] = True
    save_tokenizer(tokenizer, tmp_path)
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|extra|>" in content["additional_special_tokens"]
    assert not {"extra_special_tokens", "local_files_only", "is_local"} & content.keys()
    again = load_fast_tokenizer(tmp_path, trust_remote_code=False)
    assert agrees(tokenizer, again)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.chat_template == tokenizer.chat_template
