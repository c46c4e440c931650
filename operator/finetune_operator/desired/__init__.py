"""What should exist in the cluster for a FineTuneJob. Pure: no client, no clock, no input or output, plain dicts out.

Every function takes the job as the API server holds it and fills in defaults itself, so none can be handed the wrong
one. They count on a job that `finetune_api.load` accepts and that has a namespace and a uid.
"""

from finetune_operator.desired.effective import effective_job
from finetune_operator.desired.job_config import (
    immutable_spec,
    job_config_map,
    placement,
    same_placement,
    same_training,
)
from finetune_operator.desired.notices import cluster_notices
from finetune_operator.desired.problems import job_problems
from finetune_operator.desired.pytorchjob import pytorch_job
from finetune_operator.desired.verification import verification_job

__all__ = [
    "cluster_notices",
    "effective_job",
    "immutable_spec",
    "job_config_map",
    "job_problems",
    "placement",
    "pytorch_job",
    "same_placement",
    "same_training",
    "verification_job",
]
