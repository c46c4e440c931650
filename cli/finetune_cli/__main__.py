"""`python -m finetune_cli`, for where the script `finetune` is not on the path."""

from __future__ import annotations

from finetune_cli.main import app

if __name__ == "__main__":
    app()
