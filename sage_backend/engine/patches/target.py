# SPDX-License-Identifier: Apache-2.0
"""How patches reach what they replace, and what they say where the installed vLLM does not have it."""

import importlib
from collections.abc import Callable
from typing import Any

from sage_backend import TESTED_VLLM

_WORKERS = "vllm.v1.worker.worker_base"


class PatchError(RuntimeError):
    """A patch has no target in the installed vLLM."""

    def __init__(self, patch: str, target: str) -> None:
        version = importlib.import_module("vllm").__version__
        name = patch.rpartition(".")[2]
        super().__init__(
            f"sage-backend's patch {name!r} replaces {target}, which vLLM {version} does not have; "
            f"install vLLM {', '.join(TESTED_VLLM[:-1])} or {TESTED_VLLM[-1]}, or uninstall sage-backend"
        )


def attribute(patch: str, owner: Any, name: str) -> Any:
    """The attribute `name` of a module, a class or an object of vLLM's. patch: the patch's module, for the error.

    Raises PatchError if there is no such attribute.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        of = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__qualname__
        raise PatchError(patch, f"{of}.{name}") from None


def find(patch: str, module: str, *names: str) -> Any:
    """`names[0]` of a module of vLLM's, `names[1]` of that, and so on. Raises PatchError if one of them is missing."""
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            raise PatchError(patch, module) from None
        raise  # a dependency of vLLM's is not installed
    for name in names:
        found = attribute(patch, found, name)
    return found


def wrap(patch: str, owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Set `owner.name` to what `wrapper` makes of it. Raises PatchError if there is no such attribute."""
    setattr(owner, name, wrapper(attribute(patch, owner, name)))


def wrap_worker_method(patch: str, name: str, wrapper: Callable[[Any], Any], in_base: bool = True) -> None:
    """Set `WorkerWrapperBase.name` to what `wrapper` makes of a call of the worker's method of this name.

    vLLM's wrapper of workers hands methods that it does not define to its worker, of whatever class, so a method that it does
    define is in front of that of every worker. in_base: whether WorkerBase declares the method, which is checked then.
    Raises PatchError if vLLM's classes are not like that.
    """
    base = find(patch, _WORKERS, "WorkerWrapperBase")
    attribute(patch, base, "__getattr__")
    if in_base:
        find(patch, _WORKERS, "WorkerBase", name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.worker, name)(*args, **kwargs)

    setattr(base, name, wrapper(call))
