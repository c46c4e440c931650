"""`python -m benchmarks.gpu --first-contact`: does what was written for GPUs hold on one, in at most five minutes?

Each check is a question that no CPU answers, with the figure it is answered by. One that fails ends no other; what the
time does not suffice for is named. Models are random and made on the GPU: nothing is downloaded or read.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.console import say
from benchmarks.gpu import contact_checks as checks
from benchmarks.gpu.contact_checks import Finding, Setting
from benchmarks.gpu.contact_speed import speed
from benchmarks.gpu.devices import device_markdown, give_back

BUDGET_SECONDS = 300.0
_HEAD = "| | question | found | |\n| --- | --- | --- | --- |"

Check = Callable[[Setting], Iterator[Finding]]


@dataclass(frozen=True)
class _Named:
    name: str
    check: Check


CHECKS = (
    _Named("precision", checks.precision),
    _Named("attention", checks.attention),
    _Named("LoRA", checks.fused_lora),
    _Named("Liger", checks.fused_kernels),
    _Named("gate", checks.gate),
    _Named("memory", checks.memory),
    _Named("out of memory", checks.out_of_memory),
    _Named("compilation", checks.compilation),
    _Named("quantization", checks.quantization),
    _Named("speed", speed),
)
"""The cheapest first."""


def first_contact(device: torch.device, *, budget: float = BUDGET_SECONDS) -> bool:
    """Print a table of all findings as they come; whether all are as they should be.

    Args:
        device: the GPU, or a CPU to try the checks' own logic on small models.
        budget: seconds after which no check is begun.
    """
    began = time.monotonic()
    setting = Setting(device, small=device.type != "cuda")
    print(f"Device: {device_markdown(device)}, torch {torch.__version__}.\n\n{_HEAD}", flush=True)
    good = True
    for each in CHECKS:
        if time.monotonic() - began > budget:
            _print(each.name, Finding("", "not reached: the time was over", holds=None))
            continue
        say(each.name)
        try:
            with warnings.catch_warnings():
                # Of what libraries will rename one day.
                warnings.simplefilter("ignore")
                for finding in each.check(setting):
                    good &= finding.holds is not False
                    _print(each.name, finding)
        except Exception as error:  # Whatever it is, it is what this is to find out.
            good = False
            first = next(iter(str(error).strip().splitlines()), "")
            _print(each.name, Finding("", f"{type(error).__name__}: {first[:300]}", holds=False))
        give_back(device)
    print(f"\n{time.monotonic() - began:.0f} s.", flush=True)
    return good


def _print(name: str, finding: Finding) -> None:
    verdict = {True: "holds", False: "**DOES NOT HOLD**", None: ""}[finding.holds]
    cells = (name, finding.question, finding.found, verdict)
    print(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |", flush=True)
