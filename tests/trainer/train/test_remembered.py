"""What was measured of a case is not measured again in the very same one, and is in any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from finetune_api.outcome import BatchLayout
from finetune_trainer.model.adapted_model import AdaptedModel
from finetune_trainer.model.packed_attention import PackingRefusedError
from finetune_trainer.train import choice as choices
from finetune_trainer.train import remembered
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.choice import Choice
from finetune_trainer.train.collective import Ranks
from finetune_trainer.train.gate import Gate
from finetune_trainer.train.remembered import Remembered, name_of
from tests.trainer.run.tiny_job import TinyJob
from tests.trainer.train.test_gate import INDEXED, LATENT, LINEAR, MIXTURE, outcome, ready, rows, tiny

CPU = torch.device("cpu")
BATCHING = Batching(BatchLayout.SHARED_PREFIX, tokens_per_pack=0, rows_per_batch=2, pad_id=0)
ROWS = rows(31, 45, 60)


def choose(folder: Path, model: Any, *, case: Any = "a", found: Any = ROWS, bound: int | None = None) -> Choice:
    known = Remembered(folder, {"case": case}, found, [name_of(CPU)])
    return choices.choose(
        model, Ranks(), found, BATCHING, checkpointing=None, longest=200, bound=bound, remembered=known
    )


def test_the_same_case_is_trained_as_before_without_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_model = ready(tiny("Llama", dropout=0.0))
    first = choose(tmp_path, first_model)
    second_model = ready(tiny("Llama", dropout=0.0))
    with monkeypatch.context() as patch:
        for name in ("loss", "backward", "logits"):
            patch.setattr(second_model, name, None)
        second = choose(tmp_path, second_model)
    assert second.batching == first.batching
    assert second.verdict.layout is BatchLayout.SHARED_PREFIX
    assert second.verdict.gradient_difference == first.verdict.gradient_difference
    assert second.sentence().endswith("of their size; in an earlier run).")
    batches = [model.batching.batches(ROWS) for model in (first, second)]
    (loss, gradient), (again, same) = outcome(first_model, batches[0]), outcome(second_model, batches[1])
    assert again == loss
    assert torch.equal(same, gradient)


@pytest.mark.parametrize("other", ["case", "rows", "trained", "bound", "code", "versions", "device", "damaged", "kind"])
def test_any_other_case_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    choose(tmp_path, ready(tiny("Llama", dropout=0.0)))
    (kept,) = tmp_path.iterdir()
    more: dict[str, Any] = {}
    if other == "case":
        more["case"] = "b"
    elif other == "rows":
        more["found"] = rows(31, 45, 61)
    elif other == "trained":
        more["found"] = [[(ids, trained | True)] for ((ids, trained),) in ROWS]
    elif other == "bound":
        more["bound"] = 256
    elif other == "code":
        monkeypatch.setattr(remembered, "_code", lambda: "another version")
    elif other == "versions":
        monkeypatch.setattr(remembered, "version", lambda _name: "99")
    elif other == "device":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another processor")
    elif other == "damaged":
        kept.write_text(kept.read_text()[:20])
    else:
        kept.write_text('{"kept_bytes_per_token": "many"}')
    found = choose(tmp_path, ready(tiny("Llama", dropout=0.0)), **more)
    assert not found.verdict.earlier
    assert found.verdict.seconds > 0


@pytest.mark.filterwarnings("ignore")  # the architecture has its own
def test_what_is_not_simple_is_measured_each_time(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_experts": 2, "dropout": 0.0, **MIXTURE, **LINEAR}
    model = ready(tiny("Qwen3Next", **settings))
    assert choose(tmp_path, model).verdict.rows_apart
    assert not list(tmp_path.iterdir())


def test_rows_that_have_to_be_computed_one_by_one_are_so_whatever_is_remembered(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dropout": 0.0, "num_key_value_heads": 4, **LATENT, **INDEXED}
    settings |= {"index_topk": 300, "index_n_heads": 2}
    assert choose(tmp_path, ready(tiny("DeepseekV32", **settings))).verdict.layout is BatchLayout.SHARED_PREFIX
    known = Remembered(tmp_path, {"case": "a"}, ROWS, [name_of(CPU)])
    model = ready(tiny("DeepseekV32", **settings))
    found = choices.choose(model, Ranks(), ROWS, BATCHING, checkpointing=None, longest=2500, remembered=known)
    assert found.verdict.layout is BatchLayout.SINGLE_ROWS


def test_packs_that_are_refused_all_the_same_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(tmp_path, ready(tiny("Llama", dropout=0.0)))

    def refused(_: Any) -> None:
        raise PackingRefusedError("it has changed")

    monkeypatch.setattr(AdaptedModel, "take_packs", refused)
    found = choose(tmp_path, ready(tiny("Llama", dropout=0.0)))
    assert found.verdict.layout is BatchLayout.PADDED
    assert not found.verdict.earlier


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = choose(tmp_path / "file" / "measured", ready(tiny("Llama", dropout=0.0)))
    assert found.verdict.layout is BatchLayout.SHARED_PREFIX


def test_a_job_that_runs_again_trains_the_same_without_asking_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE_DIR", str(tmp_path / "cache"))
    first = TinyJob(tmp_path / "first")
    assert first.run().succeeded
    gate = Mock(side_effect=Gate.choose)
    # As a method: a mock is given no self.
    monkeypatch.setattr(Gate, "choose", lambda *args: gate(*args))
    again = TinyJob(tmp_path / "again", train_path=first.spec["train_path"], valid_path=first.spec["valid_path"])
    assert again.run().succeeded
    gate.assert_not_called()
    assert again.losses() == first.losses()
    assert again.eval_losses() == first.eval_losses()
    # Another rank of the adapter is another case.
    other = TinyJob(
        tmp_path / "other",
        train_path=first.spec["train_path"],
        valid_path=first.spec["valid_path"],
        lora_config={**first.spec["lora_config"], "r": 2},
    )
    assert other.run().succeeded
    gate.assert_called_once()
