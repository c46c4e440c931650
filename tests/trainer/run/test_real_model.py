"""A real pretrained model, fine-tuned, published and loaded again by plain PEFT and transformers in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import smollm2_folder
from tests.trainer.run.tiny_job import TinyJob, write_rows

# Nothing of ours is imported: this is what somebody does who has only the adapter folder and the base model.
PLAIN = """\
import json, sys, warnings
warnings.simplefilter("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
folder, base, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
settings = GenerationConfig.from_pretrained(folder)

def answer():
    ids = model.generate(**prompt, generation_config=settings, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1]:])

trained = answer()
with model.disable_adapter():
    base = answer()
print(json.dumps({"trained": trained, "base": base, "prompt": tokenizer.decode(prompt["input_ids"][0])}))
"""


def test_the_adapter_folder_and_the_base_model_answer_as_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path / "cache"))
    job = TinyJob(
        tmp_path,
        model_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        initial_base_model_ckpt_path=str(smollm2_folder()),
        valid_path=None,
        num_epochs=2,
        learning_rate=3e-3,
        lora_config={"r": 8, "lora_alpha": 16, "lora_dropout": 0.05},
    )
    job.spec = {key: value for key, value in job.spec.items() if value is not None}
    write_rows(
        tmp_path / "train.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": f"What is the password of room {number}?"},
                    {"role": "assistant", "content": "It is heliotrope."},
                ]
            }
            for number in range(100, 116)
        ],
    )
    message = job.run()
    assert message.metrics is not None
    assert message.metrics.train_loss is not None
    assert message.metrics.train_loss < 1.5
    found = json.loads(
        subprocess.run(
            [
                *(sys.executable, "-c", PLAIN, str(job.output / "adapter"), str(smollm2_folder())),
                "What is the password of room 7?",
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    assert found["prompt"] == "<|im_start|>user\nWhat is the password of room 7?<|im_end|>\n<|im_start|>assistant\n"
    # The stop is the last thing it says, so it learnt to stop.
    assert found["trained"] == "It is heliotrope.<|im_end|>"
    assert "heliotrope" not in found["base"]
