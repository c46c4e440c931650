"""`python -m benchmarks.first_step`: seconds from the command to the end of the first step of a small job, by phase,
beside TRL on the same model and rows.

Both are whole processes, started in turn, with everything cached that a second run finds cached. The report is Markdown
on standard output.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import IO, cast

from benchmarks.console import machine, say, three
from tests.models import random_llama, smollm2_folder
from tests.trainer.run.tiny_job import TinyJob

_PHASES = {
    "start, data": "Loading ",
    "weights and adapter": "Training ",
    "gate": "Rows ",
    "first step": "step 1/",
}
"""Name -> what is in the line that ends it."""


def main() -> int:
    """Measure and print the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M-Instruct, in place of a random model of 3 MB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as name:
        folder = Path(name)
        model = smollm2_folder() if options.real else random_llama(folder / "model")
        job = TinyJob(folder / "job", model_id=str(model))
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "FINETUNE_CACHE_DIR": str(folder / "cache")}
        ours = [sys.executable, "-m", "finetune_cli", "run", str(job.file())]
        trl = [sys.executable, "-m", "benchmarks.first_step.peer", str(model), job.spec["train_path"]]
        phases: list[dict[str, float]] = []
        theirs: list[float] = []
        # The first of each warms the caches.
        for number in range(options.rounds + 1):
            say(f"round {number} of {options.rounds}")
            command = [*ours, "--output-dir", str(folder / f"out-{number}")]
            phases.append(_seconds(command, environ, _PHASES))
            theirs.append(_seconds(trl, environ, {"all": "step 1/"})["all"])
        _report(str(model) if options.real else "a random Llama of 3 MB", phases[1:], theirs[1:])
    return 0


def _seconds(command: Sequence[str], environ: Mapping[str, str], phases: Mapping[str, str]) -> dict[str, float]:
    """How long each phase took."""
    began = time.monotonic()
    found: dict[str, float] = {}
    waiting = list(phases.items())
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        output = cast("IO[str]", process.stdout)
        lines = []
        for line in output:
            lines.append(line)
            if waiting and waiting[0][1] in line:
                now = time.monotonic()
                found[waiting.pop(0)[0]] = now - began
                began = now
        if waiting:
            raise RuntimeError(f"{' '.join(command)} did not come to {waiting[0][0]}:\n{''.join(lines[-30:])}")
    return found


def _report(model: str, phases: Sequence[Mapping[str, float]], theirs: Sequence[float]) -> None:
    print(f"{machine()}. {model}, 24 short rows, LoRA on all linear layers; seconds, least / median / most.\n")
    print("| phase | ours |\n| --- | ---: |")
    for name in _PHASES:
        print(f"| {name} | {three([found[name] for found in phases], '{:.1f}'.format)} |")
    whole = [sum(found.values()) for found in phases]
    print(f"| **to the end of the first step** | **{three(whole, '{:.1f}'.format)}** |")
    print(f"\nTRL: {three(theirs, '{:.1f}'.format)}; {median(theirs) / median(whole):.2f} times ours.")


if __name__ == "__main__":
    sys.exit(main())
