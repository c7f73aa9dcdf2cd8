# SPDX-License-Identifier: Apache-2.0
"""Keeps the CPU model runner from zeroing new blocks of hybrid models.

What: wraps `CPUModelRunner._zero_block_ids`.
Why: where a block is several pages, this runner takes the numbers of blocks for those of pages and zeroes pages of other
    requests. This backend needs no zeros: nothing behind a context's last token is ever read of a page.
Releases: 0.31 to 0.33.
Remove when: `CPUModelRunner._zero_block_ids` translates blocks to kernel blocks, as the GPU runner does.
"""

import functools
from typing import Any

from sage_backend.engine import checks
from sage_backend.engine.patches.target import find, wrap


@functools.cache
def apply() -> None:
    runner = find(__name__, "vllm.v1.worker.cpu_model_runner", "CPUModelRunner")
    wrap(__name__, runner, "_zero_block_ids", _of_other_backends)


def _of_other_backends(zero_blocks: Any) -> Any:
    def zero_blocks_of_others(self: Any, block_ids: list[int]) -> None:
        if not checks.is_chosen(self.vllm_config):
            zero_blocks(self, block_ids)

    return zero_blocks_of_others
