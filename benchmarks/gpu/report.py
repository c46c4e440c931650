"""Figures as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import median

import torch

from benchmarks.console import machine, span, three
from benchmarks.gpu.clock import TimedStep
from benchmarks.gpu.devices import device_markdown
from benchmarks.gpu.figures import FORMULA, Parameters, Work, computed_flops, effective_flops
from benchmarks.gpu.kernels import TOLERANCES, Comparison
from finetune_trainer.model.load import training_dtype
from finetune_trainer.train.choice import Choice

_GIB = 2**30

Steps = Sequence[tuple[TimedStep, Work]]


@dataclass
class Case:
    """One shape of data."""

    shape: str
    rows: int
    """Rows of a step."""
    choice: Choice | None
    """None where the run ended before it."""
    choosing_seconds: float
    steps: Steps
    """The measured ones."""
    parameters: Parameters | None
    peak_tflops: float | None
    graphs_before: int
    """Graphs that torch.compile made in steps that are not measured, the gate's included."""
    remarks: list[str] = field(default_factory=list)


def conditions(device: torch.device, model: str, peak: float | None) -> str:
    """Where and with what it was measured, and what MFU means."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "peft"))
    precision = str(training_dtype(device)).removeprefix("torch.")
    stated = f"Peak: {peak:g} TFLOP/s in dense bfloat16." if peak else "Peak: unknown peak; --peak-tflops gives it."
    return (
        f"Device: {device_markdown(device)}. {machine()}, {libraries}; {model}, frozen weights in {precision}.\n\n"
        f"Three figures are least / median / most. {stated} {FORMULA}"
    )


def case_markdown(case: Case) -> str:
    """All that was found about one shape."""
    return "\n".join(_lines(case))


def _lines(case: Case) -> Iterator[str]:
    yield f"### {case.shape}, {case.rows} rows a step\n"
    if case.choice is not None:
        verdict, batching = case.choice.verdict, case.choice.batching
        yield (
            f"Layout: {verdict.layout.value}, packs of at most {batching.tokens_per_pack:,} tokens, activations "
            f"{'checkpointed' if case.choice.checkpointed else 'kept'}. The gate took {verdict.seconds:.2f} s of the "
            f"{case.choosing_seconds:.2f} s before the first step. {case.choice.sentence()}\n"
        )
        warning = case.choice.warning()
        if warning:
            yield f"{warning}\n"
    for remark in case.remarks:
        yield f"{remark}\n"
    layouts = {padded: [pair for pair in case.steps if pair[0].stage.padded is padded] for padded in (False, True)}
    layouts = {padded: found for padded, found in layouts.items() if found}
    if not layouts:
        yield "No step was measured.\n"
        return
    columns = ["s a step", "real tokens/s", "computed tokens/s", "MFU", "effective", "allocated (GiB)"]
    columns += ["reserved (GiB)", "batches", "largest batch"]
    yield f"| | {' | '.join(columns)} |"
    yield "| --- |" + " ---: |" * len(columns)
    for padded, found in layouts.items():
        yield f"| {'padded' if padded else 'ours'} | {' | '.join(_cells(case, found))} |"
    yield ""
    works = [work for _, work in layouts[min(layouts)]]
    yield (
        f"{span([work.real_tokens for work in works])} real tokens a step, "
        f"{span([work.trained_tokens for work in works])} of them trained; {len(works)} steps.\n"
    )
    if len(layouts) == 2:
        ours = {step.stage.rows_of: step.seconds for step, _ in layouts[False]}
        pairs = [(step.seconds, ours.get(step.stage.rows_of)) for step, _ in layouts[True]]
        ratios = [seconds / own for seconds, own in pairs if own is not None]
        yield f"Padded takes {three(ratios, _number)} times as long as ours on the same rows.\n"
    yield (
        f"torch.compile made {case.graphs_before} graphs before and between the measured steps and "
        f"{sum(step.graphs for step, _ in case.steps)} in them.\n"
    )


def _cells(case: Case, steps: Steps) -> list[str]:
    seconds = [step.seconds for step, _ in steps]
    memories = [step.memory for step, _ in steps if step.memory is not None]
    return [
        three(seconds, _number),
        three([work.real_tokens / step.seconds for step, work in steps], _number),
        three([work.computed_tokens / step.seconds for step, work in steps], _number),
        *_utilization(case, steps),
        f"{max(memory.allocated for memory in memories) / _GIB:.2f}" if memories else "–",
        f"{max(memory.reserved for memory in memories) / _GIB:.2f}" if memories else "–",
        span([work.batches for _, work in steps]),
        f"{max(work.largest_batch for _, work in steps):,}",
    ]


def _utilization(case: Case, steps: Steps) -> tuple[str, str]:
    """MFU and the effective rate."""
    if case.parameters is None:
        return "mixture of experts", "mixture of experts"
    if case.peak_tflops is None:
        return "unknown peak", "unknown peak"
    peak, parameters = case.peak_tflops * 1e12, case.parameters
    computed = [computed_flops(parameters, work) / step.seconds / peak for step, work in steps]
    effective = [effective_flops(parameters, work) / step.seconds / peak for step, work in steps]
    return f"{median(computed):.1%}", f"{median(effective):.1%}"


def kernels_markdown(found: Comparison) -> str:
    """Both kernels beside each other, and whether they agree."""
    heads, kv_heads, size = found.heads
    about = (
        f"Attention of one pack: {found.tokens:,} tokens in {found.nodes} nodes, {heads} query and {kv_heads} key "
        f"heads of {size}, {str(found.dtype).removeprefix('torch.')}; milliseconds, medians. On a new pack flex makes "
        "its block mask; the dense mask is made beforehand and counts nowhere.\n"
    )
    lines = [
        about,
        "| | first run | new pack | forward | backward | memory (GiB) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, times in found.times.items():
        figures = [times.first, times.new_pack, times.forward, times.backward]
        cells = ["–" if seconds is None else _number(1000 * seconds) for seconds in figures]
        cells.append("–" if times.peak_bytes is None else f"{times.peak_bytes / _GIB:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    differences = ", ".join(f"{what} {difference:.1e}" for what, difference in found.differences.items())
    verdict = "agree" if found.agrees else "DO NOT AGREE"
    lines.append(f"\nThe kernels {verdict} to {TOLERANCES[found.dtype]:g} of the dense norm: {differences}.")
    if len(found.differences) == 1:
        lines.append("FlexAttention has no backward pass on CPUs.")
    return "\n".join([*lines, ""])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"
