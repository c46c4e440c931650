"""What GitOps tools make of a job's status: their own rules and interpreters, on recorded statuses.

Argo CD runs Lua 5.1 with the libraries base and table alone; Flux evaluates CEL with the object's keys as variables;
both, and Helm 4, otherwise know what kstatus knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from cel_expr_python import cel  # type: ignore[import-untyped]
from lupa.lua51 import LuaError, LuaRuntime  # type: ignore[import-untyped]

from tests.cluster.api import Object
from tests.integrations.kstatus import CURRENT, FAILED, IN_PROGRESS, is_behind, kstatus
from tests.integrations.recordings import CUSTOMIZATION, ROOT, stored

INTEGRATIONS = ROOT / "integrations"
HEALTH_LUA = (CUSTOMIZATION / "health.lua").read_text()
HEALTH_TESTS = yaml.safe_load((CUSTOMIZATION / "health_test.yaml").read_text())["tests"]
RECORDINGS = stored()

JUDGED = {
    "new": ("Progressing", IN_PROGRESS, IN_PROGRESS),
    "edited": ("Progressing", IN_PROGRESS, IN_PROGRESS),
    "pending": ("Progressing", IN_PROGRESS, IN_PROGRESS),
    "invalid": ("Degraded", FAILED, FAILED),
    "queued": ("Progressing", IN_PROGRESS, IN_PROGRESS),
    "starting": ("Progressing", IN_PROGRESS, IN_PROGRESS),
    "preparing": ("Progressing", IN_PROGRESS, IN_PROGRESS),
    "running": ("Progressing", IN_PROGRESS, IN_PROGRESS),
    "publishing": ("Progressing", IN_PROGRESS, IN_PROGRESS),
    "suspending": ("Progressing", IN_PROGRESS, IN_PROGRESS),
    # As it was asked to be, says kstatus; without an adapter yet, say our expressions.
    "suspended": ("Suspended", CURRENT, IN_PROGRESS),
    "retrying": ("Progressing", IN_PROGRESS, IN_PROGRESS),
    "succeeded": ("Healthy", CURRENT, CURRENT),
    "failed": ("Degraded", FAILED, FAILED),
}
"""Recording -> health in Argo CD, in kstatus, and in Flux with our expressions."""

SANDBOX = """
debug.setmetatable("", nil)
for name in pairs(_G) do
  if not ({_G = 1, assert = 1, error = 1, getmetatable = 1, ipairs = 1, next = 1, pairs = 1, pcall = 1, rawequal = 1,
           rawget = 1, rawset = 1, select = 1, setmetatable = 1, table = 1, tonumber = 1, tostring = 1, type = 1,
           unpack = 1, xpcall = 1})[name] then
    _G[name] = nil
  end
end
"""
"""Takes away what Argo CD does not give to scripts of argocd-cm, methods of strings among it."""


def argo_health(job: Object, script: str = HEALTH_LUA) -> dict[str, Any]:
    """What Argo CD's Lua makes of it."""
    lua = LuaRuntime()
    lua.execute(SANDBOX)
    lua.globals().obj = lua.table_from(job, recursive=True)
    return dict(lua.execute(script))


def flux_health(job: Object, expressions: dict[str, str]) -> str:
    """What Flux makes of it, in the order of its RFC 9: generation, then inProgress, failed, current."""
    if is_behind(job):
        return IN_PROGRESS
    environment = cel.NewEnv(variables=dict.fromkeys(job, cel.Type.DYN))
    for name, answer in (("inProgress", IN_PROGRESS), ("failed", FAILED), ("current", CURRENT)):
        result = environment.compile(expressions[name]).eval(data=job)
        assert result.type() == cel.Type.BOOL, f"{name}: {result.value()}"
        if result.value():
            return answer
    return IN_PROGRESS


def flux_expressions() -> dict[str, str]:
    """Of the published Kustomization."""
    kustomization = yaml.safe_load((INTEGRATIONS / "flux" / "kustomization.yaml").read_text())
    (found,) = kustomization["spec"]["healthCheckExprs"]
    assert (found.pop("apiVersion"), found.pop("kind")) == ("finetune.dev/v1alpha1", "FineTuneJob")
    return dict(found)


def test_every_recording_is_judged() -> None:
    assert JUDGED.keys() == RECORDINGS.keys()
    assert {Path(test["inputPath"]).stem for test in HEALTH_TESTS} == RECORDINGS.keys()


@pytest.mark.parametrize("test", HEALTH_TESTS, ids=lambda test: Path(test["inputPath"]).stem)
def test_argo_cd_sees(test: dict[str, Any]) -> None:
    """As Argo CD's own tests of its customizations do: status and message, to the letter."""
    job = yaml.safe_load((CUSTOMIZATION / test["inputPath"]).read_text())
    assert argo_health(job) == test["healthStatus"]
    assert test["healthStatus"]["status"] == JUDGED[Path(test["inputPath"]).stem][0]


@pytest.mark.parametrize("name", JUDGED)
def test_kstatus_sees(name: str) -> None:
    assert kstatus(RECORDINGS[name]) == JUDGED[name][1]


@pytest.mark.parametrize("name", JUDGED)
def test_flux_sees(name: str) -> None:
    assert flux_health(RECORDINGS[name], flux_expressions()) == JUDGED[name][2]


@pytest.mark.parametrize("status", [None, {}, {"conditions": []}])
def test_argo_cd_waits_where_there_is_no_status(status: dict[str, Any] | None) -> None:
    """As with a definition of the kind that is older than this release."""
    job = {key: value for key, value in RECORDINGS["new"].items() if key != "status"}
    assert argo_health(job if status is None else {**job, "status": status})["status"] == "Progressing"


def test_the_sandbox_has_no_more_than_argo_cd_gives() -> None:
    for script in ("io.open('x')", "('x'):upper()", "string.upper('x')", "os.exit()", "require('io')"):
        with pytest.raises(LuaError, match="attempt to"):
            argo_health(RECORDINGS["new"], f"return {script}")


def test_the_script_for_argocd_cm_is_the_same() -> None:
    config_map = yaml.safe_load((INTEGRATIONS / "argocd" / "argocd-cm.yaml").read_text())
    assert config_map["data"] == {"resource.customizations.health.finetune.dev_FineTuneJob": HEALTH_LUA}
