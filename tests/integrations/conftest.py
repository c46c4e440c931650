"""What the tests of the cluster have, once more: a control plane of its own, which Kueue then changes for itself."""

from __future__ import annotations

from tests.cluster.conftest import (
    api,
    control_plane,
    kubelet,
    namespace,
    operator,
    operator_factory,
    pytest_runtest_call,
    pytest_runtest_makereport,
    reaper,
    shared_operator,
)

__all__ = [
    "api",
    "control_plane",
    "kubelet",
    "namespace",
    "operator",
    "operator_factory",
    "pytest_runtest_call",
    "pytest_runtest_makereport",
    "reaper",
    "shared_operator",
]
