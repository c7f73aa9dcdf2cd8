# SPDX-License-Identifier: Apache-2.0
"""A store for vLLM's OffloadingConnector on a machine without a GPU, where vLLM has none.

The connector chooses the blocks, and shows the pages of all layers as rows of bytes, as it does on a GPU. Only the copies
differ: they are made at once, from host memory to host memory.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostOffloadingSpec(CPUOffloadingSpec):
    """vLLM's bookkeeping of a store in host memory, with `HostOffloadingWorker` for the copies."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> "HostOffloadingWorker":  # type: ignore[override]
        if self._worker is None:
            self._worker = HostOffloadingWorker(kv_caches, self.num_chunks)  # type: ignore[assignment]
        return self._worker  # type: ignore[return-value]


class HostOffloadingWorker(OffloadingWorker):
    """pages: for each tensor of the cache, int8 [blocks, bytes of a block]; stored: the same of the store. A block of the store
    is one of the cache."""

    def __init__(self, kv_caches: CanonicalKVCaches, chunks: int) -> None:
        self.tensors_of_group = [[ref.tensor_idx for ref in refs] for refs in kv_caches.group_data_refs]
        self.pages = [each.tensor for each in kv_caches.tensors]
        self.stored = [pages.new_zeros(chunks, pages.shape[1]) for pages in self.pages]
        self.finished: list[TransferResult] = []

    def _blocks(self, cache: Any, store: Any) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """What a job copies: a tensor, and int64 block numbers in it and in the store."""
        ends = list(accumulate(cache.group_sizes))
        for tensors, first, end in zip(self.tensors_of_group, [0, *ends], ends, strict=False):
            for tensor in tensors:
                yield tensor, *(torch.from_numpy(side.block_ids[first:end]).long() for side in (cache, store))

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for tensor, blocks, chunks in self._blocks(src_spec, dst_spec):
            self.stored[tensor][chunks] = self.pages[tensor][blocks]
        self.finished.append(TransferResult(job_id, success=True))
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for tensor, blocks, chunks in self._blocks(dst_spec, src_spec):
            self.pages[tensor][blocks] = self.stored[tensor][chunks]
        self.finished.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing to wait for."""
