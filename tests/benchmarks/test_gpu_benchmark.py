"""The GPU benchmark's logic, on the CPU: every figure is in the report, and those that can be reckoned are right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.gpu import first_contact as module
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.clock import Stage, TimedStep, stages
from benchmarks.gpu.contact_checks import Finding
from benchmarks.gpu.devices import Memory, NotMeasurableError, chosen_device, peak_tflops
from benchmarks.gpu.figures import Parameters, Work, parameters_of, work_of
from benchmarks.gpu.first_contact import CHECKS, first_contact
from benchmarks.gpu.job import RepeatedPlan
from benchmarks.gpu.report import Case, case_markdown
from finetune_api.outcome import BatchLayout
from finetune_trainer.model.batch import TokenPair
from finetune_trainer.train.batching import Batching
from finetune_trainer.train.choice import Choice
from finetune_trainer.train.gate import Verdict
from finetune_trainer.train.plan import TrainingPlan
from finetune_trainer.train.steps import StepBatches

TINY = ["--device", "cpu", "--random", "2,64,128,4,2,49152", "--shapes", "short", "--rows", "8", "--warm-up", "1"]

PACKED = Batching(BatchLayout.SHARED_PREFIX, tokens_per_pack=64, rows_per_batch=2, pad_id=0)


def _cells(report: str, row: str) -> list[str]:
    (line,) = [line for line in report.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_command_reports_every_figure_of_both_layouts_and_of_the_kernels(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--steps", "2", "--compare", "padded", "--kernels", "--peak-tflops", "1"]

    assert main([*TINY, *options]) == 0

    report = capsys.readouterr().out
    assert "Device: **CPU" in report
    assert "Peak: 1 TFLOP/s" in report
    assert "Layout: SharedPrefix" in report
    assert re.search(r"The gate took [\d.]+ s", report)
    for layout in ("ours", "padded"):
        seconds, real, computed, mfu, effective, allocated, *_ = _cells(report, layout)
        assert all(len(figures.split(" / ")) == 3 for figures in (seconds, real, computed))
        assert mfu.endswith("%")
        assert effective.endswith("%")
        assert allocated == "–"
    assert re.search(r"Padded takes [\d.]+ / [\d.]+ / [\d.]+ times as long", report)
    assert "The kernels agree to 0.0001" in report
    assert "DO NOT AGREE" not in report


def test_without_a_known_peak_the_report_says_so_and_gives_no_utilization(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--steps", "1"]) == 0

    report = capsys.readouterr().out
    assert "unknown peak" in report
    assert _cells(report, "ours")[3:5] == ["unknown peak", "unknown peak"]
    assert "Padded takes" not in report


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rows", "12"], "--rows must be a multiple of 8."),
        (["--warm-up", "0"], "--steps, --warm-up and --padded-rows must be 1 or more."),
        (["--shapes", "guard,round"], "--shapes knows guard, tools, chat, short, but not round."),
        (["--random", "2,64,128,4,2,1000"], "--random: SmolLM2's tokenizer needs a vocab of at least 49152."),
        (
            ["--random", "2,64"],
            "--random wants 6 positive numbers: layers, hidden, intermediate, heads, kv_heads, vocab.",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *options]) == 2

    assert sentence in capsys.readouterr().err


def test_without_a_gpu_the_user_is_told_how_to_try_the_logic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(NotMeasurableError, match="pass --device cpu"):
        chosen_device(None)
    assert chosen_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("CPU", None),
    ],
)
def test_only_a_gpu_that_is_known_by_its_whole_name_has_a_peak(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_utilization_is_what_the_formula_gives() -> None:
    work = Work(
        batches=1,
        real_tokens=250,
        trained_tokens=20,
        computed_tokens=100,
        predicted_positions=20,
        largest_batch=100,
    )
    memory = Memory(allocated=3 * 2**30, reserved=2**32)
    step = TimedStep(1, Stage(1, padded=False, measured=True), 2.0, PACKED, memory, graphs=0)
    case = Case(
        shape="guard",
        rows=8,
        choice=Choice(PACKED, 0, Verdict(BatchLayout.SHARED_PREFIX)),
        choosing_seconds=1.0,
        steps=[(step, work)],
        parameters=Parameters(body=1000, head=500),
        peak_tflops=1e-6,  # a million operations a second
        graphs_before=0,
    )

    seconds, real, computed, mfu, effective, allocated, reserved, *_ = _cells(case_markdown(case), "ours")

    # 4 x (1000 x 100 + 500 x 20) = 440,000 operations in two seconds; 4 x (1000 x 250 + 500 x 20) by real tokens.
    assert (mfu, effective) == ("22.0%", "52.0%")
    assert seconds.startswith("2.000")
    assert (real[:3], computed[:4]) == ("125", "50.0")
    assert (allocated, reserved) == ("3.00", "4.00")
    unknown = _cells(case_markdown(replace(case, peak_tflops=None)), "ours")
    assert unknown[3:5] == ["unknown peak", "unknown peak"]


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_frozen_matrices_without_the_embedding(tied: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    base = LlamaForCausalLM(config)
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))

    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    assert parameters_of(model) == Parameters(body=3 * layer, head=100 * 16)


def test_work_counts_shared_tokens_once_in_packs_and_padding_in_batches() -> None:
    def row(tail: list[int]) -> list[TokenPair]:
        ids = np.array([1, 2, 3, 4, 5, 6, *tail], dtype=np.int64)
        return [(ids, np.arange(len(ids)) >= 7)]

    rows = [row([7, 8, 9]), row([10, 11, 12, 13, 14])]

    def work(batching: Batching) -> Work:
        return work_of(StepBatches(0, batching, batching.batches(rows), trained_tokens=6, tokens=20))

    # Six tokens in common; what lies behind the last prediction is not computed. The head runs at 2 + 4 places.
    assert work(PACKED) == Work(1, 20, 6, computed_tokens=6 + 2 + 4, predicted_positions=6, largest_batch=12)
    padded = replace(PACKED, layout=BatchLayout.PADDED)
    assert work(padded) == Work(1, 20, 6, computed_tokens=22, predicted_positions=8, largest_batch=22)


def test_both_layouts_are_given_the_same_rows_in_turns_that_begin_with_a_warm_up() -> None:
    planned = stages(warm_up=1, steps=3, compare=True)

    found = [(stage.padded, stage.rows_of, stage.measured) for stage in planned]
    first = [(0, False), (1, True)]
    second = [(0, False), (2, True), (3, True)]
    assert found == [(padded, *stage) for turn in (first, second) for padded in (False, True) for stage in turn]
    assert [stage.rows_of for stage in stages(warm_up=2, steps=2, compare=False)] == [0, 1, 2, 3]


def test_a_repeated_plan_gives_the_rows_of_the_steps_that_come_again() -> None:
    plan, repeated = TrainingPlan(12, 4, 1, 7), RepeatedPlan(12, 4, 1, 7, (0, 2, 2))

    assert repeated.total_steps == 3
    for step, original in enumerate((0, 2, 2)):
        np.testing.assert_array_equal(repeated.rows_of_step(step), plan.rows_of_step(original))


def test_a_first_contact_answers_every_question_that_a_cpu_can(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--first-contact", "--device", "cpu"]) == 0

    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert list(dict.fromkeys(row.split(" | ")[0].removeprefix("| ") for row in rows[2:])) == [
        each.name for each in CHECKS
    ]
    assert not [row for row in rows if "DOES NOT HOLD" in row]
    assert sum("| holds |" in row for row in rows) >= 15


def test_a_check_that_fails_ends_no_other_and_what_the_time_is_over_for_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_setting: object) -> Iterator[Finding]:
        yield Finding("a question", "an answer", holds=True)
        raise RuntimeError("no kernel | for this\nand more")

    named = [replace(CHECKS[0], name=name, check=fails) for name in ("one", "two")]
    monkeypatch.setattr(module, "CHECKS", named)
    assert not first_contact(torch.device("cpu"))
    report = capsys.readouterr().out
    assert report.count("| RuntimeError: no kernel / for this | **DOES NOT HOLD** |") == 2
    assert first_contact(torch.device("cpu"), budget=-1)
    assert capsys.readouterr().out.count("not reached: the time was over") == 2
