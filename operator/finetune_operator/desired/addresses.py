"""The addresses of a job that name a place on the pod's own file system: paths, and claims that must be mounted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from finetune_api.job import FineTuneJob
from finetune_api.storage_uri import Scheme, StorageUri, parse, parse_output

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
"""`gpt2` or `owner/name`: looked up on the hub where no such folder exists, which it never does in a pod."""


@dataclass(frozen=True, slots=True)
class JobAddress:
    """One address and what becomes of it."""

    path: str
    """Where it stands, from the top of the job: `spec.train_path`."""
    uri: StorageUri
    written: bool
    """True for the output: all others are only read."""


def job_addresses(job: FineTuneJob) -> Iterator[JobAddress]:
    """Every address of `job` (a result of `effective_job`), without models that are hub names: the output last."""
    spec = job.spec
    for key in ("train_path", "valid_path"):
        address = getattr(spec, key)
        if address is not None:
            yield JobAddress(f"spec.{key}", parse(address), written=False)
    for key in ("model_id", "initial_base_model_ckpt_path", "initial_adapter_model_ckpt_path"):
        address = getattr(spec, key)
        if isinstance(address, str) and not _HUB_NAME.match(address):
            yield JobAddress(f"spec.{key}", parse(address), written=False)
    if spec.output is not None:
        yield JobAddress("spec.output.uri", parse_output(spec.output.uri), written=True)


def claims(job: FineTuneJob) -> dict[str, bool]:
    """Claims that pvc:// addresses of `job` name, sorted, and whether anything is written to each."""
    found = [address for address in job_addresses(job) if address.uri.scheme is Scheme.PVC]
    # The output is the last one, so of a claim that is also read it says that it is written.
    return dict(sorted({address.uri.container: address.written for address in found}.items()))
