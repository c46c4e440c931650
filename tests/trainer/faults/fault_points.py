"""Named places of a run at which a fault can happen, each found by a function that will be there for long.

Of most points the name says it all; those in the midst of a file have written half of it.
"""

from __future__ import annotations

import functools
import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

Fire = Callable[[], None]
Install = Callable[[Fire], None]

STEPS = 12
"""Steps of the job."""
SAVED = (4, 8, 12)
"""Steps after which it is evaluated and saved."""


class Steps:
    """Counts the optimizer steps that this process has made."""

    def __init__(self) -> None:
        self.begun = False
        """Whether there is an optimizer: what ran before were trials."""
        self.made = 0
        replace("torch.optim:Optimizer.__init__", self._begin)
        register_optimizer_step_post_hook(self._count)

    def _begin(self, init: Any) -> Any:
        def beginning(*args: Any, **kwargs: Any) -> None:
            self.begun = True
            init(*args, **kwargs)

        return beginning

    def _count(self, *_: Any) -> None:
        self.made += 1

    def computes(self, module: torch.nn.Module, made: int) -> bool:
        """Whether `module` runs at the beginning of a batch, with so many steps made."""
        return isinstance(module, torch.nn.Embedding) and self.begun and self.made == made


def on_call(
    address: str, *, at: int = 1, after: bool = False, of: Callable[..., bool] = lambda *_, **__: True
) -> Install:
    """Before or after the call number `at` of a function or method, of the calls whose arguments are `of`.

    Args:
        address: `module:function` or `module:Class.method`.
    """

    def install(fire: Fire) -> None:
        calls = 0

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += of(*args, **kwargs)
                now = calls == at and of(*args, **kwargs)
                if now and not after:
                    fire()
                found = original(*args, **kwargs)
                if now and after:
                    fire()
                return found

            return wrapped

        replace(address, wrap)

    return install


def replace(address: str, wrap: Callable[[Any], Any]) -> None:
    """Put something else in the place of a function, wherever a module has imported it, or of a method."""
    module_name, _, path = address.partition(":")
    holder: Any = importlib.import_module(module_name)
    *outer, name = path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    original = getattr(holder, name)
    wrapped = wrap(original)
    setattr(holder, name, wrapped)
    if not outer:
        for module in list(sys.modules.values()):
            if module.__name__.startswith("finetune_trainer") and module.__dict__.get(name) is original:
                setattr(module, name, wrapped)


def before_step(step: int) -> Install:
    """The gradients of `step` are there, its update is not."""

    def install(fire: Fire) -> None:
        steps = Steps()
        register_optimizer_step_pre_hook(lambda *_: fire() if steps.made == step - 1 else None)

    return install


def in_forward(step: int) -> Install:
    """The first batch of `step`."""

    def install(fire: Fire) -> None:
        steps, fired = Steps(), False

        def hook(module: torch.nn.Module, _: Any) -> None:
            nonlocal fired
            if not fired and torch.is_grad_enabled() and steps.computes(module, step - 1):
                fired = True
                fire()

        torch.nn.modules.module.register_module_forward_pre_hook(hook)

    return install


def in_evaluation(step: int) -> Install:
    """A batch of the evaluation after `step`."""

    def install(fire: Fire) -> None:
        steps, fired = Steps(), False

        def hook(module: torch.nn.Module, _: Any) -> None:
            nonlocal fired
            if not fired and not torch.is_grad_enabled() and steps.computes(module, step):
                fired = True
                fire()

        torch.nn.modules.module.register_module_forward_pre_hook(hook)

    return install


def poison(step: int) -> None:
    """Make a gradient of this rank NaN in `step`, before ranks add theirs up; in the first, before the update."""
    steps = Steps()

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameter = optimizer.param_groups[0]["params"][0]
        if step == 1 and steps.made == 0:
            parameter.grad.fill_(torch.nan)
        elif steps.made == step - 2:
            parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))

    register_optimizer_step_pre_hook(hook)


def in_upload(of: Callable[[str], bool]) -> Install:
    """Half of the first file whose key is `of` has been written."""

    def install(fire: Fire) -> None:
        copy, uploading = shutil.copyfileobj, False

        def half(source: Any, target: Any, *args: Any) -> None:
            nonlocal uploading
            if uploading:
                content = source.read()
                target.write(content[: len(content) // 2])
                target.flush()
                uploading = False
                fire()
                target.write(content[len(content) // 2 :])
            copy(source, target, *args)

        def wrap(original: Any) -> Any:
            done = False

            def upload_file(self: Any, file: Path, key: str) -> None:
                nonlocal uploading, done
                uploading, done = of(key) and not done, done or of(key)
                original(self, file, key)

            return upload_file

        shutil.copyfileobj = half  # type: ignore[assignment]
        replace(f"{_STORE}.upload_file", wrap)

    return install


def in_removal(fire: Fire) -> None:
    """One file of a checkpoint that is not kept has been removed."""
    remove = shutil.rmtree

    def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).parent.name == "checkpoints":
            next(file for file in Path(path).iterdir() if file.is_file()).unlink()
            fire()
        remove(path, *args, **kwargs)

    shutil.rmtree = rmtree  # type: ignore[assignment]


_STORE = "finetune_trainer.storage.local_store:LocalStore"


def _manifest(folder: str) -> Callable[..., bool]:
    return lambda _self, *args: any(
        isinstance(key, str) and key.startswith(folder) and key.endswith("/manifest.json") for key in args
    )


POINTS: dict[str, Install] = {
    "fetching the data": on_call("finetune_trainer.storage.fetch:fetch_file"),
    "tokenizing": on_call("finetune_trainer.data.tokenized_data:Writer.add", after=True),
    "writing the cache": on_call("finetune_trainer.data.tokenized_data:Writer.finish", after=True),
    "fetching the model": on_call("finetune_trainer.pins:fetch_weights"),
    "loading the model": on_call("finetune_trainer.model.load:load_model", after=True),
    "step 1": before_step(1),
    "step 6": before_step(6),
    "the last step": before_step(STEPS),
    "evaluating": in_evaluation(SAVED[0]),
    "evaluating at the end": in_evaluation(STEPS),
    "writing a checkpoint": on_call("torch:save"),
    "writing the last checkpoint": on_call("torch:save", at=2 * len(SAVED)),
    "uploading a checkpoint": in_upload(lambda key: key.startswith("checkpoints/")),
    "before a checkpoint's manifest": on_call(f"{_STORE}.upload_file", of=_manifest("checkpoints/")),
    "before removing checkpoints": on_call(f"{_STORE}.upload_file", at=2, after=True, of=_manifest("checkpoints/")),
    "removing a checkpoint": in_removal,
    "writing the adapter": on_call("finetune_trainer.data.load_tokenizer:save_tokenizer"),
    "uploading the adapter": in_upload(lambda key: key.startswith("adapter/") and key > "adapter/c"),
    "before the adapter's manifest": on_call(f"{_STORE}.write_bytes", of=_manifest("adapter/")),
    "after the adapter's manifest": on_call(f"{_STORE}.write_bytes", after=True, of=_manifest("adapter/")),
    "merging": on_call("finetune_trainer.merge.folder:copy_small_files"),
    "after merging": on_call("finetune_trainer.merge.merge:merge", after=True),
}
"""By what the run is doing; in the order of a run."""

FORWARDS: dict[str, Install] = {f"the forward pass of step {step}": in_forward(step) for step in (1, 2, 6, STEPS)}
"""Points at which memory may run out, besides the evaluations."""

PREPARING = tuple(POINTS)[: tuple(POINTS).index("step 1")]
"""Nothing is trained yet."""
PUBLISHING = tuple(POINTS)[tuple(POINTS).index("writing the adapter") :]
"""All is trained."""
EVERYWHERE = ("loading the model", "step 1", "step 6", "the last step", "evaluating", "evaluating at the end")
"""What every rank does; the rest is done by the first."""
