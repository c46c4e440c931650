"""What aiohttp may say in our log: bugs, and nothing that a client can make it say as often as it likes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from aiohttp.http_exceptions import HttpProcessingError

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter


class ServerLog(_Adapter):
    """A logger for aiohttp's server: a request that is no HTTP is answered with 400 and is no line, let alone 30."""

    def exception(self, msg: object, *args: object, exc_info: Any = True, **more: Any) -> None:
        """Log an exception, unless it says that a request is malformed."""
        if not isinstance(exc_info, HttpProcessingError):
            super().exception(msg, *args, exc_info=exc_info, **more)
