# SPDX-License-Identifier: Apache-2.0
"""What differs between the releases of vLLM that this package serves, one function for each difference.

A function looks at what the installed vLLM has, not at its version, and says which releases have it. When the oldest of them is
no longer served, what is left of the function is one line, which belongs to its caller. Arguments that only some releases pass
to a patched method need nothing here: patches hand on all that they do not use.
"""

from typing import Any


def add_backend(name: str, class_path: str) -> None:
    """Add a member to vLLM's enum of backends. class_path: the qualified name of its class."""
    from vllm.v1.attention.backends import registry  # vLLM may be loading this package

    backend: Any = name
    enum: Any = registry.AttentionBackendEnum
    if not hasattr(enum, "register"):  # 0.31 registers classes for the members that there are; 0.32 and 0.33 make a member
        backend = object.__new__(enum)
        backend._name_, backend._value_ = name, class_path
        setattr(enum, name, backend)
        enum._member_map_[name] = enum._value2member_map_[class_path] = backend
        enum._member_names_.append(name)
    registry.register_backend(backend, class_path)
