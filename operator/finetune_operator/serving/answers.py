"""What happens with the answers of an application, whatever it serves."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler


def counted(app: web.Application, count: Callable[[int], None]) -> web.Application:
    """`app`, which from now on tells `count` the HTTP status of every answer."""

    @web.middleware
    async def count_answers(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except web.HTTPException as answer:
            count(answer.status)
            raise
        except Exception:  # aiohttp answers so
            count(500)
            raise
        count(response.status)
        return response

    app.middlewares.append(count_answers)
    return app


def one_each(app: web.Application, answered: Callable[[str, int], None]) -> web.Application:
    """`app`, which from now on ends every connection with its first answer.

    What a connection may cost is then what a request may cost, and nobody can hold one for later.

    Args:
        app: what is served.
        answered: told the client's address and the status of each answer.
    """

    @web.middleware
    async def end_connection(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except web.HTTPException as answer:
            answer.force_close()
            answered(request.remote or "", answer.status)
            raise
        response.force_close()
        answered(request.remote or "", response.status)
        return response

    app.middlewares.append(end_connection)
    return app
