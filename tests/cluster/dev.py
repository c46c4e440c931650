"""`make dev-cluster`: the control plane of the tests with the operator on it, for a person to play with."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.cluster.control_plane import ControlPlane, run_control_plane
from tests.cluster.kubelet import Reaper
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.player import Player
from tests.processes import StartError
from tests.s3_server import S3Server, run_s3_server
from tests.tools.build import ToolError, binary

TICK_SECONDS = 1.0
SLOW = {"resync_seconds": 30, "group_end_seconds": 10, "retry_base_seconds": 5, "pods_expected_seconds": 15}


def main(arguments: list[str] | None = None) -> int:
    """Run until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="make dev-cluster", description=__doc__)
    parser.add_argument("--play", action="store_true", help="let every job run and succeed in half a minute")
    play = parser.parse_args(arguments).play
    logging.basicConfig(format="%(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="finetune-dev-"))
    try:
        with ExitStack() as stack:
            _run(stack, folder, play=play)
    except KeyboardInterrupt:
        print(f"\nStopped. Logs are in {folder}")
    except (StartError, ToolError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(stack: ExitStack, folder: Path, *, play: bool) -> None:
    print("Starting etcd, kube-apiserver, kube-controller-manager, training operator, S3 server and operator …")
    plane = stack.enter_context(run_control_plane(folder))
    store = stack.enter_context(run_s3_server(folder / "s3"))
    settings = {**SLOW, "default_output_uri": f"s3://{store.new_bucket()}"}
    operator = OperatorProcess(plane, folder, settings)
    stack.callback(operator.stop)
    operator.start()
    reaper = Reaper(plane.api)
    reaper.start()
    stack.callback(reaper.stop)
    print(_welcome(plane, store, operator, play=play), flush=True)
    player = Player(plane, reaper, operator.progress_url)
    while True:
        time.sleep(TICK_SECONDS)
        if not operator.running:
            raise StartError(f"The operator has ended; {operator.server.log} ends with:\n{operator.server.log_tail()}")
        if play:
            player.tick()


def _welcome(plane: ControlPlane, store: S3Server, operator: OperatorProcess, *, play: bool) -> str:
    example = os.path.relpath(Path(__file__).parents[2] / "examples" / "llama-3.yaml")
    pods = "Jobs run and succeed by themselves." if play else "No kubelet runs: pods stay Pending (see --play)."
    return f"""
export KUBECONFIG={plane.admin_kubeconfig}
alias kubectl={binary("kubectl")}

kubectl apply -f {example}
kubectl get finetunejobs --watch

{pods} Object store: {store.endpoint}
Metrics: {operator.metrics_url}   Operator's log: {operator.server.log}
Ctrl-C stops everything."""


if __name__ == "__main__":
    sys.exit(main())
