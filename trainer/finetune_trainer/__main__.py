"""`python -m finetune_trainer JOB.yaml`: one whole attempt of a job, as it runs in a pod and on a laptop."""

from __future__ import annotations

import sys

from finetune_trainer.launch.command import main

if __name__ == "__main__":
    sys.exit(main())
