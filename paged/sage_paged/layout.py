# SPDX-License-Identifier: Apache-2.0
"""The bytes of one page.

A page holds the keys and values of `tokens` consecutive tokens of one KV head, quantized, in one contiguous run:

    section      shape                    type      content
    ----------   ----------------------   -------   ---------------------------------------------------------
    k            [tokens, k_row_bytes]    int8      key codes, one row a token
    v            [head_dim, tokens]       e4m3      value codes, transposed: one row a channel, tokens in `v_position` order.
                                                    4-bit values: [head_dim // 2, tokens], int8
    k_groups     [tokens, 2, k_groups]    int8      INT4 keys only: steps and zero points that make INT8 codes of nibbles
    k_low        [tokens, GROUP_BYTES]    int8      INT4 keys only: the low nibbles of the first group, whose codes have 8 bits
    k_scale      [tokens]                 float32   key = INT8 code * k_scale
    v_exponent   [tokens]                 float32   right behind k_scale: value = code * 2**v_exponent. Not with INT4 keys and
                                                    e4m3 values
    summary      [2, head_dim]            float16   of each channel, the mean key and half the range of keys, in pages for
                                                    `sage_paged.memory` only

Every number of a token depends on that token alone, and a summary on the keys of a full page, so a page can be shared, moved,
swapped or extended without touching its other tokens. Values are transposed because 8-bit tensor cores need the
summed dimension, the token for P V, to be contiguous. Within each 16, tokens are permuted: a thread gets Q K^T for tokens 2j,
2j + 1, 2j + 8 and 2j + 9, and must provide P for four adjacent tokens. In this order they are the same four, so P never moves
between threads.

INT4 keys are INT8 codes kept in 4 bits: byte `i` of a row has channel `i` in its low nibble and channel `i + head_dim // 2` in
its high one, numbers from 0 to 15, and the INT8 code is zero point + step * nibble. The channels of GROUP_BYTES adjacent bytes
share a step and a zero point. RoPE rotates channels `i` and `i + head_dim // 2` into each other, so they have similar ranges.
The codes of the first group are whole: its step is 16, its zero point -128, and the low nibbles in `k_low`, packed like those
of `k`, are added. A calibration puts the RoPE pairs that matter most there. Attention sees INT8 codes only. With e4m3 values,
INT4 pages have no section for V's exponent: it is a whole number, and the last 8 bits of k_scale are that plus 127, which
changes k_scale by less than 2**-15 of itself.

4-bit values are e4m3 codes kept in 4 bits. The nibble is a sign (8) and a magnitude m from 0 to 7, and the code's magnitude is
3 * m + m // 4 + 1: the numbers 1, 4, 7, 10, 14, 18, 24 and 30, times 2**-9. Byte i of a token's column has channel 2 * i in its
low nibble and channel 2 * i + 1 in its high one. What is kept are not the model's channels but their rotation
(`sage_kernels.reference.rotate_values`); attention rotates its output back.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256, 512)
PAGE_TOKENS = (64, 128)
K_BITS = (4, 8)
V_BITS = (4, 8)
SCRATCH_V_BITS = 16
"""Bits of values in pages that kernels for GPUs without FP8 make for themselves (`sage_kernels.portable.widen`): float16, 2**-8
times the code, tokens in their own order."""
MAX_V_INT4_DIM = 256
"""The largest head size with 4-bit values. A larger query tile that is rotated back does not fit the registers of sm_100."""

GROUP_BYTES = 8
"""Bytes of INT4 keys, two channels each, that share a step and a zero point."""


def section_offset(section, head_dim, k_bits, tokens, v_bits=8):  # without annotations, which Triton would look up
    """Bytes from a page's start to one of its sections, or to the "end" of those up to v_exponent. Kernels ask this function,
    too: here stands all that they know of where sections are, and Triton compiles anew what depends on it when it changes."""
    row = head_dim * k_bits // 8
    groups = 2 * (row // GROUP_BYTES) if k_bits == 4 else 0
    low = GROUP_BYTES if k_bits == 4 else 0
    exponent = 0 if (k_bits, v_bits) == (4, 8) else 4
    of_token = {
        "k": row, "v": head_dim * v_bits // 8, "k_groups": groups, "k_low": low, "k_scale": 4, "v_exponent": exponent, "end": 0
    }  # fmt: skip
    offset = 0
    for name, size in of_token.items():
        if name == section:
            return offset
        offset += tokens * size
    raise ValueError(f"a page has no section {section}")


def v_position(token):  # without annotations, which Triton would look up
    """Where in its page's rows of V a token's codes stand: 0, 1, 8, 9, 2, 3, 10, 11, ... are side by side.

    token: an int, an int tensor, or either inside a kernel, of any range; what changes is its place within 16.
    """
    return (token & ~14) | ((token & 6) << 1) | ((token & 8) >> 2)


def v_token(position):
    """The inverse of `v_position`."""
    return (position & ~14) | ((position & 12) >> 1) | ((position & 2) << 2)


@dataclass(frozen=True)
class PageViews:
    """Typed views of a cache; leading dimensions are [blocks, kv_heads].

    k: int8 [..., tokens, k_row_bytes]; v: float8_e4m3fn [..., head_dim, tokens], or int8 [..., head_dim // 2, tokens] of 4-bit
    values, tokens in `v_position` order, or float16 [..., head_dim, tokens] of SCRATCH_V_BITS; k_groups: int8 [..., tokens,
    step or zero point, k_groups]; k_low: int8 [..., tokens, GROUP_BYTES]; k_scale, v_exponent: float32 [..., tokens]; summary:
    float16 [..., 2, head_dim]. None where the layout has none.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_groups: torch.Tensor | None
    k_low: torch.Tensor | None
    k_scale: torch.Tensor
    v_exponent: torch.Tensor | None
    summary: torch.Tensor | None


@dataclass(frozen=True)
class PageLayout:
    """Where each section of a page lies. All offsets and sizes are in bytes.

    Raises ValueError for a combination that the kernels do not have.
    """

    head_dim: int
    k_bits: int = 8
    tokens: int = 128
    has_summary: bool = False
    v_bits: int = 8

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("head_dim", self.head_dim, HEAD_DIMS),
            ("k_bits", self.k_bits, K_BITS),
            ("tokens", self.tokens, PAGE_TOKENS),
            ("v_bits", self.v_bits, V_BITS),
        ):
            if value not in allowed and (name, value) != ("v_bits", SCRATCH_V_BITS):
                raise ValueError(f"{name}={value} is not supported; choose one of {', '.join(map(str, allowed))}")
        if self.v_bits == 4 and self.head_dim > MAX_V_INT4_DIM:
            raise ValueError(f"v_bits=4 is not supported at head_dim={self.head_dim}, only up to {MAX_V_INT4_DIM}")

    @property
    def k_row_bytes(self) -> int:
        return self.head_dim * self.k_bits // 8

    @property
    def k_groups(self) -> int:
        """Groups of a token's INT4 keys; 0 for INT8 keys."""
        return self.k_row_bytes // GROUP_BYTES if self.k_bits == 4 else 0

    def offset(self, section: str) -> int:
        """See `section_offset`."""
        return section_offset(section, self.head_dim, self.k_bits, self.tokens, self.v_bits)

    @property
    def summary_offset(self) -> int:
        return self._whole(self.offset("end"))

    @cached_property  # asked for in every call
    def page_bytes(self) -> int:
        return self.summary_offset + (self._whole(4 * self.head_dim) if self.has_summary else 0)

    def _whole(self, size: int) -> int:
        """`size` rounded up so that a token's share is a whole number of elements of any model's dtype."""
        return -(-size // (4 * self.tokens)) * 4 * self.tokens

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one KV head, scales and its share of the page's summary included."""
        return self.page_bytes // self.tokens

    def compression(self, bytes_per_element: int = 2) -> float:
        """How many tokens fit where one fitted as plain K and V of `bytes_per_element`."""
        return 2 * self.head_dim * bytes_per_element / self.bytes_per_token

    def empty(self, blocks: int, kv_heads: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """A cache of its own: uint8 [blocks, kv_heads, page_bytes], zeroed."""
        return torch.zeros(blocks, kv_heads, self.page_bytes, dtype=torch.uint8, device=device)

    def pages(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """See a serving engine's cache as pages.

        kv_cache: [blocks, kv_heads, tokens, content] of any dtype, where each [tokens, content] is one run of
        `page_bytes` bytes; blocks and heads may be strided. Returns uint8 [blocks, kv_heads, page_bytes] on the
        same memory. Raises ValueError where the cache is not laid out so.
        """
        raw = kv_cache.view(torch.uint8)
        blocks, heads, tokens, content = raw.shape
        if (tokens, content) != (self.tokens, self.bytes_per_token) or raw.stride()[2:] != (content, 1):
            raise ValueError(
                f"a cache of shape {tuple(raw.shape)} and strides {raw.stride()} (bytes) does not hold pages of "
                f"{self.tokens} x {self.bytes_per_token} bytes"
            )
        return raw.as_strided((blocks, heads, self.page_bytes), (raw.stride(0), raw.stride(1), 1))

    def summaries(self, pages: torch.Tensor) -> torch.Tensor:
        """The view `summary` alone of `views`, of a layout that has one. It is made in every call of a layer."""
        halves = pages.view(torch.float16)
        strides = halves.stride(0), halves.stride(1), self.head_dim, 1
        offset = halves.storage_offset() + self.summary_offset // 2
        return halves.as_strided((*pages.shape[:2], 2, self.head_dim), strides, offset)

    def views(self, pages: torch.Tensor) -> PageViews:
        """Typed views of `pages` (uint8 [blocks, kv_heads, page_bytes]) that share its memory."""

        def section(offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            size = math.prod(shape) * dtype.itemsize
            return pages[..., offset : offset + size].view(dtype).unflatten(-1, shape)

        scale, narrow = ((self.tokens,), torch.float32), self.k_bits == 4
        groups = (self.tokens, 2, self.k_groups)
        v_rows = self.head_dim if self.v_bits >= 8 else self.head_dim // 2
        v_type = {4: torch.int8, 8: torch.float8_e4m3fn, SCRATCH_V_BITS: torch.float16}[self.v_bits]
        return PageViews(
            k=section(self.offset("k"), (self.tokens, self.k_row_bytes), torch.int8),
            v=section(self.offset("v"), (v_rows, self.tokens), v_type),
            k_groups=section(self.offset("k_groups"), groups, torch.int8) if narrow else None,
            k_low=section(self.offset("k_low"), (self.tokens, GROUP_BYTES), torch.int8) if narrow else None,
            k_scale=section(self.offset("k_scale"), *scale),
            v_exponent=None if narrow and self.v_bits == 8 else section(self.offset("v_exponent"), *scale),
            summary=section(self.summary_offset, (2, self.head_dim), torch.float16) if self.has_summary else None,
        )
