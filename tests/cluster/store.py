"""An S3 server's side of a job on the tiny model: what is in its bucket, the Secret that reaches it, the spec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cluster.api import Object
from tests.s3_server import S3Server
from tests.trainer.run.tiny_job import SETTINGS, rows, tiny_model

SECRET = "object-store"


def tiny_bucket(store: S3Server, *, train_rows: int) -> str:
    """A bucket with the model and its data; returns its name."""
    name = store.new_bucket()
    upload(store, name, "model", tiny_model())
    for key, count, start in (("train.jsonl", train_rows, 0), ("valid.jsonl", 7, 100)):
        text = "".join(json.dumps(row) + "\n" for row in rows(count, start=start))
        store.client().put_object(Bucket=name, Key=key, Body=text.encode())
    return name


def upload(store: S3Server, bucket: str, prefix: str, folder: Path) -> None:
    """The files of a folder, below a prefix."""
    for file in folder.iterdir():
        store.client().upload_file(str(file), bucket, f"{prefix}/{file.name}")


def store_secret(store: S3Server, name: str = SECRET) -> Object:
    """The Secret by which jobs reach the store."""
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": store.environment()}


def tiny_spec(bucket: str, **more: Any) -> dict[str, Any]:
    """What to train, and where; keywords are keys of the spec."""
    return {
        "model_id": f"s3://{bucket}/model",
        "train_path": f"s3://{bucket}/train.jsonl",
        "valid_path": f"s3://{bucket}/valid.jsonl",
        **SETTINGS,
        "output": {"uri": f"s3://{bucket}/models"},
        "secrets": {"objectStore": {"name": SECRET}},
        **more,
    }
