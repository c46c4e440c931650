"""`finetune render`: the objects that the operator would create for a job, without a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from finetune_cli.output import SetOption, fail, print_json, problems_failed, warn

if TYPE_CHECKING:
    from finetune_api.job import FineTuneJob
    from finetune_api.load import LoadResult
    from finetune_api.problem import Problem
    from finetune_operator.settings import OperatorSettings

SETTINGS_EXIT_CODE = 2
"""The command itself cannot be carried out, whatever the job."""

DEFAULT_NAMESPACE = "default"
PLACEHOLDER_UID = "00000000-0000-0000-0000-000000000000"


class ObjectFormat(StrEnum):
    """What `-o` takes here: both can be given to kubectl."""

    YAML = "yaml"
    JSON = "json"


def render(
    file: Annotated[str, typer.Argument(metavar="FILE", help="FineTuneJob or LLMForge file.")],
    namespace: Annotated[
        str | None,
        typer.Option(
            "--namespace",
            "-n",
            metavar="NS",
            help=f"Namespace of the job. Default: the file's, else {DEFAULT_NAMESPACE}.",
        ),
    ] = None,
    uid: Annotated[
        UUID | None,
        typer.Option("--uid", metavar="UID", help="uid of the job. Default: the file's, else zeros for a placeholder."),
    ] = None,
    attempt: Annotated[int, typer.Option("--attempt", min=1, help="Number of the attempt.")] = 1,
    settings: SetOption = None,
    output: Annotated[ObjectFormat, typer.Option("--output", "-o", help="YAML documents or a List in JSON.")] = (
        ObjectFormat.YAML
    ),
) -> None:
    """Print what the operator would create: an attempt's ConfigMap and PyTorchJob. Needs no cluster.

    The operator's own settings are read from the same FINETUNE_OPERATOR_* variables.
    """
    from finetune_api.load import load_job_file

    result = load_job_file(file, settings or [])
    if result.job is None:
        raise problems_failed(file, result.errors)
    of_operator = operator_settings()
    from finetune_operator.desired import job_config_map, job_problems, pytorch_job
    from finetune_operator.desired.continuation import continued

    job = _placed(result.job, namespace, uid)
    problems = job_problems(job, of_operator)
    if problems:
        raise problems_failed(file, [result.as_written(problem) for problem in problems])
    warn(file, list(_warnings(result, job, of_operator)))
    if job.metadata.uid == PLACEHOLDER_UID:
        typer.secho(
            f"{file}: note: without a uid the names, labels and owners below carry a placeholder ({PLACEHOLDER_UID}): "
            "give the job's own with --uid.",
            err=True,
        )
    if attempt > 1:
        job = continued(job, job_config_map(job, 1, of_operator))
    objects = [job_config_map(job, attempt, of_operator), pytorch_job(job, attempt, of_operator)]
    if output is ObjectFormat.JSON:
        print_json({"apiVersion": "v1", "kind": "List", "items": objects})
    else:
        from finetune_api.job_file import objects_yaml

        sys.stdout.write(objects_yaml(objects))


def operator_settings() -> OperatorSettings:
    """The operator's settings in this environment; what is wrong with them is printed and raised as an exit."""
    try:
        from finetune_operator.settings import PREFIX, OperatorSettings
    except ImportError as error:
        raise fail(
            f"{error.name} is not installed, which the operator's settings need: "
            "pip install 'finetune-operator[operator]'.",
            exit_code=SETTINGS_EXIT_CODE,
        ) from error
    from pydantic import ValidationError

    try:
        return OperatorSettings.from_environment(os.environ)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        lines = [f"{PREFIX}{'.'.join(map(str, fault['loc'])).upper()}: {fault['msg']}." for fault in faults]
        raise fail("\n".join(lines), exit_code=SETTINGS_EXIT_CODE) from error
    except ValueError as error:
        raise fail(str(error), exit_code=SETTINGS_EXIT_CODE) from error


def _placed(job: FineTuneJob, namespace: str | None, uid: UUID | None) -> FineTuneJob:
    """`job` as if an API server had stored it."""
    metadata = job.metadata
    changes = {
        "namespace": namespace or metadata.namespace or DEFAULT_NAMESPACE,
        "uid": str(uid) if uid is not None else metadata.uid or PLACEHOLDER_UID,
    }
    return job.model_copy(update={"metadata": metadata.model_copy(update=changes)})


def _warnings(result: LoadResult, job: FineTuneJob, settings: OperatorSettings) -> Iterator[Problem]:
    from finetune_api.defaults import notices
    from finetune_api.problem import Problem
    from finetune_operator.desired import cluster_notices

    # The contract's own notices come again, more exactly, from the cluster's.
    repeated = {result.as_written(notice.below("spec")) for notice in notices(job)}
    yield from (warning for warning in result.warnings if warning not in repeated)
    if job.spec.suspend:
        suspended = Problem("spec.suspend", "the job is suspended: the operator creates these when suspend is false.")
        yield result.as_written(suspended)
    yield from map(result.as_written, cluster_notices(job, settings))
