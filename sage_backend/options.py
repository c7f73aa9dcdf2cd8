"""The user's options: `--additional-config '{"sage": {...}}'`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from sage_paged import K_BITS, PAGE_TOKENS, PageLayout


@dataclass(frozen=True)
class SageOptions:
    """k_bits: bits of a stored key channel. page_tokens: tokens of a KV page, which is vLLM's KV block. smooth_k: whether an
    anchor is subtracted from keys (see `sage_kernels.reference`). calibration: a file with the anchors (see
    `sage_backend.calibration`); without one, the first tokens fix them."""

    k_bits: int = 8
    page_tokens: int = 128
    smooth_k: bool = True
    calibration: str | None = None

    ALLOWED: ClassVar = {"k_bits": K_BITS, "page_tokens": PAGE_TOKENS, "smooth_k": (False, True)}

    @classmethod
    def parse(cls, additional_config: object) -> "SageOptions":
        """Read the options out of vLLM's additional_config.

        Raises ValueError, in one line, that names the option and what it may be.
        """
        section = additional_config.get("sage", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(section, Mapping):
            raise ValueError(f'option "sage" in --additional-config must be an object such as {{"k_bits": 8}}, not {section!r}')
        known = {field.name for field in fields(cls)}
        for name, value in section.items():
            if name not in known:
                raise ValueError(f'unknown option "{name}" in --additional-config "sage"; options are {_list(sorted(known))}')
            if name == "calibration":
                if not (isinstance(value, str) and value):
                    raise ValueError(f'option "{name}" in --additional-config "sage" is {value!r}; it can be a file')
                continue
            allowed = cls.ALLOWED[name]
            if type(value) is not type(allowed[0]) or value not in allowed:
                choices = _list(map(json.dumps, allowed))
                raise ValueError(f'option "{name}" in --additional-config "sage" is {value!r}; it can be {choices}')
        options = cls(**section)
        if options.calibration and not options.smooth_k:
            raise ValueError('options "calibration" and "smooth_k": false in --additional-config "sage" exclude each other')
        return options

    def layout(self, head_dim: int, k_bits: int | None = None) -> PageLayout:
        """k_bits: those of a layer for which a calibration has chosen them."""
        return PageLayout(head_dim, k_bits or self.k_bits, self.page_tokens)


def _list(values: Any) -> str:
    *rest, last = (str(value) for value in values)
    return f"{', '.join(rest)} or {last}" if rest else last


_current = SageOptions()


def current() -> SageOptions:
    """The options of the engine that this process runs.

    vLLM asks a backend for its page sizes in places where no configuration is set; the last one seen then counts, which in
    a process of one engine is the only one.
    """
    global _current
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is not None:
        _current = SageOptions.parse(config.additional_config)
    return _current
