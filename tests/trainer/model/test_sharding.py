"""A base that processes share computes what it computes whole, is loaded as it is, and is gathered no more than needed.

The processes are real and FSDP is: two nodes of two processes each, which talk through gloo. With FAULTS=all there are
more cases, and nodes of other sizes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.model.load_shards import Kind, agree
from finetune_trainer.model.sharding import choose_sharding, mesh_shape, sharding_notice
from tests.trainer.model.sharded_cases import LOADINGS, TRAININGS

ALL = os.environ.get("FAULTS") == "all"
SAMPLE = {"head apart, checkpointing", "own rows", "embedded outside the decoder", "experts"}
LOADED_SAMPLE = {"tied", "experts stacked", "own code"}
SHAPES = [(4, 2), (2, 2), (4, 4)] if ALL else [(4, 2)]
"""Processes in all, and of a node."""

GIB = 2**30


@pytest.mark.parametrize(
    ("asked", "world_size", "base_gib", "memory_gib", "shared"),
    [
        ("auto", 1, 100, 80, False),
        ("auto", 8, 10, 80, False),
        ("auto", 8, 60, 80, True),
        ("auto", 2, 100, None, False),
        ("fsdp", 1, 1, 80, False),
        ("fsdp", 8, 1, 80, True),
        ("fsdp", 2, 1, None, True),
        ("ddp", 8, 100, 80, False),
    ],
)
def test_the_base_is_shared_when_asked_or_when_it_does_not_fit(
    asked: str, world_size: int, base_gib: int, memory_gib: int | None, shared: bool
) -> None:
    memory = None if memory_gib is None else memory_gib * GIB
    assert choose_sharding(asked, world_size=world_size, base_bytes=base_gib * GIB, memory_bytes=memory) is shared


@pytest.mark.parametrize(("asked", "world_size", "notices"), [("fsdp", 1, 1), ("fsdp", 2, 0), ("auto", 1, 0)])
def test_sharding_that_has_no_effect_is_said(asked: str, world_size: int, notices: int) -> None:
    assert len(sharding_notice(asked, world_size=world_size)) == notices


@pytest.mark.parametrize(
    ("world_size", "local_world_size", "base_gib", "memory_gib", "shape"),
    [
        (8, 8, 140, 80, (8,)),
        (16, 8, 140, 80, (2, 8)),
        (16, 8, 810, 80, (16,)),  # more than a node holds
        (4, 1, 100, 80, (4,)),  # a process alone shares with nobody
        (12, 8, 140, 80, (12,)),  # nodes of different sizes
        (4, 2, 1000, None, (2, 2)),
    ],
)
def test_each_node_has_a_copy_where_it_fits(
    world_size: int, local_world_size: int, base_gib: int, memory_gib: int | None, shape: tuple[int, ...]
) -> None:
    memory = None if memory_gib is None else memory_gib * GIB
    assert mesh_shape(world_size, local_world_size, base_bytes=base_gib * GIB, memory_bytes=memory) == shape


Results = dict[tuple[int, int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each process found of each case, by shape."""
    names = [f"train {name}" for name in TRAININGS if ALL or name in SAMPLE]
    names += [f"load {name}" for name in LOADINGS if ALL or name in LOADED_SAMPLE]
    found = {}
    for shape in SHAPES:
        folder = tmp_path_factory.mktemp("sharded")
        command = [sys.executable, "-m", "tests.trainer.model.sharded_processes", folder, *shape, *names, "measure"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=Path(__file__).parents[3])
        assert done.returncode == 0, done.stderr
        found[shape] = json.loads((folder / "results.json").read_text())
    return found


def of_all(results: Results, shape: tuple[int, int], name: str) -> list[dict[str, Any]]:
    """What each process found."""
    if name not in results[shape][0]:
        pytest.skip("with FAULTS=all")
    return [each[name] for each in results[shape]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TRAININGS)
def test_losses_and_gradients_are_those_of_one_process(results: Results, shape: tuple[int, int], name: str) -> None:
    for found in of_all(results, shape, f"train {name}"):
        assert found["loss"] < 1e-5
        assert found["gradient"] < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TRAININGS)
def test_layers_are_found_and_saved_as_of_a_whole_model(results: Results, shape: tuple[int, int], name: str) -> None:
    for found in of_all(results, shape, f"train {name}"):
        assert found["reach"]
        assert found["adapter"] < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TRAININGS)
def test_a_step_gathers_each_weight_once_for_each_pass(results: Results, shape: tuple[int, int], name: str) -> None:
    """Layers once forwards and once backwards, computed again or not; embeddings and the head once."""
    for found in of_all(results, shape, f"train {name}"):
        gathers = found["gathers"]
        assert gathers.pop("") in (0, 1)  # the norm behind the layers, which stays whole from evaluation on
        once = {name for name in gathers if "embed" in name or name.startswith(("lm_head", "wte", "wpe"))}
        assert once
        assert gathers == {name: 1 if name in once else 2 for name in gathers}
        assert len(gathers) - len(once) >= found["layers"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TRAININGS)
def test_a_process_holds_its_share_of_the_weights(results: Results, shape: tuple[int, int], name: str) -> None:
    for found in of_all(results, shape, f"train {name}"):
        assert found["held"] < 1 / shape[1] + 0.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOADINGS)
def test_every_tensor_is_what_loading_makes_of_it(results: Results, shape: tuple[int, int], name: str) -> None:
    for found in of_all(results, shape, f"load {name}"):
        assert found == {"wrong": [], "same": True, "left": 0, "training": False}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loading_takes_a_process_little_more_than_its_share(results: Results, shape: tuple[int, int]) -> None:
    for found in of_all(results, shape, "measure"):
        # The share of the largest layer, 16 MB, while it is put together, and pieces of 4 MB on their way. A whole
        # model would take 71 MB more.
        assert found["taken"] < found["model"] / shape[1] + 30_000_000


def test_a_model_that_is_loaded_as_another_is_refused() -> None:
    import torch

    wanted: dict[str, Kind] = {"weight": ((2, 3), torch.float32), "scale": ((1,), torch.float32)}
    with pytest.raises(JobError, match=r"own/model cannot be shared .* \(bias\)") as caught:
        agree(torch.nn.Linear(3, 2), wanted, "own/model")
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED
