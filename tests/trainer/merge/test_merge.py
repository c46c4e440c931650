"""A merged model says what the adapter says on its base, for models of every structure, or there is none."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.merge import merge as module
from finetune_trainer.merge.merge import Merged, merge
from finetune_trainer.storage import write_manifest
from finetune_trainer.storage.manifest import parse_manifest, verify_tree
from tests.architectures.zoo import build
from tests.cli.command import finetune, finetune_json
from tests.hub_server import Hub, Repo
from tests.trainer.merge.adapters import foreign, trained

STRUCTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "untied": ("llama", {"tie_word_embeddings": False}, {}),
    "untied, head and embedding adapted": (
        "llama",
        {"tie_word_embeddings": False},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "transposed weights": ("gpt2", {}, {}),
    "capped logits": ("gemma2", {}, {}),
    "a tower for images": ("gemma3", {}, {}),
    "experts untouched": ("mixtral", {}, {}),
    "experts adapted": ("mixtral", {}, {"experts": True}),
    "experts of another order": ("gpt_oss", {}, {"experts": True}),
    "experts beside dense layers": ("qwen2_moe", {}, {"experts": True}),
    "layers that share weights": ("zamba2", {}, {}),
    "state space": ("mamba", {}, {}),
    "layers that PEFT renames": ("laguna", {}, {}),
    "rank-stabilised, ranks of their own": (
        "llama",
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 16}},
    ),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_models_of_every_structure_are_merged_and_say_the_same(structure: str, tmp_path: Path) -> None:
    kind, changes, keys = STRUCTURES[structure]
    base = build(kind, tmp_path / "base", **changes)
    merged = merge(str(trained(base, tmp_path / "adapter", **keys)), tmp_path / "merged")
    assert merged.difference_from_base > 0.1
    assert merged.difference < 1e-4 * merged.difference_from_base
    assert merged.same_choice == 1
    assert merged.dtype == "float32"
    assert merged.notices == ()
    assert _named_like(tmp_path / "merged", base)


def _named_like(merged: Path, base: Path) -> bool:
    """Whether the weights have the names that the base's have: what else reads such models knows those."""
    found, wanted = (set(load_file(folder / "model.safetensors")) for folder in (merged, base))
    return found <= wanted


TIED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "head, whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("part", TIED)
def test_an_adapter_on_one_of_two_that_share_weights_makes_two_of_them(part: str, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", tie_word_embeddings=True)
    with warnings.catch_warnings():
        # PEFT's, of tied weights.
        warnings.simplefilter("ignore", UserWarning)
        adapter = foreign(base, tmp_path / "adapter", **TIED[part])
    merged = merge(str(adapter), tmp_path / "merged")
    assert merged.difference < 1e-4 * merged.difference_from_base
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= load_file(tmp_path / "merged/model.safetensors").keys()


def test_an_adapter_on_weights_that_several_layers_share_is_refused(tmp_path: Path) -> None:
    base = build("zamba2", tmp_path / "base")
    adapter = foreign(base, tmp_path / "adapter", target_modules=r".*shared_transformer\.self_attn\.q_proj")
    _refused(adapter, tmp_path / "merged", Reason.MODEL_UNSUPPORTED, "no model folder can keep them apart")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_gives_a_model_of_its_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    base = _cast(build("llama", tmp_path / "base"), dtype)
    merged = merge(str(trained(base, tmp_path / "adapter")), tmp_path / "merged")
    assert merged.dtype == str(dtype).removeprefix("torch.")
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged/model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == merged.dtype
    assert 0 < merged.difference < 0.1 * merged.difference_from_base


def test_weights_that_the_base_has_in_another_precision_keep_it(tmp_path: Path) -> None:
    base = _cast(build("llama", tmp_path / "base"), torch.bfloat16, but="norm")
    merge(str(trained(base, tmp_path / "adapter")), tmp_path / "merged")
    found = load_file(tmp_path / "merged/model.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: torch.float32 if "norm" in name else torch.bfloat16 for name in found
    }


def test_a_precision_that_would_round_the_adapter_away_is_refused_and_another_may_be_asked_for(tmp_path: Path) -> None:
    base = _cast(build("llama", tmp_path / "base"), torch.bfloat16)
    adapter = trained(base, tmp_path / "adapter", scale=1e-4)
    _refused(adapter, tmp_path / "merged", Reason.ADAPTER_UNPROVEN, "too coarse .* --dtype float32")
    merged = merge(str(adapter), tmp_path / "merged", dtype=torch.float32)
    assert merged.dtype == "float32"


def _cast(base: Path, dtype: torch.dtype, *, but: str = "nothing") -> Path:
    file = base / "model.safetensors"
    tensors = {name: tensor if but in name else tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return base


def test_weights_in_eight_bits_are_dequantized_and_that_is_said(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter")
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
        else:
            tensors[name] = tensor
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    _configure(base, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    merged = merge(str(adapter), tmp_path / "merged")
    assert "is quantized (fp8): its weights were dequantized" in merged.notices[0]
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_weights_that_nobody_dequantizes_are_refused(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter")
    _configure(base, quantization_config={"quant_method": "gptq", "bits": 4})
    _refused(adapter, tmp_path / "merged", Reason.MODEL_UNSUPPORTED, r"is quantized \(gptq\).* \(--base-model\)")


def _configure(base: Path, **keys: object) -> None:
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(content | keys))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """An adapter and its base."""
    return trained(build("llama", tmp_path / "base"), tmp_path / "adapter")


def test_the_folder_has_the_adapters_text_and_stops_and_a_manifest_of_it_all(small: Path, tmp_path: Path) -> None:
    for name, text in {
        "generation_config.json": json.dumps({"eos_token_id": [2, 3]}),
        "prompt_format.yaml": "prompt_format: {user: '{instruction}'}\n",
        "README.md": "---\nbase_model: owner/name\nlicense: apache-2.0\n---\n# guard\n",
    }.items():
        (small / name).write_text(text)
    for path in (tmp_path / "base").glob("token*"):
        (small / path.name).write_bytes(path.read_bytes())
    (small / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    manifest = write_manifest(small, {"run": {"job": "tiny"}})
    merge(str(small), tmp_path / "merged")
    folder = tmp_path / "merged"
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [2, 3]}
    assert (folder / "chat_template.jinja").read_text() == "{{ messages[0].content }}!"
    assert (folder / "prompt_format.yaml").read_bytes() == (small / "prompt_format.yaml").read_bytes()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: owner/name\nbase_model_relation: finetune\nlibrary_name: transformers\n")
    assert "license: apache-2.0\n" in card
    assert "# guard\n" in card
    assert str(tmp_path) not in card
    written = parse_manifest((folder / "manifest.json").read_bytes(), "manifest")
    verify_tree(folder, written, "merged")
    assert written.files.keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert written.details["adapter"] == manifest.sha256()
    assert written.details["run"] == {"job": "tiny"}
    config = json.loads((folder / "config.json").read_text())
    assert config.get("use_cache", True) is True
    assert not list(folder.glob("adapter*"))


def test_golden_prompts_of_the_adapter_are_what_is_compared_on(small: Path, tmp_path: Path) -> None:
    rows = [{"prompt_ids": [4, 5, 6, number], "ids": [2]} for number in range(7, 9)]
    (small / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert merge(str(small), tmp_path / "merged").prompts == 3


@pytest.mark.parametrize("golden", ["no JSON", '{"prompt_ids": "text"}', '["a list"]', '{"prompt_ids": [99999999]}'])
def test_golden_prompts_that_are_none_are_not_needed(small: Path, golden: str, tmp_path: Path) -> None:
    (small / "golden.jsonl").write_text(golden)
    assert merge(str(small), tmp_path / "merged").prompts >= 1


REFUSALS: dict[str, tuple[Callable[[Path], object], Reason, str]] = {
    "no adapter": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        Reason.MODEL_NOT_FOUND,
        "name an adapter's folder",
    ),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), Reason.INVALID_SPEC, "does not fit"),
    "no JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        Reason.INVALID_SPEC,
        "cannot be read: copy the adapter again",
    ),
    "another kind": (lambda folder: _set(folder, peft_type="IA3"), Reason.INVALID_SPEC, r"peft_type: IA3"),
    "no base": (lambda folder: _set(folder, base_model_name_or_path=None), Reason.MODEL_NOT_FOUND, "--base-model"),
    "a wrong rank": (lambda folder: _set(folder, r=3), Reason.INVALID_SPEC, "does not fit"),
    "a layer too many": (
        lambda folder: _set(folder, target_modules=["q_proj", "v_proj"]),
        Reason.INVALID_SPEC,
        "in the file and not in the model",
    ),
    "behind tokens only": (
        lambda folder: _set(folder, alora_invocation_tokens=[1]),
        Reason.INVALID_SPEC,
        "certain tok",
    ),
    "not what its manifest says": (
        lambda folder: [write_manifest(folder), _set(folder, lora_alpha=1)],
        Reason.STORAGE_NOT_FOUND,
        "differs from its manifest",
    ),
    "not finite": (lambda folder: _break(folder), Reason.INVALID_SPEC, "no numbers"),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_what_cannot_be_merged_is_refused_in_a_sentence_and_leaves_nothing(
    fault: str, small: Path, tmp_path: Path
) -> None:
    damage, reason, sentence = REFUSALS[fault]
    damage(small)
    _refused(small, tmp_path / "merged", reason, sentence)


def _set(folder: Path, **keys: object) -> Path:
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | keys))
    return folder


def _break(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(torch.inf)
    save_file(tensors, file)


def _refused(adapter: Path, target: Path, reason: Reason, sentence: str) -> None:
    with pytest.raises(JobError, match=sentence) as caught:
        merge(str(adapter), target)
    assert caught.value.reason is reason
    assert "\n" not in caught.value.message
    assert not list(target.parent.glob("*merged*"))


FAULTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "folding goes wrong": (
        "fold",
        lambda fold: lambda model, name: _shifted(fold(model, name)),
        "merged, its logits differ by up to",
    ),
    "writing goes wrong": (
        "write_weights",
        lambda write: lambda model, *others: write(_shifted((model, []))[0], *others),
        "merged and reopened, its logits differ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_says_something_else_is_not_kept(
    fault: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, broken, sentence = FAULTS[fault]
    monkeypatch.setattr(module, name, broken(getattr(module, name)))
    _refused(small, tmp_path / "merged", Reason.ADAPTER_UNPROVEN, sentence)


def _shift(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.05


def _shifted(folded: tuple[Any, list[str]]) -> tuple[Any, list[str]]:
    _shift(folded[0])
    return folded


def test_a_model_whose_file_cannot_be_opened_again_is_not_kept(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer.merge.folder import write_weights

    def lossy(model: Any, folder: Path, *others: Any) -> None:
        write_weights(model, folder, *others)
        tensors = load_file(folder / "model.safetensors")
        tensors.popitem()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "write_weights", lossy)
    _refused(small, tmp_path / "merged", Reason.ADAPTER_UNPROVEN, "does not open it as it was written")


def test_an_adapter_that_does_nothing_is_merged_and_that_is_said(tmp_path: Path) -> None:
    adapter = trained(build("llama", tmp_path / "base"), tmp_path / "adapter", scale=0.0)
    (notice,) = merge(str(adapter), tmp_path / "merged").notices
    assert "changes no logit" in notice


def test_large_models_are_written_in_shards(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.merge.folder._SHARD", "200KB")
    merge(str(small), tmp_path / "merged")
    files = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(files) > 2
    with safe_open(files[0], framework="pt") as opened:
        assert list(opened.keys())


def test_a_folder_in_use_is_left_alone(small: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").write_text("mine")
    with pytest.raises(JobError, match="exists already") as caught:
        merge(str(small), tmp_path / "merged")
    assert caught.value.reason is Reason.OUTPUT_CONFLICT
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine"]


def test_the_command_takes_a_jobs_folder_and_another_base_and_answers_in_json(small: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    small.rename(job / "adapter")
    _set(job / "adapter", base_model_name_or_path="owner/name")
    base = str(tmp_path / "base")
    found = finetune_json("merge", str(job), "--output", str(tmp_path / "merged"), "--base-model", base)
    assert found["folder"] == str(tmp_path / "merged")
    assert found["dtype"] == "float32"
    assert found["compared"]["difference"] < 1e-3
    again = finetune("merge", str(job), "--output", str(tmp_path / "merged"), "--base-model", base)
    assert again.exit_code == 23
    assert "exists already" in again.stderr


def test_an_adapter_is_read_from_the_hub_and_nothing_is_written_there(small: Path, tmp_path: Path, hub: Hub) -> None:
    files = {path.name: path.read_bytes() for path in small.iterdir()}
    hub.repos["owner/guard"] = Repo({**files, "merged/model.safetensors": b"large", ".gitattributes": b""})
    assert merge("hf://owner/guard", tmp_path / "merged").difference < 1e-3
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}
    assert "merged/model.safetensors" not in hub.downloads()


def test_the_command_says_what_was_compared(small: Path, tmp_path: Path) -> None:
    result = finetune("merge", str(small), "--output", str(tmp_path / "merged"), "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert "its logits differ by up to" in result.stdout
    assert f"bfloat16: {tmp_path / 'merged'}" in result.stdout


def test_what_was_merged_can_be_described() -> None:
    merged = Merged(Path("m"), "base", "float32", 1, "0", 4, 1e-6, 2.0, 1.0, ())
    assert merged.sentence().startswith("On 4 prompts its logits differ by up to 1e-06")
