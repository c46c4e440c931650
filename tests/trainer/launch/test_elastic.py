"""How many workers run on this node, and where they meet the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.job import FineTuneJob
from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.launch import elastic, environment
from finetune_trainer.launch.command import world_size_notice
from finetune_trainer.launch.elastic import NodeSettings, node_settings

SETTINGS: dict[str, tuple[dict[str, str], int, NodeSettings]] = {
    "a laptop": ({}, 0, NodeSettings(nproc=1, alone=True)),
    "a workstation with two GPUs": ({}, 2, NodeSettings(nproc=2, alone=True)),
    "our variable wins": (
        {"FINETUNE_NPROC_PER_NODE": "2", "PET_NPROC_PER_NODE": "3"},
        4,
        NodeSettings(nproc=2, alone=True),
    ),
    "two processes on the CPU": ({"FINETUNE_NPROC_PER_NODE": "2"}, 0, NodeSettings(nproc=2, alone=True)),
    "a PyTorchJob of one node": (
        {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "guard-master-0"},
        8,
        NodeSettings(nproc=8, alone=True),
    ),
    "a PyTorchJob of two nodes": (
        {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_MASTER_ADDR": "guard-master-0"},
        8,
        NodeSettings(nproc=8, alone=False),
    ),
    "the training operator's default, without GPUs": (
        {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto"},
        0,
        NodeSettings(nproc=1, alone=False),
    ),
    "the training operator's default, with GPUs": (
        {"PET_NNODES": "1:4", "PET_NPROC_PER_NODE": "auto"},
        4,
        NodeSettings(nproc=4, alone=False),
    ),
}


@pytest.mark.parametrize(("environ", "gpus", "settings"), SETTINGS.values(), ids=SETTINGS)
def test_settings_follow_the_environment(environ: dict[str, str], gpus: int, settings: NodeSettings) -> None:
    assert node_settings(environ, gpus=gpus) == settings


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_number_of_workers_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(JobError, match="FINETUNE_NPROC_PER_NODE") as caught:
        node_settings({"FINETUNE_NPROC_PER_NODE": text}, gpus=0)
    assert caught.value.reason is Reason.INVALID_SPEC


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(JobError, match="which shows 2 GPUs") as caught:
        node_settings({"FINETUNE_NPROC_PER_NODE": "4"}, gpus=2)
    assert caught.value.reason is Reason.WORLD_SIZE_MISMATCH


def arguments(settings: NodeSettings) -> list[str]:
    return elastic.torch_arguments(settings, free_port=4321, log_dir=Path("/tmp/x"), worker=["module", "job.yaml"])  # noqa: S108 - only a name


def test_alone_the_workers_meet_on_the_loopback_address() -> None:
    assert {"--nnodes=1", "--rdzv-backend=static", "--rdzv-endpoint=127.0.0.1:4321"} <= set(
        arguments(NodeSettings(nproc=2, alone=True))
    )


def test_with_other_nodes_the_place_comes_from_the_pytorchjob() -> None:
    given = arguments(NodeSettings(nproc=2, alone=False))
    assert not [argument for argument in given if "rdzv" in argument or "nnodes" in argument or "master" in argument]
    assert given[-3:] == ["--module", "module", "job.yaml"]


def test_elastic_restarts_nothing_and_redirects_nothing() -> None:
    assert {"--max-restarts=0", "--redirects=0", "--tee=0"} <= set(arguments(NodeSettings(nproc=1, alone=False)))


def test_what_the_user_set_for_the_workers_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "visible_gpus", lambda: 0)
    settings = NodeSettings(nproc=1, alone=True)
    waiting = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    assert set(elastic.worker_defaults(settings, {})) == {"OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", *waiting}
    own = {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}
    assert set(elastic.worker_defaults(settings, own)) == {"GLOO_SOCKET_IFNAME", "GOMP_SPINCOUNT"}
    assert "GLOO_SOCKET_IFNAME" not in elastic.worker_defaults(NodeSettings(nproc=1, alone=False), {})


def test_threads_may_spin_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "visible_gpus", lambda: 1)
    assert "OMP_WAIT_POLICY" not in elastic.worker_defaults(NodeSettings(nproc=1, alone=True), {})


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_gpu_memory_is_taken_in_segments_that_grow_unless_the_user_set_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings = NodeSettings(nproc=1, alone=False)
    monkeypatch.setattr(elastic, "visible_gpus", lambda: 0)
    assert "PYTORCH_ALLOC_CONF" not in elastic.worker_defaults(settings, {})
    monkeypatch.setattr(elastic, "visible_gpus", lambda: 1)
    assert elastic.worker_defaults(settings, {})["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in elastic.worker_defaults(settings, {name: "backend:native"})


@pytest.mark.parametrize(
    ("cores", "cpu_max", "workers", "threads"),
    [
        (16, None, 1, 16),
        (16, None, 4, 4),
        (2, None, 8, 1),
        (64, "400000 100000\n", 1, 4),
        (64, "350000 100000\n", 1, 4),
        (64, "50000 100000\n", 1, 1),
        (64, "max 100000\n", 2, 32),
    ],
)
def test_threads_are_a_share_of_the_cores_that_may_be_used(
    cores: int, cpu_max: str | None, workers: int, threads: int
) -> None:
    assert environment.threads_per_worker(cores=cores, cpu_max=cpu_max, workers=workers) == threads


@pytest.mark.parametrize(("environ", "seconds"), [({}, 25), ({"FINETUNE_GRACE_SECONDS": "110"}, 110)])
def test_the_grace_ends_before_the_pod_s(environ: dict[str, str], seconds: int) -> None:
    assert environment.grace_seconds(environ) == seconds


def test_a_smaller_machine_than_the_job_s_is_told_about() -> None:
    job = FineTuneJob.model_validate(
        {
            "metadata": {"name": "guard"},
            "spec": {"model_id": "m", "train_path": "t", "workers": {"nodes": 2, "gpusPerNode": 8}},
        }
    )
    notice = world_size_notice(job, NodeSettings(nproc=1, alone=True))
    assert notice is not None
    assert "asks for 16 worker processes and 1 run here" in notice
    assert world_size_notice(job, NodeSettings(nproc=16, alone=True)) is None
    assert world_size_notice(job, NodeSettings(nproc=8, alone=False)) is None
