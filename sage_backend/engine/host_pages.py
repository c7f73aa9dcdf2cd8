# SPDX-License-Identifier: Apache-2.0
"""Pages in host memory, more than the GPU has room for (option `host_gib` of memory).

vLLM's pool of pages is as large as `host_gib` says. It lies in pinned host memory, which the GPU addresses as its own, so block
tables, the prefix cache and preemption are what they are without it. What vLLM found free on the GPU holds summaries, page
tables and frames (`sage_kernels.page_cache`). On a CPU all of it is ordinary memory, and `--kv-cache-memory-bytes` or
VLLM_CPU_KVCACHE_SPACE stand for the GPU's.
"""

import ctypes
import logging
import mmap
import weakref
from contextlib import suppress
from typing import Any

import torch

from sage_backend import options
from sage_backend.engine.checks import free_host_memory
from sage_backend.features.layers import own_impls
from sage_backend.observability.host_pages import HostPages
from sage_backend.observability.recorder import recorder
from sage_kernels import PageCache

logger = logging.getLogger(__name__)

_GIB, _MIB = 1 << 30, 1 << 20

_device_bytes: int | None = None
"""What this process's worker may use of its GPU for pages. None before it is known, and without host pages."""


def owners(config: Any) -> dict[str, Any]:
    """The layers (SageImpl) of a worker that store keys and values, by name."""
    return {name: impl for name, impl in own_impls(config).items() if impl.kv_sharing_target_layer_name is None}


def plan(config: Any, device_bytes: int) -> int:
    """Plan for host pages. Returns the size of this worker's pool. config: VllmConfig; device_bytes: what vLLM would give its
    pool on the GPU.

    Raises ValueError, in one line, if the pool cannot hold a context, or the GPU what one query block reads.
    """
    global _device_bytes
    memory, parallel = options.current().memory, config.parallel_config
    assert memory is not None
    assert memory.host_gib is not None
    size = int(memory.host_gib * _GIB) // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    layers = list(owners(config).values())
    blocks = size // sum(impl.layout.page_bytes * impl.num_kv_heads for impl in layers)
    tokens = max(blocks - 1, 0) * options.current().page_tokens  # vLLM keeps a block for itself
    # With --max-model-len auto, vLLM makes the length fit afterwards.
    longest = 0 if config.model_config.original_max_model_len == -1 else config.model_config.max_model_len
    override = config.cache_config.num_gpu_blocks_override or 0
    if override * config.cache_config.block_size > tokens:
        raise ValueError(
            f'--num-gpu-blocks-override {override} is more than option "host_gib" in --additional-config "sage", "memory" has '
            "room for; leave it out"
        )
    if tokens < longest:  # vLLM would say to raise --gpu-memory-utilization
        raise ValueError(
            f'option "host_gib" in --additional-config "sage", "memory" has room for {tokens} tokens, fewer than the {longest} '
            "of --max-model-len; change one of them"
        )
    _count_frames(layers, blocks, device_bytes)
    _device_bytes = device_bytes
    return size


def _count_frames(layers: list[Any], blocks: int, device_bytes: int) -> int:
    """Frames a layer and KV head that fit on the GPU beside what `blocks` pages need there. Raises ValueError for too few."""
    memory = options.current().memory
    assert memory is not None
    fixed = blocks * sum(PageCache.block_bytes(impl.layout, impl.num_kv_heads) for impl in layers)
    of_frame = sum(PageCache.frame_bytes(impl.layout, impl.num_kv_heads) for impl in layers)
    frames = (device_bytes - fixed) // of_frame
    needed = memory.policy.list_pages(options.current().page_tokens, memory.query_block)
    if frames < needed:
        least, summaries = (-(-size // _MIB) for size in (fixed + needed * of_frame, fixed))
        raise ValueError(
            f'option "memory" in --additional-config "sage" needs {least} MiB of the GPU for pages, which has '
            f"{device_bytes // _MIB}: {summaries} for the summaries of all host pages, the rest for {needed} pages that a "
            "query block reads; raise --gpu-memory-utilization, or lower host_gib, local_tokens or topk_pages"
        )
    return min(frames, max(blocks, needed))


def allocate(allocate_kv_cache: Any, config: Any, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """Allocate vLLM's pool in host memory, if this worker has host pages. Arguments are those of vLLM's allocate_kv_cache,
    behind it itself; config: KVCacheConfig."""
    if _device_bytes is None:
        return allocate_kv_cache(config, device, *args, **kwargs)
    views = allocate_kv_cache(config, torch.device("meta"), *args, **kwargs)
    pool = _pinned(next(iter(views.values())).untyped_storage().nbytes(), device)
    return {name: pool.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset()) for name, x in views.items()}


def _pinned(size: int, device: torch.device) -> torch.Tensor:
    """int8 [size] of zeros in host memory, as a tensor of `device`. Raises RuntimeError, in one line, if it cannot be had."""
    if (free := free_host_memory()) < size:  # the kernel would end a process of this container
        raise RuntimeError(
            f"{size / _GIB:.1f} GiB of host memory are asked for, and {free / _GIB:.1f} are free; lower option \"host_gib\" in "
            '--additional-config "sage", "memory", or give the container more memory'
        )
    try:
        memory = _mapped(size)
    except OSError as error:
        raise RuntimeError(_refused(size, "allocated", str(error))) from None
    host = torch.frombuffer(memory, dtype=torch.int8).zero_()  # all cores touch it, which pinning leaves to one
    if device.type == "cpu":
        return host
    address, runtime = host.data_ptr(), torch.cuda.cudart()
    if code := int(runtime.cudaHostRegister(address, size, 0)):
        raise RuntimeError(_refused(size, "pinned", f"CUDA error {code}"))
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    # Not at the top: it is there where a GPU is.
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    return get_accelerator_view_from_cpu_tensor(host)


def _mapped(size: int) -> Any:
    """A buffer of `size` bytes, which are there until its finalizers have been called. Raises OSError if there are not as
    many."""
    # Not torch's pinned memory, which takes the next power of two of bytes.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # kernels without transparent huge pages take longer, and that is all
        memory.madvise(mmap.MADV_HUGEPAGE)
    # A mmap itself gives its bytes back first, and calls its finalizers then.
    return (ctypes.c_char * size).from_buffer(memory)


def _refused(size: int, what: str, why: str) -> str:
    return (
        f"{size / _GIB:.1f} GiB of host memory could not be {what} ({why}); lower "
        'option "host_gib" in --additional-config "sage", "memory", or raise the limits of memory (ulimit -l, ulimit -v)'
    )


def attach(config: Any) -> None:
    """Give every layer its page cache, once its pages are allocated. config: VllmConfig."""
    if _device_bytes is None:
        return
    layers, context = owners(config), config.compilation_config.static_forward_context
    pages = {name: impl.layout.pages(context[name].kv_cache) for name, impl in layers.items()}
    blocks = {len(each) for each in pages.values()}
    if len(blocks) != 1:
        raise ValueError('option "host_gib" in --additional-config "sage", "memory" needs layers with equally many pages')
    count, device = blocks.pop(), next(iter(pages.values())).device
    frames = _count_frames(list(layers.values()), count, _device_bytes)
    for impl in layers.values():
        impl.cache = PageCache.allocate(count, impl.num_kv_heads, impl.layout, frames, device)
    if (record := recorder(config)) is not None:
        caches = [(impl.cache, impl.layout.page_bytes) for impl in layers.values()]
        record.set_host_pages(count, frames, HostPages(caches, record.add_fetched))
    tokens = options.current().page_tokens
    logger.info(
        "Pages of %s tokens are in host memory; the GPU holds those of %s tokens a layer and KV head, and all summaries",
        f"{count * tokens:,}", f"{frames * tokens:,}",
    )  # fmt: skip


def damage(config: Any) -> str:
    """What is wrong with this worker's frames, in one line; empty if the page tables are inverse to each other and every frame
    holds what its page holds. For tests: it reads all of both. config: VllmConfig."""
    context = config.compilation_config.static_forward_context
    for name, impl in owners(config).items():
        if (cache := impl.cache) is None:
            continue
        pages = impl.layout.pages(context[name].kv_cache)
        for head in range(impl.num_kv_heads):
            frame_of, page_in = cache.frame_of[:, head].long(), cache.page_in[:, head].long()
            held, filled = (frame_of >= 0).nonzero().flatten(), (page_in >= 0).nonzero().flatten()
            where = f"{name}, KV head {head}"
            if not torch.equal(page_in[frame_of[held]], held) or not torch.equal(frame_of[page_in[filled]], filled):
                return f"{where}: the tables of pages and frames are not inverse to each other"
            if differ := int((cache.frames[filled, head] != pages[page_in[filled], head]).any(1).sum()):
                return f"{where}: {differ} of {len(filled)} frames differ from their pages"
    return ""


def forget() -> None:
    """End the plan: pools that are allocated from now on are where vLLM puts them."""
    global _device_bytes
    _device_bytes = None
