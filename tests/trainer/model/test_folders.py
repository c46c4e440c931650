"""Folders that are subtly wrong are refused before a weight is read; odd ones that are whole are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.load import load_config, load_model
from finetune_trainer.model.support import build_skeleton
from finetune_trainer.model.weights import check_names

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
ONES = torch.ones(4)
Change = Callable[[Path], object]


def saved(model: str, config: str, folder: Path, **settings: Any) -> Path:
    """A model of `transformers`' class of that name, with random weights, in `folder`."""
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings)
    getattr(transformers, model)(made).save_pretrained(folder)
    return folder


def llama(folder: Path, **settings: Any) -> Path:
    """A tiny Llama."""
    return saved("LlamaForCausalLM", "LlamaConfig", folder, **SIZES, **settings)


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]) -> None:
    """Rewrite the folder's weights."""
    file = folder / "model.safetensors"
    held = load_file(file)
    save_file(change(held) or held, file, metadata={"format": "pt"})


def configure(folder: Path, **settings: Any) -> None:
    """Rewrite keys of its config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def without(part: str) -> Change:
    """Takes away the weights whose names hold `part`."""
    return lambda folder: tensors(folder, lambda held: {name: held[name] for name in held if part not in name})


def renamed(old: str, new: str) -> Change:
    """Renames weights, as a wrapper's do."""
    return lambda folder: tensors(folder, lambda held: {name.replace(old, new, 1): held[name] for name in held})


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def lose_a_shard(folder: Path) -> None:
    min(sharded(folder).glob("model-0000*")).unlink()


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def whole_numbers(folder: Path) -> None:
    def quantized(held: dict[str, torch.Tensor]) -> None:
        held["model.layers.0.mlp.up_proj.weight"] = held["model.layers.0.mlp.up_proj.weight"].to(torch.int8)

    tensors(folder, quantized)


def both(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def nothing(folder: Path) -> None:
    """Leave it as it is."""


def made(model: str, config: str, **settings: Any) -> Callable[[Path], Path]:
    return lambda folder: saved(model, config, folder, **settings)


BERT = {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
BART = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 2} | {
    "encoder_attention_heads": 2
}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}

WRONG: dict[str, tuple[Callable[[Path], Path], Change, str]] = {
    "a layer without its MLP": (
        llama,
        without("layers.1.mlp"),
        r"lacks 3 of its 21 weights \(model\.layers\.1\.mlp\.down_proj\.weight, .*: the folder is incomplete",
    ),
    "the same as .bin, which only loading can tell": (
        llama,
        both(without("layers.1.mlp"), as_bin),
        r"lacks 3 of its 21 weights .*: the folder is incomplete",
    ),
    "a classifier": (
        made("LlamaForSequenceClassification", "LlamaConfig", **SIZES),
        nothing,
        "holds a LlamaForSequenceClassification, a classifier or reward model",
    ),
    "a classifier that calls itself a language model": (
        made("LlamaForSequenceClassification", "LlamaConfig", **SIZES),
        lambda folder: configure(folder, architectures=["LlamaForCausalLM"]),
        r"lacks 1 of its 21 weights \(lm_head\.weight\): it is a classifier or reward model \(score\.weight",
    ),
    "a headless model": (
        made("LlamaModel", "LlamaConfig", **SIZES),
        nothing,
        r"lacks 1 of its 21 weights \(lm_head\.weight\): it is a headless model",
    ),
    "an encoder": (
        made("BertForMaskedLM", "BertConfig", **BERT),
        nothing,
        r"is an encoder \(bert, is_decoder is false",
    ),
    "an encoder without a head that calls itself a decoder": (
        made("BertModel", "BertConfig", **BERT),
        lambda folder: configure(folder, is_decoder=True),
        r"\(cls\.predictions\..*saved without the output layer",
    ),
    "a classifier made from an encoder": (
        made("BertForSequenceClassification", "BertConfig", **BERT),
        nothing,
        "holds a BertForSequenceClassification",
    ),
    "a wrapper's names": (
        llama,
        renamed("model.", "vlm.language_model."),
        r"lacks 20 of its 21 weights .*has no place for \(vlm\.language_model\..*saved by a model class of other names",
    ),
    "an encoder-decoder": (
        made("T5ForConditionalGeneration", "T5Config", **T5),
        nothing,
        "is a t5 model, an encoder-dec",
    ),
    "an encoder-decoder with one embedding for both": (
        made("BartForConditionalGeneration", "BartConfig", **BART),
        nothing,
        r"lacks 2 of its \d+ weights \(lm_head\.weight, model\.decoder\.embed.*\): it is an encoder-decoder",
    ),
    "a model without text": (
        llama,
        lambda folder: configure(folder, model_type="vit"),
        "is a vit model, no causal language model",
    ),
    "a type of tomorrow": (
        llama,
        lambda folder: configure(folder, model_type="llama9"),
        r"is a llama9 model, which transformers \S+ does not know",
    ),
    "a cut off file": (llama, cut, r"has a model\.safetensors that is cut off \([\d,]+ of [\d,]+ bytes\)"),
    "a Git LFS pointer": (llama, pointer, r"has a Git LFS pointer for model\.safetensors"),
    "a file of another kind": (
        llama,
        lambda folder: (folder / "model.safetensors").write_bytes(b"PK\3\4" + bytes(200)),
        r"has a damaged model\.safetensors",
    ),
    "a missing shard": (llama, lose_a_shard, r"lacks 1 of its \d+ weight files \(model-00001"),
    "a damaged index": (
        llama,
        both(
            lambda folder: (folder / "model.safetensors").rename(folder / "a.safetensors"),
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        ),
        r"has a damaged model\.safetensors\.index\.json",
    ),
    "whole numbers": (llama, whole_numbers, r"holds weights in whole numbers \(model\.layers\.0\.mlp\.up_proj\.weight"),
    "a configuration with other sizes": (
        llama,
        lambda folder: configure(folder, intermediate_size=32),
        r"has weights of other sizes .*\(6; model\.layers\.0\.mlp\.down_proj\.weight is 16 x 24, .* makes it 16 x 32\)",
    ),
    "the same as .bin": (
        llama,
        both(lambda folder: configure(folder, intermediate_size=32), as_bin),
        r"has weights of other sizes .*is 16 x 24, .* makes it 16 x 32\)",
    ),
    "a configuration with more layers": (
        llama,
        lambda folder: configure(folder, num_hidden_layers=3),
        r"lacks 9 of its 30 weights \(model\.layers\.2\..*another model's",
    ),
    "a configuration that fits no model": (
        llama,
        lambda folder: configure(folder, hidden_act="tomorrow"),
        "cannot be made from its config.json",
    ),
}


@pytest.mark.parametrize(("make", "change", "said"), WRONG.values(), ids=WRONG)
def test_a_folder_that_is_subtly_wrong_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], change: Change, said: str
) -> None:
    folder = make(tmp_path / "model")
    change(folder)
    with pytest.raises(JobError, match=said) as caught:
        load_model(folder, dtype=torch.float32, trust_remote_code=False)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
    assert caught.value.message.endswith(".")


@pytest.mark.parametrize(
    "name", [name for name in WRONG if ".bin" not in name and "calls itself" not in name and "type of" not in name]
)
def test_nothing_is_read_of_safetensors_that_are_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    make, change, _ = WRONG[name]
    folder = make(tmp_path / "model")
    change(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(JobError):
        load_model(folder, dtype=torch.float32, trust_remote_code=False)


def duplicate(folder: Path) -> None:
    tensors(folder, lambda held: held | {"model.vision.patch.weight": torch.zeros(2)})


RIGHT: dict[str, tuple[Callable[[Path], Path], Change, list[str]]] = {
    "as saved": (llama, nothing, []),
    "tied": (made("LlamaForCausalLM", "LlamaConfig", **SIZES, tie_word_embeddings=True), nothing, []),
    "headless, but tied": (made("LlamaModel", "LlamaConfig", **SIZES, tie_word_embeddings=True), nothing, []),
    "without the prefix of its base model": (made("GPT2Model", "GPT2Config", **GPT2), nothing, []),
    "as .bin": (llama, as_bin, []),
    "with more than it needs": (
        llama,
        duplicate,
        ["has weights that LlamaForCausalLM has no place for, they are not used (1: model.vision.patch.weight)."],
    ),
    "with old buffers": (
        llama,
        lambda folder: tensors(folder, lambda held: held | {"model.layers.0.self_attn.rotary_emb.inv_freq": ONES}),
        [],
    ),
    "an encoder built as a decoder": (
        made("BertLMHeadModel", "BertConfig", **BERT, is_decoder=True),
        nothing,
        [],
    ),
    "experts that are stored one by one": (
        made("MixtralForCausalLM", "MixtralConfig", **SIZES, num_local_experts=3),
        nothing,
        [],
    ),
}


@pytest.mark.parametrize(("make", "change", "told"), RIGHT.values(), ids=RIGHT)
def test_a_folder_that_is_only_odd_is_loaded(
    tmp_path: Path, make: Callable[[Path], Path], change: Change, told: list[str]
) -> None:
    folder = make(tmp_path / "model")
    change(folder)
    notices: list[str] = []
    load_model(folder, dtype=torch.float32, trust_remote_code=False, notices=notices)
    assert len(notices) == len(told)
    assert all(notice.endswith(end) for notice, end in zip(notices, told, strict=True))


def sharded(folder: Path) -> Path:
    """The folder's weights in files of 8 kB, with their index."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    return folder


def forget(folder: Path, part: str) -> None:
    """Take the weights whose names hold `part` out of the index."""
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if part not in name}
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("make", "part", "said"),
    [
        (llama, "layers.1.mlp", r"lacks 3 of its 21 weights \(model\.layers\.1\.mlp"),
        (llama, "lm_head", "it is a headless model"),
        (llama, "nothing", None),
        (made("MixtralForCausalLM", "MixtralConfig", **SIZES, num_local_experts=3), "nothing", None),
        # Its q, k and v are stored as one and split by their sizes, which an index does not hold.
        (made("HrmTextForCausalLM", "HrmTextConfig", **SIZES), "nothing", None),
    ],
)
def test_the_index_of_the_shards_tells_what_is_missing_before_one_is_there(
    tmp_path: Path, make: Callable[[Path], Path], part: str, said: str | None
) -> None:
    folder = sharded(make(tmp_path / "model"))
    forget(folder, part)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    skeleton = build_skeleton(load_config(folder, trust_remote_code=False), "team/model", trust_remote_code=False)
    if said is None:
        check_names(folder, skeleton, "team/model")
        return
    with pytest.raises(JobError, match=said):
        check_names(folder, skeleton, "team/model")


def test_an_expert_that_is_not_there_is_missed(tmp_path: Path) -> None:
    """Its weights are stacked with the others' while they are loaded."""
    folder = saved("MixtralForCausalLM", "MixtralConfig", tmp_path, **SIZES, num_local_experts=3)
    without("experts.1.")(folder)
    with pytest.raises(JobError, match=r"has weights of other sizes .* is 2 x"):
        load_model(folder, dtype=torch.float32, trust_remote_code=False)
