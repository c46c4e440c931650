"""Adapters load where servers and notebooks still have transformers 4: tokenizer, template, stops and configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.environment import FIND_UV
from tests.trainer.run.tiny_job import TinyJob

PINS = ("transformers==4.57.1", "tokenizers==0.22.2", "huggingface-hub==0.36.2")
MESSAGES = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "Sure?"},
]
LOAD = """
import json, sys, warnings
warnings.filterwarnings("error", category=UserWarning)
import transformers
from peft import PeftConfig
folder, messages = sys.argv[1], json.loads(sys.argv[2])
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
print(json.dumps({
    "version": transformers.__version__,
    "ids": tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"],
    "eos": transformers.GenerationConfig.from_pretrained(folder).eos_token_id,
    "r": PeftConfig.from_pretrained(folder).r,
}))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers 4 that goes before the environment's own."""
    folder = tmp_path_factory.mktemp("transformers-4")
    uv = subprocess.run([FIND_UV], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(
        [uv, "pip", "install", "-q", "--python", sys.executable, "--no-deps", "--target", folder, *PINS], check=True
    )
    return folder


def loaded(adapter: Path, before: Path | None) -> dict[str, object]:
    environment = os.environ | ({"PYTHONPATH": str(before)} if before else {})
    command = [sys.executable, "-c", LOAD, str(adapter), json.dumps(MESSAGES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("own_template", [False, True])
def test_both_generations_read_the_same_from_an_adapter(older: Path, tmp_path: Path, own_template: bool) -> None:
    job = TinyJob(tmp_path, num_epochs=1)
    if own_template:
        job.spec["generation_config"] = {"prompt_format": {"use_hugging_face_chat_template": True}}
    assert job.run().succeeded
    now, then = loaded(job.output / "adapter", None), loaded(job.output / "adapter", older)
    assert str(then.pop("version")).startswith("4.57")
    assert str(now.pop("version")).startswith("5.")
    assert then == now
