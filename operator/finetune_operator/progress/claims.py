"""What a token says of itself, before anybody vouches for it: pure. Enough to refuse most without asking anybody.

A pod's token is a JWT. Whoever wants to can write one, so nothing here lets a report in; but one that does not even
claim to be of our audience, to be valid and to be a pod's is no reason to bother the API server.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson

CLOCK_TOLERANCE = timedelta(minutes=10)
"""How far the API server's clock may be from ours. The kubelet renews tokens when a fifth of their life is left."""


@dataclass(frozen=True)
class Claims:
    """Whose a token claims to be, and until when."""

    namespace: str
    pod: str | None
    """The pod that it is bound to; None for a service account's own."""
    expires: float
    """Seconds since 1970."""


def read_claims(token: str, audience: str, now: datetime) -> Claims | None:
    """What `token` claims; None when it cannot be a service account's valid token for `audience` (`now` is UTC)."""
    match _payload(token):
        case {
            "aud": audiences,
            "exp": int() | float() as expires,
            "sub": str() as subject,
            "kubernetes.io": {"namespace": str() as namespace, **bound},
        }:
            is_ours = audience in (audiences if isinstance(audiences, list) else [audiences])
            is_valid = expires > (now - CLOCK_TOLERANCE).timestamp()
            if is_ours and is_valid and subject.startswith(f"system:serviceaccount:{namespace}:"):
                return Claims(namespace, _pod(bound), float(expires))
    return None


def _pod(bound: Mapping[object, object]) -> str | None:
    match bound:
        case {"pod": {"name": str() as name}}:
            return name
    return None


def _payload(token: str) -> Any:
    """The JSON in the middle of a JWT, or None."""
    parts = token.split(".")
    if len(parts) != 3 or not all(parts) or not token.isascii():
        return None
    try:
        # Python skips characters that are not in the alphabet; what it makes of them is no JSON, or the server says no.
        return orjson.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except ValueError:
        return None
