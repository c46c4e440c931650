"""Runs the trainer's launcher as a part of `finetune run`: when that is killed, nothing keeps training unseen.

Its own process group keeps a terminal's Ctrl-C from reaching it twice, and would also let it outlive the terminal.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from finetune_trainer.launch.command import main

POLL_SECONDS = 0.5


def end_with(parent: int) -> None:
    """End this process within a second after `parent` is gone; the trainer's workers then end by themselves."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(int(sys.argv[1]),), name="end-with-parent", daemon=True).start()
    sys.exit(main(sys.argv[2:]))
