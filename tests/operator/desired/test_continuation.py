"""The first attempt's ConfigMap, which tenants may write anew, gives them no more rights."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.load import load_job
from finetune_operator.desired.continuation import continued
from tests.operator.desired.built import config_map, stored


@pytest.mark.parametrize("written", [{}, {"trust_remote_code": False}])
@pytest.mark.parametrize("attempt", [1, 2])
def test_whoever_writes_the_first_config_map_anew_does_not_let_a_models_own_code_run(
    written: dict[str, Any], attempt: int
) -> None:
    forged = config_map(stored(trust_remote_code=True))
    job = continued(stored(**written), forged)
    made = load_job(config_map(job, attempt=attempt)["data"]["job.yaml"], source="job.yaml").job
    assert made is not None
    assert made.spec.trust_remote_code is False
