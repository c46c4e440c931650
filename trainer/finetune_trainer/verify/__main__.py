"""`python -m finetune_trainer.verify --job JOB.yaml --adapter ADDRESS`: verifies a published adapter in a pod."""

from __future__ import annotations

import sys

from finetune_trainer.verify.command import main

if __name__ == "__main__":
    sys.exit(main())
