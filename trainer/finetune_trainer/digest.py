"""One digest for what is compared, or found again, by all that it says."""

from __future__ import annotations

import hashlib
import json


def digest_of(value: object) -> str:
    """Hex digest of `value` as JSON, whatever the order of its keys; what JSON has no form for as text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
