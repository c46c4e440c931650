"""`make models`: examine every model type that transformers calls a causal language model, and write docs/models.md.

What an earlier run found is kept, so that a run that is cut off by its budget is continued by the next.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from tests.architectures.cases import CASES
from tests.architectures.pool import examine_all
from tests.architectures.record import Record
from tests.architectures.report import LAUNCHED, document, summary
from tests.architectures.results import Results, results_folder


def main(arguments: list[str]) -> int:
    """Examine what is asked for; the exit code is 1 where a type is not as it should be, or one was not examined."""
    asked = _parse(arguments)
    chosen = [
        replace(case, quantization=asked.quantization)
        for case in CASES.values()
        if not asked.only or any(fnmatch(case.name, part) for part in asked.only)
    ]
    results = Results(results_folder(asked.quantization))
    known = {} if asked.fresh else results.found(chosen)
    # What was not as it should be is looked at again.
    records = {name: record for name, record in known.items() if not record.faults()}
    waiting = [case for case in chosen if case.name not in records]
    print(f"{len(chosen)} cases, {len(records)} known already", flush=True)

    def done(record: Record) -> None:
        records[record.name] = record
        results.keep(record)
        print(f"[{len(records)}/{len(chosen)}] {_line(record)}", flush=True)

    _quiet_libraries()
    until = time.monotonic() + asked.budget * 60 if asked.budget else None
    examine_all(waiting, done, jobs=asked.jobs, launched=LAUNCHED, until=until)
    ordered = [records[case.name] for case in chosen if case.name in records]
    print("\n".join(summary(ordered)))
    missing = [case.name for case in chosen if case.name not in records]
    if missing:
        print(f"The budget ended before {len(missing)} cases, first {missing[0]}: run it again to go on.")
    elif asked.write and not asked.quantization:
        asked.write.write_text(document(ordered))
        print(f"Written: {asked.write}")
    return 1 if missing or any(record.faults() for record in ordered) else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of cases; * stands for anything")
    parser.add_argument("--budget", type=float, help="minutes after which no case is begun")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at a time")
    parser.add_argument("--fresh", action="store_true", help="do not use what an earlier run found")
    parser.add_argument("--quantization", choices=["nf4"], help="train all of them on a base model quantized so")
    parser.add_argument("--write", type=Path, help="the document, written when no case is missing")
    return parser.parse_args(arguments)


def _quiet_libraries() -> None:
    """Imported here, once, for all processes that are forked afterwards; their progress bars would bury the lines."""
    import warnings

    from transformers.utils import logging

    import finetune_trainer.run  # noqa: F401
    import tests.architectures.examine  # noqa: F401

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _line(record: Record) -> str:
    faults = record.faults()
    if faults:
        return f"{record.name}: {'; '.join(faults)[:300]} ({record.seconds:.0f} s)"
    said = record.layout if record.outcome == "trained" else f"refused: {record.sentence[:120]}"
    return f"{record.name}: ok, {said} ({record.seconds:.0f} s)"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
