# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, without its redundant work."""

import functools
from dataclasses import replace
from types import FunctionType, SimpleNamespace
from typing import Any


def shorten() -> None:
    """Make the interpreter (Triton 3.6) do without all this. Call it before a kernel is defined."""
    leave_arguments_in_place()
    patch_language_once()
    compute_no_ignored_assertions()
    make_types_once()


def leave_arguments_in_place() -> None:
    """Keep the interpreter from copying every argument's memory onto itself when a kernel has ended.

    It copies to and from the CPU, where all tensors are. Memory that is only reserved would be allocated by that.
    """
    from triton.runtime import interpreter

    interpreter.GridExecutor._restore_args_dev = lambda *_: None


def patch_language_once() -> None:
    """Put the interpreter's functions into `triton.language` once per kernel, and not again in each function that it calls.

    The interpreter (Triton 3.6) goes through all members of `triton.language` whenever one function calls another. It finds its
    own functions in place already, and sets the other members to their present values.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    of_all_functions = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # those of triton.language see `core` only
    running = False

    def patch_at_start(_: FunctionType) -> Any:
        nonlocal running
        if running:
            return interpreter._LangPatchScope()
        scope, running = patch(of_all_functions), True
        restore = scope.restore

        def restore_at_end() -> None:
            nonlocal running
            running = False
            restore()

        scope.restore = restore_at_end
        return scope

    interpreter._patch_lang = patch_at_start


def compute_no_ignored_assertions() -> None:
    """Without its option `debug`, the interpreter computes integer sums and products once more in 64 bits, and ignores whether
    they differ."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def make_types_once() -> None:
    """Keep what the interpreter makes anew for every result: its type, its shape, and the dtype that numpy has for it."""
    import triton.language as tl
    from triton.runtime import interpreter

    make_block_type, numpy_dtype = tl.block_type.__init__, interpreter._get_np_dtype
    numpy_dtype_of_scalar = functools.cache(numpy_dtype)
    made: dict[Any, dict[str, Any]] = {}

    @functools.cache
    def constants(shape: tuple[int, ...]) -> Any:
        return tl.tuple([tl.constexpr(size) for size in shape])

    def init_block_type(self: Any, element_type: Any, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        kind = element_type.name, getattr(element_type, "address_space", None), sizes  # types of pointers have no hash
        if kind not in made:
            make_block_type(self, element_type, list(sizes))
            made[kind] = dict(vars(self))
        vars(self).update(made[kind])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape = constants(tuple(type.shape.values) if type.is_block() else ())
        self.numel = tl.constexpr(type.numel if type.is_block() else 1)

    def numpy_dtype_once(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return numpy_dtype(scalar) if isinstance(scalar, tl.pointer_type) else numpy_dtype_of_scalar(scalar)

    tl.block_type.__init__ = init_block_type
    tl.tensor.__init__ = init_tensor
    interpreter._get_np_dtype = numpy_dtype_once
