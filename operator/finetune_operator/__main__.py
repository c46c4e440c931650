"""`python -m finetune_operator`: the operator, set up by FINETUNE_OPERATOR_* variables (settings.py)."""

from __future__ import annotations

import asyncio
import gc
import os
import sys

from finetune_operator.app import run_operator
from finetune_operator.errors import ApiError, HistoryRewound, SetupProblem
from finetune_operator.log_lines import printable, set_up_logging
from finetune_operator.settings import OperatorSettings


def main() -> int:
    """Run until told to stop; 0 after a signal, 1 when something is wrong, which the last line says."""
    set_up_logging()
    try:
        settings = OperatorSettings.from_environment(os.environ)
    except ValueError as error:
        print(f"The operator's settings are not valid: {error}", file=sys.stderr)
        return 1
    # What was imported is there to stay. The collector would look at all of it again and again, and that takes longer
    # than the event loop may be kept.
    gc.collect()
    gc.freeze()
    problems: list[str] = []
    try:
        asyncio.run(run_operator(settings))
    except* (SetupProblem, HistoryRewound, ApiError, OSError) as group:
        problems += [str(problem) for problem in group.exceptions]
    for problem in problems:
        print(f"The operator cannot run: {printable(problem)}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
