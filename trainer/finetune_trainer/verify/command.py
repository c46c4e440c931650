"""The verification of a published adapter as a pod runs it: fetched from its address, judged, said in one sentence.

The last words are `{"verified": true | false | null, "message": "one sentence"}`; null means that nothing could be
told. Exit codes: 0 as trained, 1 not as trained, 2 not known.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune_api.outcome import TERMINATION_MESSAGE_LIMIT_BYTES
from finetune_trainer.launch.environment import TERMINATION_MESSAGE_PATH

_POD_FILE = Path("/dev/termination-log")
"""Where Kubernetes expects last words unless the container says otherwise."""

EXIT_CODES = {True: 0, False: 1, None: 2}


def main(argv: Sequence[str] | None = None) -> int:
    """Verify; the exit code is 0 as trained, 1 not as trained, 2 not known."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune_trainer.verify",
        description="Verify a published adapter on its base model.",
        epilog="Exit codes: 0 it answers as trained; 1 it does not; 2 it could not be told.",
    )
    parser.add_argument("--job", metavar="JOB.yaml", type=Path, required=True, help="the effective job")
    parser.add_argument("--adapter", metavar="ADDRESS", required=True, help="folder, pvc:// or s3:// of the adapter")
    parser.parse_args(argv)
    return announce(None, "Verification is not built into this image yet.")


def announce(verified: bool | None, message: str) -> int:
    """Leave the last words, on standard error and in the pod's file; the exit code that goes with them."""
    print(message, file=sys.stderr, flush=True)
    path = _last_words_file()
    if path is not None:
        try:
            path.write_bytes(last_words(verified, message))
        except OSError as error:
            print(f"The last words could not be written to {path}: {error.strerror}.", file=sys.stderr)
    return EXIT_CODES[verified]


def last_words(verified: bool | None, message: str) -> bytes:
    """JSON of at most TERMINATION_MESSAGE_LIMIT_BYTES; a longer message is cut."""
    message = message.encode(errors="replace").decode()
    cut = message
    while len(data := json.dumps({"verified": verified, "message": cut}).encode()) > TERMINATION_MESSAGE_LIMIT_BYTES:
        message = message[: len(message) * 3 // 4]
        cut = message + "…"
    return data


def _last_words_file() -> Path | None:
    if named := os.environ.get(TERMINATION_MESSAGE_PATH):
        return Path(named)
    return _POD_FILE if _POD_FILE.exists() else None
