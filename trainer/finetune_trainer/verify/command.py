"""The verification of a published adapter as a pod runs it: fetched from its address, judged, said in one sentence.

The last words are `{"verified": true | false | null, "message": "one sentence"}`; null means that nothing could be
told. Exit codes: 0 as trained, 1 not as trained, 2 not known.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from finetune_api.defaults import effective_job
from finetune_api.load import load_job_file
from finetune_api.outcome import Reason
from finetune_api.verification import VerificationMessage
from finetune_trainer.errors import JobError
from finetune_trainer.launch.environment import TERMINATION_MESSAGE_PATH
from finetune_trainer.launch.failures import quoted, redact
from finetune_trainer.pins import model_source
from finetune_trainer.verify.report import Report

_POD_FILE = Path("/dev/termination-log")
"""Where Kubernetes expects last words unless the container says otherwise."""


def main(argv: Sequence[str] | None = None) -> int:
    """Verify; the exit code is 0 as trained, 1 not as trained, 2 not known."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune_trainer.verify",
        description="Verify a published adapter on its base model.",
        epilog="Exit codes: 0 it answers as trained; 1 it does not; 2 it could not be told.",
    )
    parser.add_argument("--job", metavar="JOB.yaml", type=Path, required=True, help="the effective job")
    parser.add_argument("--adapter", metavar="ADDRESS", required=True, help="folder, pvc:// or s3:// of the adapter")
    arguments = parser.parse_args(argv)
    _quiet_libraries()
    try:
        report = _verify(arguments.job, arguments.adapter)
    except JobError as error:
        return announce(None, f"{error.reason}: {error.message}")
    except Exception as error:  # Whatever it was, the operator is to read that nothing is known.
        traceback.print_exc()
        return announce(
            None, f"The verification failed unexpectedly with {quoted(error)}; the log holds the stack trace."
        )
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    return announce(report.verified, report.message)


def _verify(job_file: Path, address: str) -> Report:
    """The report on the adapter at `address`, on the base model that the job trained."""
    loaded = load_job_file(job_file)
    if loaded.job is None:
        raise JobError(Reason.INVALID_SPEC, "; ".join(f"{error.path}: {error.message}" for error in loaded.errors))
    # Imported late: transformers takes seconds, and a bad job should not wait for it.
    from finetune_trainer.published.base import Base
    from finetune_trainer.published.folder import open_adapter
    from finetune_trainer.quiet import quiet_libraries
    from finetune_trainer.verify.local import verify_locally

    spec = effective_job(loaded.job).spec
    source = model_source(spec)
    with tempfile.TemporaryDirectory(prefix="finetune-verify-") as scratch:
        folder = open_adapter(address, Path(scratch), weights=True)
        base = Base(source.address, source.revision)
        with quiet_libraries():
            return verify_locally(folder, base=base, trust_remote_code=spec.trust_remote_code)


def _quiet_libraries() -> None:
    """The verdict is one line; bars and banners of libraries would bury it."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


def announce(verified: bool | None, message: str) -> int:
    """Leave the last words, on standard error and in the pod's file; the exit code that goes with them."""
    words = VerificationMessage(verified=verified, message=redact(message, os.environ))
    print(words.message, file=sys.stderr, flush=True)
    path = _last_words_file()
    if path is not None:
        try:
            path.write_bytes(words.to_bytes())
        except OSError as error:
            print(f"The last words could not be written to {path}: {error.strerror}.", file=sys.stderr)
    return words.exit_code


def _last_words_file() -> Path | None:
    if named := os.environ.get(TERMINATION_MESSAGE_PATH):
        return Path(named)
    return _POD_FILE if _POD_FILE.exists() else None
