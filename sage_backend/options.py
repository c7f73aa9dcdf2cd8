# SPDX-License-Identifier: Apache-2.0
"""The user's options: `--additional-config '{"sage": {...}}'`. Wrong ones are refused in one line that says what is allowed."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sage_backend import __version__
from sage_paged import K_BITS, PAGE_TOKENS, V_BITS, Memory, PageLayout

MAX_TOPK = 128
ALL = "all"
"""In place of a number of pages: all of them."""

RATIOS = (2, 4, 8)
"""The numbers of hidden vectors that a compression plugin can make one. All divide a page, so that groups do not cross KV
blocks."""

MIN_TAIL = 16
"""The least tokens at a prompt's end that stay uncompressed (see `sage_backend.variator.groups`)."""

Allowed = tuple[Callable[[Any], bool], str]
"""What an option can be: a predicate of its value, and the words for it."""


def _one_of(*values: Any) -> Allowed:
    def fits(value: Any) -> bool:
        return any(type(value) is type(each) and value == each for each in values)

    return fits, _list(map(json.dumps, values))


def _integer(words: str, least: int = 1, greatest: int | None = None) -> Allowed:
    return lambda value: type(value) is int and value >= least and (greatest is None or value <= greatest), words


def _list(values: Iterable[Any]) -> str:
    *rest, last = (str(value) for value in values)
    return f"{', '.join(rest)} or {last}" if rest else last


_FILE: Allowed = lambda value: isinstance(value, str) and value != "", "a file"
_SECTION: Allowed = lambda value: True, "an object"  # checked by the section's own table

_SAGE: dict[str, Allowed] = {
    "k_bits": _one_of(*K_BITS),
    "v_bits": _one_of(*V_BITS),
    "page_tokens": _one_of(*PAGE_TOKENS),
    "smooth_k": _one_of(False, True),
    "smooth_v": _one_of(False, True),
    "smooth_q": _one_of(False, True),
    "equalize": _one_of(False, True),
    "calibration": _FILE,
    "canary": _integer("a number of steps from 1 on"),
    "memory": _SECTION,
    "variator": _SECTION,
}
_VARIATOR: dict[str, Allowed] = {
    "plugins": _FILE,
    "ratio": _one_of("auto", *RATIOS),
    "min_ratio": _one_of(1, *RATIOS),
    "max_ratio": _one_of(1, *RATIOS),
    "waiting": _integer("a number of requests from 1 on"),
    "kv_use": (lambda value: type(value) in (int, float) and 0 < value <= 1, "a share above 0 and up to 1"),
    "tail": _integer(f"a number of tokens from {MIN_TAIL} on", MIN_TAIL),
}


def _memory(page_tokens: int) -> dict[str, Allowed]:
    tokens = _integer("a number of tokens, at least 1")
    topk = _integer(f"a number of pages from 1 to {MAX_TOPK}", greatest=MAX_TOPK)
    return {
        "sink_tokens": tokens,
        "local_tokens": _integer(f"a number of tokens, at least {page_tokens}", page_tokens),
        "topk_pages": topk,
        "max_topk_pages": (lambda value: value == ALL or topk[0](value), f'{topk[1]}, or "{ALL}"'),
        "query_block": tokens,
        "extrapolate": (lambda value: value is False or tokens[0](value), f"{tokens[1]} or false"),
        "dense_layers": (_is_indices, "a list of indices such as [0, 1]"),
        "host_gib": (lambda value: type(value) in (int, float) and value > 0, "a number of GiB above 0"),
    }


def _is_indices(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(each) is int and each >= 0 for each in value)


@dataclass(frozen=True)
class _Section:
    """How errors name a section of options. wrong: a template with the fields name, value, json and allowed; unknown: one with
    the fields name and known."""

    place: str
    example: str
    wrong: str
    unknown: str

    def check(self, section: Any, allowed: Mapping[str, Allowed], required: Iterable[str] = ()) -> Mapping[str, Any]:
        """The section. Raises ValueError, in one line, if it is no object or has an unknown option or a wrong value."""
        if not (isinstance(section, Mapping) and section.keys() >= set(required)):
            raise ValueError(f"{self.place} must be an object such as {self.example}, not {section!r}")
        for name, value in section.items():
            if name not in allowed:
                raise ValueError(self.unknown.format(name=name, known=_list(sorted(allowed))))
            fits, words = allowed[name]
            if not fits(value):
                as_json = json.dumps(value, default=repr)
                raise ValueError(self.wrong.format(name=name, value=value, json=as_json, allowed=words))
        return section


_IN_SAGE = _Section(
    'option "sage" in --additional-config',
    '{"k_bits": 8}',
    'option "{name}" in --additional-config "sage" is {value!r}; it can be {allowed}',
    'unknown option "{name}" in --additional-config "sage"; options are {known}',
)
_IN_VARIATOR = _Section(
    'option "variator" in --additional-config "sage"',
    '{"plugins": "FILE"}',
    'option "{name}" in --additional-config "sage", "variator" is {value!r}; it can be {allowed}',
    'unknown option "{name}" in --additional-config "sage", "variator"; options are {known}',
)
_IN_MEMORY = _Section(
    'option "memory" in --additional-config "sage"',
    '{"local_tokens": 4096}',
    '"{name}" in option "memory" in --additional-config "sage" is {json}; it must be {allowed}',
    'option "memory" in --additional-config "sage" has no "{name}"; there is {known}',
)


@dataclass(frozen=True)
class MemoryOptions:
    """What attention reads of long contexts (see `sage_paged.memory`). extrapolate: the length in tokens that the model was
    trained for, within which distances are kept; False to leave positions as they are. dense_layers: indices of layers that
    read everything. host_gib: GiB of host memory, of all workers together, that hold all pages, while GPUs hold those that were
    read last (`engine.host_pages`); None to have all pages on GPUs. max_topk_pages: the most pages that a request may ask for
    in place of topk_pages (`engine.request_topk`), or "all", with which it may also ask to read everything; None: requests
    may not ask."""

    sink_tokens: int = 128
    local_tokens: int = 4096
    topk_pages: int = 32
    query_block: int = 512
    extrapolate: int | bool = False
    dense_layers: tuple[int, ...] = ()
    host_gib: float | None = None
    max_topk_pages: int | str | None = None

    @classmethod
    def parse(cls, section: object, page_tokens: int) -> "MemoryOptions":
        """Raises ValueError, in one line, for an unknown option, a wrong value, or options that contradict."""
        place = _IN_MEMORY.place
        given = _IN_MEMORY.check(section, _memory(page_tokens))
        options = cls(**{**given, "dense_layers": tuple(given.get("dense_layers", ()))})
        if options.query_block % page_tokens:
            raise ValueError(
                f'"query_block" in {place} is {options.query_block}; it must be a multiple of page_tokens, {page_tokens}'
            )
        if options.host_gib and options.dense_layers:
            raise ValueError(f'"host_gib" in {place} does not go with "dense_layers", which read everything; leave one out')
        if options.host_gib and options.max_topk_pages == ALL:
            raise ValueError(
                f'"host_gib" in {place} does not go with "max_topk_pages": "{ALL}", since GPUs hold no whole contexts; give a '
                "number"
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
        return Memory(
            self.sink_tokens, self.local_tokens, self.topk_pages, self.query_block, int(self.extrapolate), self.most_asked,
            self.max_topk_pages == ALL,
        )  # fmt: skip

    @property
    def most_asked(self) -> int:
        """The largest number of pages that a request may ask for; 0 if it may not ask."""
        return MAX_TOPK if isinstance(self.max_topk_pages, str) else self.max_topk_pages or 0


@dataclass(frozen=True)
class VariatorOptions:
    """plugins: a file of `sage variator train`. ratio: of all requests that ask for none themselves, or "auto", by load. With
    "auto", min_ratio and max_ratio limit the choice, and load is high with `waiting` requests waiting, or with the fraction
    `kv_use` of the KV cache in use. tail: tokens at a prompt's end that stay uncompressed."""

    plugins: str
    ratio: int | str = "auto"
    min_ratio: int = 1
    max_ratio: int = 8
    waiting: int = 8
    kv_use: float = 0.9
    tail: int = 64

    @classmethod
    def parse(cls, section: object) -> "VariatorOptions":
        """Raises ValueError, in one line, for an unknown option, a wrong value, or options that contradict."""
        given = _IN_VARIATOR.check(section, _VARIATOR, required=["plugins"])
        options = cls(**given)
        if options.ratio != "auto" and given.keys() & {"min_ratio", "max_ratio", "waiting", "kv_use"}:
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
    """k_bits, v_bits: bits of a stored channel of keys, and of values. page_tokens: tokens of a KV page, which is vLLM's KV
    block. smooth_k, smooth_v, smooth_q: whether an anchor is subtracted from keys, one from values, and the mean of a block
    from the queries of prompts; equalize: whether the channels of keys are equalized (see `sage_kernels.reference`).
    calibration: a file of `sage calibrate`; without one, the engine calibrates keys when it starts (see
    `engine.start_calibration`). memory: None to read all of every context. variator: compression plugins on the FFNs, if any.
    canary: one in `canary` steps in which prompts begin is checked (see `observability.canary`); None for no checks."""

    k_bits: int = 8
    v_bits: int = 8
    page_tokens: int = 128
    smooth_k: bool = True
    smooth_v: bool = True
    smooth_q: bool = False
    equalize: bool = True
    calibration: str | None = None
    variator: VariatorOptions | None = None
    memory: MemoryOptions | None = None
    canary: int | None = None

    @classmethod
    def parse(cls, additional_config: object) -> "SageOptions":
        """Read the options out of vLLM's additional_config. Without a section "sage", they are the defaults.

        Raises ValueError, in one line, for an unknown option, a wrong value, or options that contradict.
        """
        section = additional_config.get("sage", {}) if isinstance(additional_config, Mapping) else {}
        values = dict(_IN_SAGE.check(section, _SAGE))
        memory = values.pop("memory", None)  # read below, when it is known how long a page is
        if "variator" in values:
            values["variator"] = VariatorOptions.parse(values["variator"])
        options = cls(**values)
        if memory is not None:
            options = replace(options, memory=MemoryOptions.parse(memory, options.page_tokens))
        if options.calibration and not (options.smooth_k or options.smooth_v or options.equalize):
            raise ValueError(
                'option "calibration" in --additional-config "sage" has nothing to do with "smooth_k", "smooth_v" and '
                '"equalize" all false; leave it out'
            )
        return options

    @property
    def per_request_topk(self) -> bool:
        """Whether requests may ask for a number of recalled pages."""
        return self.memory is not None and self.memory.max_topk_pages is not None

    def layout(self, head_dim: int, k_bits: int | None = None, v_bits: int | None = None) -> PageLayout:
        """k_bits, v_bits: those of a layer for which a calibration has chosen them."""
        in_pages = self.memory is not None and not self.memory.host_gib  # with host pages, summaries are in a PageCache
        return PageLayout(head_dim, k_bits or self.k_bits, self.page_tokens, in_pages, v_bits or self.v_bits)

    @property
    def pages(self) -> str:
        """What decides the bytes of pages, for processes that exchange them: the release, the options, and the contents of a
        calibration file. Raises OSError if that cannot be read."""
        names = ("k_bits", "v_bits", "page_tokens", "smooth_k", "smooth_v", "equalize")
        values = {"sage_backend": __version__} | {name: getattr(self, name) for name in names}
        values["summaries"] = self.memory is not None and ("turned" if self.memory.extrapolate else "as stored")
        if self.calibration:
            values["calibration"] = hashlib.sha256(Path(self.calibration).read_bytes()).hexdigest()[:16]
        return " ".join(f"{name}={value}" for name, value in values.items())


_current = SageOptions()


def current() -> SageOptions:
    """The options of the engine that this process runs.

    vLLM asks a backend for its page sizes in places where no configuration is set. Then the last one seen counts, which is the
    only one in a process of one engine.
    """
    global _current
    # Not at the top: `sage doctor` and tests read options where vLLM is not installed, and plugins load while it is imported.
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is not None:
        _current = SageOptions.parse(config.additional_config)
    return _current
