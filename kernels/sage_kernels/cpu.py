"""`reference.attention` for a CPU that serves requests: all heads of a request at once, and only the pages it can see.

The arithmetic is the kernels' own. INT8 products are exact in float32 (|sum| <= 127 * 128 * 256 < 2**24), which on a CPU is
the fast way to do them. The store needs no version of its own: `reference.store` already takes all tokens at once.
"""

import torch

from sage_kernels.reference import LOG2E, Parts, Turns, load, quantize_p, query_parts, times_keys, turned
from sage_paged import PageLayout

MAX_LOGITS = 1 << 24
"""Elements of the logits matrix that is held at a time; longer prompts are taken in pieces."""


def _logits(parts: Parts, k: torch.Tensor, k_scale: torch.Tensor) -> torch.Tensor:
    """`times_keys` for parts of queries [kv_heads, group, queries, head_dim] and the keys of KV heads."""
    flat = [(codes.flatten(1, 2), q_scale.flatten(1, 2)) for codes, q_scale in parts]
    return times_keys(flat, k, k_scale).unflatten(1, parts[0][1].shape[1:])


def attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    anchor: torch.Tensor | None = None,
    v_anchor: torch.Tensor | None = None,
    turns: Turns | None = None,
    q_block: int = 0,
) -> None:
    """`reference.attention` with the same arguments; writes `out`, which has query's shape."""
    kv_heads = pages.shape[1]
    group = query.shape[1] // kv_heads
    every = query.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)  # [kv_heads, group, queries, head_dim]
    sink = None if sinks is None else sinks.float().mul(LOG2E).view(kv_heads, group, 1, 1)
    bias = torch.zeros(every.shape[:-1])
    if anchor is not None:
        bias = (every.float() @ anchor[:, None, :, None]).squeeze(-1) * (scale * LOG2E)

    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    block = q_block or 1
    for request, length in enumerate(lengths):
        start, end = starts[request], starts[request + 1]
        if start == end:
            continue
        step = max(block, MAX_LOGITS // (query.shape[1] * length) // block * block)
        for low in range(start, end, step):
            high = min(low + step, end)
            last = length - (end - high)  # one past the position of the last query of this piece
            first_page = max(0, last - (high - low) - window + 1) // layout.tokens if window else 0
            begin = first_page * layout.tokens
            used = slice(first_page, -(-last // layout.tokens))
            table = block_table[request, ..., used]
            k, k_scale, v, v_exponent = (x[:, : last - begin] for x in load(pages, table, layout))

            q = every[:, :, low:high]
            logits = _logits(query_parts(q, scale * LOG2E, q_block), k, k_scale)
            row_bias = bias[:, :, low:high, None]
            if turns is not None:
                for page, turn in enumerate(turns.pages[request, :, used].T):
                    if not turn.any():
                        continue
                    nearer = turned(q.float(), turns.table[turn.long()][:, None, None])
                    own = slice(page * layout.tokens, (page + 1) * layout.tokens)
                    logits[..., own] = _logits(query_parts(nearer, scale * LOG2E, q_block), k[:, own], k_scale[:, own])
                    if anchor is not None:
                        logits[..., own] += torch.matmul(nearer, anchor[:, None, :, None]) * (scale * LOG2E) - row_bias
            if soft_cap:
                logits = (soft_cap * LOG2E) * torch.tanh((logits + row_bias) / (soft_cap * LOG2E))
            if high - low > 1 or window:
                positions = torch.arange(last - (high - low), last)[:, None]
                keys = torch.arange(begin, last)[None, :]
                hidden = keys > positions
                if window:
                    hidden |= keys <= positions - window
                logits.masked_fill_(hidden, float("-inf"))

            logits += v_exponent[:, None, None, :]
            p8, base = quantize_p(logits, layout.tokens)
            total = torch.matmul(p8.flatten(1, 2), (-v_exponent).exp2()[..., None]).unflatten(1, p8.shape[1:3])
            result = torch.matmul(p8.flatten(1, 2), v).unflatten(1, p8.shape[1:3])
            if v_anchor is not None:
                result += total * v_anchor[:, None, None]
            if sink is not None:
                total = total + torch.exp2((sink if soft_cap else sink - row_bias) - base)
            result /= total
            out[low:high] = result.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
