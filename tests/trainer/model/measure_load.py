"""Loads a model folder and prints how much memory that took: run as a process of its own by test_load_memory.py.

Arguments: the folder, the precision. Prints a JSON object of bytes.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch

from finetune_trainer.model.load import load_config, load_model


def status(key: str) -> int:
    """A row of /proc/self/status in bytes."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(key))


def main() -> None:
    folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        # Whatever the class imports is not counted.
        AutoModelForCausalLM.from_config(load_config(folder, trust_remote_code=False))
    Path("/proc/self/clear_refs").write_text("5")
    resident, anonymous = status("VmRSS"), status("RssAnon")
    highest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(folder, dtype=dtype, trust_remote_code=False)
    done.set()
    watcher.join()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    found = {"model": size, "resident": status("VmHWM") - resident, "anonymous": highest - anonymous}
    found["left"] = status("RssAnon") - anonymous
    print(json.dumps(found))


if __name__ == "__main__":
    main()
