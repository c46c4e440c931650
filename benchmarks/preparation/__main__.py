"""`python -m benchmarks.preparation`: how fast rows become tokens, beside the tokenizer alone on the same texts.

Both run in turn, the other one first every time. The report is Markdown on standard output; what is going on is told
on standard error.
"""

from __future__ import annotations

import argparse
import os
import sys

from benchmarks.console import words

_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}


def main() -> int:
    """Measure and print the report."""
    os.environ.update(_ENVIRONMENT)
    from benchmarks.preparation.measure import Settings, measure

    measure(Settings(**vars(_options())))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparation", description=__doc__)
    parser.add_argument(
        "--shapes", type=words, default="guard,tools,chat,short", help="of the data (default: %(default)s)"
    )
    parser.add_argument("--rows", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
