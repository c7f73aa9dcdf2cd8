# SPDX-License-Identifier: Apache-2.0
"""Pages from the KV cache to shared memory, by the copy engine of sm_90 (tensor memory accelerator, TMA).

Addresses are counted in rows of PAGE bytes: a page has bytes_per_token rows, and each section of a page begins at a row. K and
scales have rows of other sizes, in which TMA addresses them, so `copy_keys` and `copy_scales` convert.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sage_kernels.portable.codes import section_offset
from sage_paged import GROUP_BYTES, PageLayout, v_token

_v_token = gluon.jit(v_token)


class PageDescriptors(NamedTuple):
    """TMA descriptors of a cache, by section of a page: keys, values, INT4 groups (steps and zero points), the low nibbles of
    the first group, scales. Keys and values arrive as tensor cores read them, the others as they lie in memory (`plain`)."""

    k: TensorDescriptor
    v: TensorDescriptor
    groups: TensorDescriptor
    low: TensorDescriptor
    scales: TensorDescriptor


@triton.constexpr_function
def plain_layout(rank):
    return gl.SwizzledSharedLayout(1, 1, 1, order=list(range(rank - 1, -1, -1)))


@gluon.jit
def plain(buffer, shape: gl.constexpr, dtype: gl.constexpr):
    """A buffer as it lies in memory, row by row, whatever its own layout says."""
    return buffer._reinterpret(dtype, shape, plain_layout(len(shape)))


# These start to copy one section of the page that begins at `row`, and report to the barrier `full`.


@gluon.jit
def copy_keys(k_pages, row, buffer, full, HEAD_DIM: gl.constexpr, K_BITS: gl.constexpr, PAGE: gl.constexpr):
    """K is the first section of a page. A row of K has K_ROW bytes."""
    K_ROW: gl.constexpr = HEAD_DIM * K_BITS // 8
    k_row = row * (PAGE // K_ROW) if PAGE >= K_ROW else row // (K_ROW // PAGE)
    tma.async_copy_global_to_shared(k_pages, [k_row, 0], full, buffer)


@gluon.jit
def copy_values(v_pages, row, buffer, full, HEAD_DIM: gl.constexpr, K_BITS: gl.constexpr, PAGE: gl.constexpr):
    V_ROW: gl.constexpr = section_offset("v", HEAD_DIM, K_BITS, PAGE) // PAGE
    tma.async_copy_global_to_shared(v_pages, [row + V_ROW, 0], full, buffer)


@gluon.jit
def copy_groups(group_rows, row, buffer, full, HEAD_DIM: gl.constexpr, V_BITS: gl.constexpr, PAGE: gl.constexpr):
    GROUP_ROW: gl.constexpr = section_offset("k_groups", HEAD_DIM, 4, PAGE, V_BITS) // PAGE
    tma.async_copy_global_to_shared(group_rows, [row + GROUP_ROW, 0], full, buffer)


@gluon.jit
def copy_low(low_rows, row, buffer, full, HEAD_DIM: gl.constexpr, V_BITS: gl.constexpr, PAGE: gl.constexpr):
    LOW_ROW: gl.constexpr = section_offset("k_low", HEAD_DIM, 4, PAGE, V_BITS) // PAGE
    tma.async_copy_global_to_shared(low_rows, [row + LOW_ROW, 0], full, buffer)


@gluon.jit
def copy_scales(
    scale_rows, row, buffer, full, HEAD_DIM: gl.constexpr, K_BITS: gl.constexpr, V_BITS: gl.constexpr, PAGE: gl.constexpr
):
    """Scales of K and, where the layout has them, V's exponents right behind them. A row has PAGE float32 numbers."""
    SCALE_ROW: gl.constexpr = section_offset("k_scale", HEAD_DIM, K_BITS, PAGE, V_BITS) // PAGE
    tma.async_copy_global_to_shared(scale_rows, [(row + SCALE_ROW) // 4, 0], full, buffer)


@gluon.jit
def clear_v_behind(buffer, length, PAGE: gl.constexpr):
    """Set the V codes behind the first `length` tokens of a page in shared memory to 0: an earlier owner of the cache may have
    left a NaN there, and 0 * NaN would reach every row. A fence must follow."""
    V_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [32 * 16 // PAGE, PAGE // 16], [gl.num_warps(), 1], [1, 0])
    filled = _v_token(gl.arange(0, PAGE, gl.SliceLayout(0, V_LAYOUT))) < length
    bits = buffer.load(V_LAYOUT).to(gl.uint8, bitcast=True)
    buffer.store(gl.where(filled[None, :], bits, 0).to(gl.uint8).to(gl.float8e4nv, bitcast=True))


def page_rows(pages: torch.Tensor, layout: PageLayout) -> tuple[int, int]:
    """Rows of PAGE bytes from one block to the next, and from one KV head to the next."""
    return pages.stride(0) // layout.tokens, pages.stride(1) // layout.tokens


def descriptors(pages: torch.Tensor, layout: PageLayout) -> PageDescriptors:
    """The TMA descriptors of a cache, uint8 [blocks, kv_heads, page_bytes]. Raises ValueError where its strides are none that
    TMA can address."""
    return _descriptors(pages.data_ptr(), *pages.shape[:2], pages.stride(0), pages.stride(1), layout)


@functools.lru_cache(maxsize=1024)
def _descriptors(
    data: int, blocks: int, kv_heads: int, block_stride: int, head_stride: int, layout: PageLayout
) -> PageDescriptors:
    page = layout.tokens
    if block_stride % (4 * page) or head_stride % (4 * page):
        raise ValueError(
            f"pages are {block_stride} and {head_stride} bytes apart, by blocks and by KV heads; on sm_90 both must be "
            f"multiples of {4 * page}"
        )

    # Heads may be further apart than blocks. What lies behind the extent reads as zeros.
    last = (blocks - 1) * block_stride + (kv_heads - 1) * head_stride
    extent = max(blocks * block_stride, last + -(-layout.page_bytes // (4 * page)) * 4 * page)

    def descriptor(dtype: torch.dtype, gl_dtype: gl.dtype, block: list[int], tiled: bool = True) -> TensorDescriptor:
        shape = [extent // (block[1] * dtype.itemsize), block[1]]
        row_by_row = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * dtype.itemsize, rank=2)
        shared = gl.NVMMASharedLayout.get_default_for(block, gl_dtype) if tiled else row_by_row
        return TensorDescriptor(_Address(data, dtype), shape, [block[1], 1], block, shared)

    if layout.v_bits == 8:
        values = descriptor(torch.float8_e4m3fn, gl.float8e4nv, [layout.head_dim, page])
    else:
        values = descriptor(torch.int8, gl.int8, [layout.head_dim // 2, page])
    scales = (layout.offset("end") - layout.offset("k_scale")) // (4 * page)
    return PageDescriptors(
        k=descriptor(torch.int8, gl.int8, [page, layout.k_row_bytes]),
        v=values,
        groups=descriptor(torch.int8, gl.int8, [max(1, 2 * layout.k_groups), page], tiled=False),
        low=descriptor(torch.int8, gl.int8, [GROUP_BYTES, page], tiled=False),
        scales=descriptor(torch.float32, gl.float32, [scales, page], tiled=False),
    )


@dataclass(frozen=True)
class _Address:
    """What a descriptor reads of a tensor. The tensor itself would keep a freed cache alive in the cache of descriptors."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address
