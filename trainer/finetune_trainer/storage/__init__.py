"""Everything that leaves or enters the machine: inputs are fetched, results are published.

Local folders, S3 and the Hugging Face Hub look the same from outside, and fail with the same JobErrors.
"""

from finetune_trainer.storage.addresses import open_store
from finetune_trainer.storage.fetch import (
    FetchedModel,
    default_cache_dir,
    fetch_adapter,
    fetch_file,
    fetch_model,
    fetch_tokenizer,
)
from finetune_trainer.storage.manifest import MANIFEST_NAME, FileEntry, Manifest, build_manifest, write_manifest
from finetune_trainer.storage.store import ObjectStore, read_manifest

__all__ = [
    "MANIFEST_NAME",
    "FetchedModel",
    "FileEntry",
    "Manifest",
    "ObjectStore",
    "build_manifest",
    "default_cache_dir",
    "fetch_adapter",
    "fetch_file",
    "fetch_model",
    "fetch_tokenizer",
    "open_store",
    "read_manifest",
    "write_manifest",
]
