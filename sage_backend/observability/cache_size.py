# SPDX-License-Identifier: Apache-2.0
"""What a token takes in a worker's KV cache, from what vLLM has allocated."""

from typing import Any


def token_bytes(cache: Any) -> tuple[float, float]:
    """Bytes that a token of a request takes in a KV cache (vLLM's KVCacheConfig of one worker), and what its keys and values
    would take in BF16, without padding.

    A request holds a block of each group for every `block_size` tokens. All blocks have the same size, whatever their group, so
    padding is included. Groups without keys and values, such as the states of Mamba layers, do not grow with a request.
    """
    block = cache.kv_cache_tensors[0].size / cache.num_blocks  # each tensor is a view of the whole allocation
    owners = {name for tensor in cache.kv_cache_tensors for name in tensor.layers}
    taken = bf16 = 0.0
    for group in cache.kv_cache_groups:
        of_layers = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        specs = [of_layers.get(name, group.kv_cache_spec) for name in group.layer_names if name in owners]
        attention = [spec for spec in specs if hasattr(spec, "num_kv_heads")]
        if attention:
            taken += block / group.kv_cache_spec.block_size
            bf16 += sum(2 * spec.num_kv_heads * (spec.head_size + spec.head_size_v) for spec in attention)
    return taken, bf16
