"""Receives the progress that trainers post, in the protocol of Kubeflow Trainer's runtime status endpoint.

Who a token belongs to and what happens with a report are the caller's: the operator asks the API server and wakes its
queue, `finetune run` knows one token and draws a bar. So this module knows aiohttp and the contract, nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from aiohttp import web
from pydantic import ValidationError

from finetune_api.outcome import PROGRESS_BODY_LIMIT_BYTES, ProgressReport, TrainerStatus
from finetune_operator.progress.refusals import ReportRefused

READ_TIMEOUT_SECONDS = 5.0
"""How long a client may take to send its body; a report fits into one packet."""
AUTHORIZE_TIMEOUT_SECONDS = 10.0
"""How long `authorize` may take; after that the client is told to try again."""

Key = TypeVar("Key")

_log = logging.getLogger(__name__)


def progress_app(
    authorize: Callable[[str], Awaitable[Key | None]],
    deliver: Callable[[Key, TrainerStatus], None],
    *,
    read_timeout_seconds: float = READ_TIMEOUT_SECONDS,
    authorize_timeout_seconds: float = AUTHORIZE_TIMEOUT_SECONDS,
) -> web.Application:
    """An application that takes `POST <any path>` with a bearer token and a `ProgressReport` as JSON.

    The path is not looked at: whose progress it is follows from the token alone, so a client cannot name another's
    job. Answers carry `{}` or `{"error": "<one sentence>"}`:

    - 200 the report was delivered
    - 400 the body is not a progress report; 413 it is larger than PROGRESS_BODY_LIMIT_BYTES; 415 it is compressed
    - 401 no bearer token, or one that nobody knows; 403 it may not report here
    - 405 not a POST; 408 the body did not arrive in time
    - 503 `authorize` failed or took too long: the client may try again

    Args:
        authorize: the token's key, or None for an unknown token; raises ReportRefused, or anything else when it
            cannot tell.
        deliver: takes the report; it runs on the event loop and must not block.
        read_timeout_seconds: see READ_TIMEOUT_SECONDS.
        authorize_timeout_seconds: see AUTHORIZE_TIMEOUT_SECONDS.
    """

    async def receive(request: web.Request) -> web.Response:
        token = _bearer_token(request)
        if token is None:
            return _refusal(401, "Send the token of the job as 'Authorization: Bearer <token>'.")
        try:
            async with asyncio.timeout(authorize_timeout_seconds):
                key = await authorize(token)
        except ReportRefused as refused:
            return _refusal(refused.status, str(refused))
        except Exception as error:  # an authorizer that cannot be asked must look different from one that says no
            # Only the kind of error: its text may quote the token.
            _log.error("A progress token could not be checked: %s.", type(error).__name__)
            return _refusal(503, "The token cannot be checked now; try again.")
        if key is None:
            return _refusal(401, "The token is not known.")

        # aiohttp would unpack such a body before its size is known.
        if "Content-Encoding" in request.headers:
            return _refusal(415, "Send the report uncompressed.")
        try:
            async with asyncio.timeout(read_timeout_seconds):
                body = await request.read()
        except TimeoutError:
            return _refusal(408, f"The report did not arrive within {read_timeout_seconds:g} s.")
        except web.HTTPRequestEntityTooLarge:
            return _refusal(413, f"A report has at most {PROGRESS_BODY_LIMIT_BYTES} bytes.")
        try:
            report = ProgressReport.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the body"
            return _refusal(400, f"This is not a progress report: {where}: {first['msg']}.")
        deliver(key, report.trainer_status)
        return web.json_response({})

    app = web.Application(client_max_size=PROGRESS_BODY_LIMIT_BYTES)
    app.router.add_post("/{path:.*}", receive)
    return app


def _bearer_token(request: web.Request) -> str | None:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _refusal(status: int, sentence: str) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return web.json_response({"error": sentence}, status=status, headers=headers)
