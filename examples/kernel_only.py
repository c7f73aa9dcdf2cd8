# SPDX-License-Identifier: Apache-2.0
"""The kernels without vLLM: quantize keys and values into pages, attend to the pages, compare with exact attention.

`python examples/kernel_only.py` runs on a GPU if there is one, and on a CPU otherwise.
"""

import torch

import sage_kernels
from sage_kernels import reference
from sage_paged import PageLayout

device = "cuda" if torch.cuda.is_available() else "cpu"
tokens, heads, kv_heads, head_dim = 1000, 8, 2, 128
query, key, value = (torch.randn(tokens, n, head_dim, device=device).bfloat16() for n in (heads, kv_heads, kv_heads))
key[..., ::17] += 4  # channel biases, as in real models
scale = head_dim**-0.5
# A layer's calibration: here only what is subtracted from its keys before quantization, [kv_heads, head_dim].
calibration = sage_kernels.LayerCalibration(k_anchor=key.float().mean(0))
modifiers = sage_kernels.Modifiers(calibration=calibration)

for k_bits in (8, 4):
    layout = PageLayout(head_dim, k_bits)
    blocks = -(-tokens // layout.tokens)
    pages = layout.empty(blocks, kv_heads, device)  # uint8 [blocks, kv_heads, page_bytes]
    sage_kernels.store(key, value, pages, torch.arange(tokens, device=device), layout, calibration)

    # One request whose tokens are all queries: a prompt. It owns all pages, in order.
    block_table = torch.arange(blocks, dtype=torch.int32, device=device)[None]  # [requests, blocks]
    seq_lens = torch.tensor([tokens], dtype=torch.int32, device=device)  # [requests]
    query_start_loc = torch.tensor([0, tokens], dtype=torch.int32, device=device)  # [requests + 1]
    batch = sage_kernels.PagedBatch(block_table, seq_lens, query_start_loc)
    out = torch.empty_like(query)
    sage_kernels.attend_prefill(query, pages, layout, batch, scale, out, modifiers)

    exact = reference.exact_attention(query, key, value, scale)
    error = (out.float() - exact).norm() / exact.norm()
    print(f"K INT{k_bits}, V FP8: {layout.bytes_per_token} bytes a token and KV head, relative error {error:.4f}")
