"""Renderers that end the process they run in, or its work; in a module that a worker can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api.prompt_format import Message, Rendering
from finetune_trainer.data.render import FormatRenderer, Tools

FATAL = "fatal"
"""A conversation in which a message is this is the last one."""


SLEEP_SECONDS = 20
"""Long enough to be missed, and over before the session is."""


@dataclass
class DeadlyRenderer:
    """As `inner`, up to the fatal conversation."""

    inner: FormatRenderer
    death: str
    portable: bool = True
    bos: str | None = None

    def render(self, messages: Sequence[Message], _: Tools = ()) -> list[Rendering]:
        if any(message.content == FATAL for message in messages):
            if self.death == "exception":
                raise MemoryError("no more")
            if self.death == "sleep":
                time.sleep(SLEEP_SECONDS)
                return self.inner.render(messages)
            os.kill(os.getpid(), signal.Signals[self.death])
        return self.inner.render(messages)

    def prompt(self, messages: Sequence[Message], _: Tools = ()) -> str:
        return self.inner.prompt(messages)
