"""Weights in several files are loaded without a second copy of them in memory.

Files are mapped, and the kernel drops a file's pages when memory is short; what counts against a pod's limit for good
is anonymous memory. Both are bounded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM


def _dense() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6)
    )


def _experts() -> Qwen3MoeForCausalLM:
    """Each expert's matrices lie in the files one by one, and in the model stacked."""
    config = Qwen3MoeConfig(
        vocab_size=8000, hidden_size=512, moe_intermediate_size=512, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, num_experts=24, num_experts_per_tok=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of about 250 MB of bfloat16 weights, all zero, in shards of 50 MB."""
    found = {}
    for name, make in (("dense", _dense), ("experts", _experts)):
        found[name] = tmp_path_factory.mktemp(name)
        with torch.device("meta"):
            model: Any = make()
        model.bfloat16().to_empty(device="cpu")
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data.zero_()
        model.save_pretrained(found[name], max_shard_size="50MB")
        assert len(list(found[name].glob("*.safetensors"))) > 3
    return found


@pytest.mark.parametrize("name", ["dense", "experts"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_little_more_than_the_model(folders: dict[str, Path], name: str, dtype: str) -> None:
    """Anonymous memory stays below 1.3 times the model; with the files' mapped pages, below model and files."""
    script = Path(__file__).with_name("measure_load.py")
    command = [sys.executable, str(script), str(folders[name]), dtype]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    files = sum(path.stat().st_size for path in folders[name].glob("*.safetensors"))
    slack = 40_000_000
    assert result["anonymous"] < 1.3 * result["model"] + slack
    assert result["left"] < 1.1 * result["model"] + slack
    assert result["resident"] < 1.3 * result["model"] + files + slack
    if name == "dense" and dtype == "bfloat16":
        # Nothing to convert: the model is the mapped files.
        assert result["anonymous"] < slack
