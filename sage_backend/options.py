# SPDX-License-Identifier: Apache-2.0
"""The user's options: `--additional-config '{"sage": {...}}'`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

from sage_paged import K_BITS, PAGE_TOKENS, Memory, PageLayout

MAX_TOPK = 128

RATIOS = (2, 4, 8)
"""How many hidden vectors a compression plugin can make one. All divide a page, so a group never reaches into another block of
the KV cache."""

MIN_TAIL = 16
"""The least tokens at a prompt's end that stay uncompressed (see `sage_backend.variator.groups`)."""


@dataclass(frozen=True)
class MemoryOptions:
    """What is read of long contexts (see `sage_paged.memory`). extrapolate: the length in tokens that the model was trained
    for, past which distances are held inside it; False to leave positions as they are. dense_layers: indices of layers that
    read everything."""

    sink_tokens: int = 128
    local_tokens: int = 4096
    topk_pages: int = 32
    query_block: int = 512
    extrapolate: int | bool = False
    dense_layers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, section: object, page_tokens: int) -> "MemoryOptions":
        """Raises ValueError, in one line, for what is no such option or contradicts another."""
        place = 'option "memory" in --additional-config "sage"'
        if not isinstance(section, Mapping):
            raise ValueError(f'{place} must be an object such as {{"local_tokens": 4096}}, not {section!r}')
        known = [field.name for field in fields(cls)]
        for name, value in section.items():
            if name not in known:
                raise ValueError(f'{place} has no "{name}"; there is {_list(sorted(known))}')
            least, most = {"topk_pages": (1, MAX_TOPK), "local_tokens": (page_tokens, None)}.get(name, (1, None))
            if name == "dense_layers":
                if not (isinstance(value, list | tuple) and all(type(each) is int and each >= 0 for each in value)):
                    raise ValueError(f'"dense_layers" in {place} is {value!r}; it must be a list of indices such as [0, 1]')
            elif name == "extrapolate" and value is False:
                continue
            elif type(value) is not int or value < least or (most and value > most):
                what = " or false" if name == "extrapolate" else ""
                what = f"a number of pages from {least} to {most}" if most else f"a number of tokens, at least {least}{what}"
                raise ValueError(f'"{name}" in {place} is {json.dumps(value)}; it must be {what}')
        options = cls(**{**section, "dense_layers": tuple(section.get("dense_layers", ()))})
        if options.query_block % page_tokens:
            raise ValueError(
                f'"query_block" in {place} is {options.query_block}; it must be a multiple of page_tokens, {page_tokens}'
            )
        farthest = options.policy.farthest(page_tokens)
        if options.extrapolate and farthest > options.extrapolate:
            raise ValueError(
                f'"extrapolate": {options.extrapolate} in {place} leaves no room for what is read at distances of up to '
                f"{farthest} tokens; lower local_tokens or query_block"
            )
        return options

    @cached_property
    def policy(self) -> Memory:
        return Memory(self.sink_tokens, self.local_tokens, self.topk_pages, self.query_block, int(self.extrapolate))


def _list(values: Any) -> str:
    *rest, last = (str(value) for value in values)
    return f"{', '.join(rest)} or {last}" if rest else last


@dataclass(frozen=True)
class VariatorOptions:
    """plugins: a file of `sage variator train`. ratio: of all requests that ask for none themselves, or "auto", by load: then
    min_ratio and max_ratio are the least and the greatest that load can lead to, and load is high with `waiting` requests
    waiting, or with the share `kv_use` of the KV cache in use. tail: tokens at a prompt's end that stay uncompressed."""

    plugins: str
    ratio: int | str = "auto"
    min_ratio: int = 1
    max_ratio: int = 8
    waiting: int = 8
    kv_use: float = 0.9
    tail: int = 64

    # By option: what it can be, and how users are told so.
    ALLOWED: ClassVar[dict[str, tuple[Callable[[Any], bool], str]]] = {
        "plugins": (lambda value: isinstance(value, str) and value != "", "a file"),
        "ratio": (lambda value: value == "auto" or (type(value) is int and value in RATIOS), f'"auto", {_list(RATIOS)}'),
        "min_ratio": (lambda value: type(value) is int and value in (1, *RATIOS), _list((1, *RATIOS))),
        "max_ratio": (lambda value: type(value) is int and value in (1, *RATIOS), _list((1, *RATIOS))),
        "waiting": (lambda value: type(value) is int and value >= 1, "a number of requests from 1 on"),
        "kv_use": (lambda value: type(value) in (int, float) and 0 < value <= 1, "a share above 0 and up to 1"),
        "tail": (lambda value: type(value) is int and value >= MIN_TAIL, f"a number of tokens from {MIN_TAIL} on"),
    }

    @classmethod
    def parse(cls, section: object) -> "VariatorOptions":
        """Raises ValueError, in one line, that names the option and what it may be."""
        if not (isinstance(section, Mapping) and "plugins" in section):
            raise ValueError(
                'option "variator" in --additional-config "sage" must be an object such as {"plugins": "FILE"}, '
                f"not {section!r}"
            )
        for name, value in section.items():
            if name not in cls.ALLOWED:
                known = _list(sorted(cls.ALLOWED))
                raise ValueError(f'unknown option "{name}" in --additional-config "sage", "variator"; options are {known}')
            fits, choices = cls.ALLOWED[name]
            if not fits(value):
                raise ValueError(f'option "{name}" in --additional-config "sage", "variator" is {value!r}; it can be {choices}')
        options = cls(**section)
        if options.ratio != "auto" and section.keys() & {"min_ratio", "max_ratio", "waiting", "kv_use"}:
            raise ValueError(
                'options "min_ratio", "max_ratio", "waiting" and "kv_use" in --additional-config "sage", "variator" go with '
                f'"ratio": "auto", not {options.ratio}'
            )
        if options.min_ratio > options.max_ratio:
            raise ValueError(
                f'option "min_ratio" in --additional-config "sage", "variator" is {options.min_ratio}, '
                f'and "max_ratio" only {options.max_ratio}'
            )
        return options

    def choices(self, trained: Sequence[int]) -> list[int]:
        """The ratios that load chooses among, or the only one, ascending. Raises ValueError for what was not trained."""
        if isinstance(self.ratio, int):
            found = [self.ratio] if self.ratio in trained else []
        else:
            found = [ratio for ratio in (1, *trained) if self.min_ratio <= ratio <= self.max_ratio]
        if not found:
            asked = self.ratio if isinstance(self.ratio, int) else f"{self.min_ratio} to {self.max_ratio}"
            raise ValueError(f"{self.plugins} has no plugins of ratio {asked}; there is {_list(trained)}")
        return found


@dataclass(frozen=True)
class SageOptions:
    """k_bits: bits of a stored key channel. page_tokens: tokens of a KV page, which is vLLM's KV block. smooth_k, smooth_v,
    smooth_q: whether an anchor is subtracted from keys, one from values, and the mean of a block from the queries of prompts
    (see `sage_kernels.reference`). calibration: a file with the anchors (see `features.calibration_file`); without one, the
    first tokens fix those of keys, and values have none. memory: None to read all of every context. variator: compression
    plugins on the FFNs, if any. canary: of how many steps in which prompts begin one is checked (see `observability.canary`);
    None for no checks."""

    k_bits: int = 8
    page_tokens: int = 128
    smooth_k: bool = True
    smooth_v: bool = True
    smooth_q: bool = False
    calibration: str | None = None
    variator: VariatorOptions | None = None
    memory: MemoryOptions | None = None
    canary: int | None = None

    ALLOWED: ClassVar = {
        "k_bits": K_BITS, "page_tokens": PAGE_TOKENS, **dict.fromkeys(("smooth_k", "smooth_v", "smooth_q"), (False, True)),
    }  # fmt: skip

    @classmethod
    def parse(cls, additional_config: object) -> "SageOptions":
        """Read the options out of vLLM's additional_config.

        Raises ValueError, in one line, that names the option and what it may be.
        """
        section = additional_config.get("sage", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(section, Mapping):
            raise ValueError(f'option "sage" in --additional-config must be an object such as {{"k_bits": 8}}, not {section!r}')
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = dict(section)
        for name, value in section.items():
            if name not in known:
                raise ValueError(f'unknown option "{name}" in --additional-config "sage"; options are {_list(sorted(known))}')
            if name == "calibration":
                if not (isinstance(value, str) and value):
                    raise ValueError(f'option "{name}" in --additional-config "sage" is {value!r}; it can be a file')
                continue
            if name == "canary":
                if type(value) is not int or value < 1:
                    raise ValueError(
                        f'option "{name}" in --additional-config "sage" is {value!r}; it can be a number of steps from 1 on'
                    )
                continue
            if name == "memory":
                continue  # read below, when it is known what a page is
            if name == "variator":
                values[name] = VariatorOptions.parse(value)
                continue
            allowed = cls.ALLOWED[name]
            if type(value) is not type(allowed[0]) or value not in allowed:
                choices = _list(map(json.dumps, allowed))
                raise ValueError(f'option "{name}" in --additional-config "sage" is {value!r}; it can be {choices}')
        memory = values.pop("memory", None)
        options = cls(**values)
        if memory is not None:
            options = replace(options, memory=MemoryOptions.parse(memory, options.page_tokens))
        if options.calibration and not (options.smooth_k or options.smooth_v):
            raise ValueError(
                'option "calibration" in --additional-config "sage" has nothing to smooth with "smooth_k" and "smooth_v" both '
                "false; leave it out"
            )
        return options

    def layout(self, head_dim: int, k_bits: int | None = None) -> PageLayout:
        """k_bits: those of a layer for which a calibration has chosen them."""
        return PageLayout(head_dim, k_bits or self.k_bits, self.page_tokens, has_summary=self.memory is not None)


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
