# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, without its redundant work."""

from types import FunctionType
from typing import Any


def leave_arguments_in_place() -> None:
    """Keep the interpreter from copying every argument's memory onto itself when a kernel has ended.

    It copies to and from the CPU, where all tensors are. Memory that is only reserved would be allocated by that.
    """
    from triton.runtime import interpreter

    interpreter.GridExecutor._restore_args_dev = lambda *_: None


def patch_language_once() -> None:
    """Put the interpreter's functions into `triton.language` once per kernel, and not again in each function that it calls.

    The interpreter (Triton 3.6) goes through all members of `triton.language` whenever one function calls another. It finds its
    own functions in place already, and sets the other members to their present values. That took a sixth of the time of the
    kernel tests.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: set[int] = set()

    def patch_what_is_not(fn: FunctionType) -> Any:
        modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if modules and modules <= patched:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        if not patched:  # a kernel starts, and restores the language when it ends
            patched.update(modules)
            restore = scope.restore

            def restore_and_forget() -> None:
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_what_is_not
