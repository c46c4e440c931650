"""What cannot be done in a cluster although the schema allows it, because it can on a laptop or in no pod at all."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import replace

from finetune_api.job import FineTuneJob
from finetune_api.problem import Problem, first_ones
from finetune_api.spec_size import size_fault
from finetune_api.storage_uri import Scheme
from finetune_api.workers import Volume
from finetune_operator.desired.addresses import JobAddress, claims, job_addresses
from finetune_operator.desired.effective import effective_job
from finetune_operator.desired.reserved import environment_problems
from finetune_operator.desired.spelling import plain
from finetune_operator.desired.volumes import VOLUME_PREFIX, is_read_only, own_volumes
from finetune_operator.settings import OperatorSettings

_KERNEL_FOLDERS = ("/proc", "/sys", "/dev")

_ELSEWHERE = "use an s3:// or pvc://claim/path address, or mount the folder with workers.volumes"


def job_problems(job: FineTuneJob, settings: OperatorSettings) -> list[Problem]:
    """The first reasons why `job`, which the contract accepts, cannot be done here. Paths start at its top."""
    attempt = effective_job(job, settings)
    found = [
        *_output_problems(attempt),
        *(_where_written(problem, job) for problem in _address_problems(attempt)),
        *_claim_problems(attempt),
        *environment_problems(attempt.spec),
        *_volume_problems(attempt, settings),
        *_size_problems(attempt),
    ]
    return first_ones(found)


def _output_problems(job: FineTuneJob) -> Iterator[Problem]:
    if job.spec.output is None:
        yield Problem(
            "spec.output",
            "output is required, since this operator has no default for it: write output: {uri: s3://bucket/prefix} "
            "or {uri: pvc://claim/path}.",
        )


def _where_written(problem: Problem, job: FineTuneJob) -> Problem:
    """`problem` of an effective job with the place where its author can mend it."""
    if problem.path == "spec.output.uri" and job.spec.output is None:
        # The operator's own default is no local path; so this came from LLMForge's spelling.
        return replace(problem, path="spec.output_dir")
    return problem


def _address_problems(job: FineTuneJob) -> Iterator[Problem]:
    for address in job_addresses(job):
        if address.uri.scheme is Scheme.LOCAL:
            sentence = _local_problem(address, job.spec.workers.volumes)
            if sentence is not None:
                yield Problem(address.path, sentence)


def _local_problem(address: JobAddress, volumes: list[Volume]) -> str | None:
    path = _normal(address.uri.path)
    holders = [volume for volume in volumes if _is_within(path, _normal(volume.mount_path))]
    if not holders:
        return f"{address.uri.path} is a local path, and no volume of the job holds it in a pod: {_ELSEWHERE}."
    # Of nested mounts the innermost is the one that is seen.
    volume = max(holders, key=lambda holder: len(_normal(holder.mount_path)))
    if volume.empty_dir is not None:
        fault = "whose content goes with the pod" if address.written else "which is empty when a pod starts"
        return f"{address.uri.path} is on the emptyDir volume {volume.name}, {fault}: {_ELSEWHERE}."
    if address.written and is_read_only(volume):
        return (
            f"{address.uri.path} is on the volume {volume.name}, which is mounted read-only: mount a claim that can be "
            "written, or use an s3:// or pvc://claim/path address."
        )
    return None


def _claim_problems(job: FineTuneJob) -> Iterator[Problem]:
    workers = job.spec.workers
    cache = workers.cache.persistent_volume_claim if workers.cache is not None else None
    if cache is not None and cache.read_only:
        yield Problem(
            "spec.workers.cache.persistentVolumeClaim.readOnly",
            f"the cache on claim {cache.claim_name} is written to: remove readOnly.",
        )
    written = {claim for claim, is_written in claims(job).items() if is_written}
    if cache is not None:
        written.add(cache.claim_name)
    for index, volume in enumerate(workers.volumes):
        claim = volume.persistent_volume_claim
        if claim is not None and claim.read_only and claim.claim_name in written:
            yield Problem(
                f"spec.workers.volumes[{index}].persistentVolumeClaim.readOnly",
                f"claim {claim.claim_name} is written to by this job (output or cache), so it cannot be read-only as a "
                "whole: write readOnly beside mountPath instead, which protects this mount alone.",
            )


def _volume_problems(job: FineTuneJob, settings: OperatorSettings) -> Iterator[Problem]:
    ours = [mount["mountPath"] for mount in own_volumes(job, "", settings).mounts]
    seen: list[str] = []
    for index, volume in enumerate(job.spec.workers.volumes):
        place = f"spec.workers.volumes[{index}]"
        if volume.name.startswith(VOLUME_PREFIX):
            yield Problem(
                f"{place}.name", f"names that begin with {VOLUME_PREFIX} are the operator's: rename {volume.name}."
            )
        path = _normal(volume.mount_path)
        taken = next((own for own in ours if _is_within(path, own) or _is_within(own, path)), None)
        if taken is not None:
            yield Problem(
                f"{place}.mountPath",
                f"{volume.mount_path} would hide or lie in {taken}, which is mounted for this job: mount it elsewhere, "
                "as in /data.",
            )
        elif any(_is_within(path, folder) for folder in _KERNEL_FOLDERS):
            yield Problem(f"{place}.mountPath", f"{volume.mount_path} belongs to the kernel: mount it elsewhere.")
        elif path in seen:
            yield Problem(f"{place}.mountPath", f"{volume.mount_path} is given twice: mount one of them elsewhere.")
        seen.append(path)
        sub_path = volume.sub_path
        if sub_path is not None and (sub_path.startswith("/") or ".." in sub_path.split("/")):
            yield Problem(
                f"{place}.subPath", f"{sub_path} leaves the volume: write a path below its root, without '..'."
            )


def _size_problems(attempt: FineTuneJob) -> Iterator[Problem]:
    """What is trained is read again in the pods, by the same rules. A ConfigMap holds several of the largest."""
    fault = size_fault(plain(attempt.spec))
    if fault is not None:
        yield Problem("spec", f"spec, with its defaults written out, {fault}")


def _normal(path: str) -> str:
    """An absolute `path` without detours: two slashes at its beginning would stay, three or more become one.

    A relative one begins with two from here on, and so is in no folder of a pod.
    """
    return posixpath.normpath(f"//{path}")


def _is_within(path: str, folder: str) -> bool:
    return f"{path}/".startswith(posixpath.join(folder, ""))
