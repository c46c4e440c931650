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
