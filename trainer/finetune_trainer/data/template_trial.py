"""Chat templates that never end, or take all memory: found out by a process that can be killed.

A template is a foreign program. Jinja's sandbox keeps it from the machine, but not from a loop within a loop or from a
text of a terabyte, for which Python's one lock is never released: no thread of ours could stop it.
"""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
from typing import Any

from finetune_api.outcome import Reason
from finetune_trainer.errors import JobError

_CPU_SECONDS, _WALL_SECONDS = 10, 120
"""Published templates take milliseconds. A busy machine may take long to start a process."""

_MEMORY_BYTES = 1 << 30
_OUT_OF_MEMORY = 3
"""Exit code of the process."""

_ROLES = (
    ("user",),
    ("system", "user"),
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
)


def refuse_endless(tokenizer: Any) -> None:
    """Refuse a chat template that does not render some short conversations in a moment, in little memory.

    Args:
        tokenizer: transformers' tokenizer; without a template, or with several, nothing is tried.

    Raises:
        JobError: InvalidSpec.
    """
    if isinstance(tokenizer.chat_template, str):
        names = json.dumps({key: str(value) for key, value in tokenizer.special_tokens_map.items()}, sort_keys=True)
        _refuse(tokenizer.chat_template, names)


@functools.lru_cache(maxsize=16)
def _refuse(template: str, special_tokens: str) -> None:
    command = [sys.executable, "-m", "finetune_trainer.data.template_trial", str(_CPU_SECONDS), str(_MEMORY_BYTES)]
    given = json.dumps([template, json.loads(special_tokens)])
    try:
        code = subprocess.run(
            command, input=given, text=True, timeout=_WALL_SECONDS, stderr=subprocess.DEVNULL, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        code = -1
    if code == 0:
        return
    fault = "takes more than a gigabyte of memory" if code == _OUT_OF_MEMORY else "does not come to an end"
    raise JobError(
        Reason.INVALID_SPEC,
        f"The chat template of the model's tokenizer {fault} for a conversation of a few words: write system, user and "
        "assistant formats in generation_config.prompt_format instead.",
    )


def _try(template: str, names: dict[str, str]) -> None:
    """Render; whatever the template raises is for those to judge who render with it."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  # as jinja2 has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_inner"), [], [], body).set_lineno(line)

        def _inner(self, caller: Any) -> Any:
            return caller()

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda _: "1 January 2026"}
    compiled = environment.from_string(template)
    for roles in _ROLES:
        messages = [{"role": role, "content": f"A {role}'s text."} for role in roles]
        try:
            compiled.render(
                messages=messages, add_generation_prompt=roles[-1] == "user", tools=None, documents=None, **names
            )
        except MemoryError:
            raise
        except Exception:  # noqa: S112  # as said above
            continue


def main(given: str, cpu_seconds: int, memory_bytes: int) -> int:
    """The process: `given` is JSON of the template and the special tokens by name."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    try:
        _try(*json.loads(given))
    except MemoryError:
        return _OUT_OF_MEMORY
    except Exception:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.stdin.read(), *map(int, sys.argv[1:])))
