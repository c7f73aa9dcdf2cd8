# SPDX-License-Identifier: Apache-2.0
"""Random cases for the kernel tests, and bounds on how far a kernel may be from the reference."""

from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from paged_batch import Batch, make_batch

from sage_kernels import Modifiers, reference
from sage_kernels.portable.prefill import tile
from sage_paged import HEAD_DIMS, K_BITS, MAX_V_INT4_DIM, PAGE_TOKENS, V_BITS, PageLayout

KERNEL_ERROR = 2e-2
"""Bound on the relative L2 distance to the reference, for any shape. A logit that is one float32 step off may move a weight
over a rounding boundary of e4m3; in a row of few keys that is up to 3%. `test_attention.test_long_rows` has the bound for rows
where this averages out."""

ON_GPU = torch.cuda.is_available()
ON_HOPPER = ON_GPU and torch.cuda.get_device_capability() == (9, 0)

SCHEDULE_ERROR = 5e-4 if ON_GPU else 1e-4
"""Bound on the distance between two schedules of one kernel. They differ by the rounding of float32 sums and, on a GPU, because
tensor cores sum a page's FP8 products in 22 bits."""

DECODE_ERROR = 5e-3 if ON_HOPPER else SCHEDULE_ERROR
"""Bound on the distance between prefill and decode. On sm_90 they are different kernels: prefill rounds logits to 2**-13, so
that in some rows a weight is rounded the other way. This was seen in one of 64 rows, with a distance of 2e-3."""

many = hypothesis.settings(max_examples=25, deadline=None, print_blob=True)  # on a GPU, most of them compile a kernel


@st.composite
def batches(draw: st.DrawFn, max_query: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `make_batch`, and the variant of attention: window, soft_cap, and whether there are sinks. max_query:
    most query tokens of a request; None for any number."""
    head_dim, k_bits, tokens = (draw(st.sampled_from(choices)) for choices in (HEAD_DIMS, K_BITS, PAGE_TOKENS))
    v_bits = draw(st.sampled_from(V_BITS)) if head_dim <= MAX_V_INT4_DIM else 8
    layout = PageLayout(head_dim, k_bits, tokens, v_bits=v_bits)
    edge = draw(st.sampled_from([layout.tokens, 2 * layout.tokens]))
    length = st.one_of(st.sampled_from([1, edge - 1, edge, edge + 1]), st.integers(1, 700 if ON_GPU else 300))
    requests = []
    for total in draw(st.lists(length, min_size=1, max_size=6 if ON_GPU else 3)):
        requests.append((total, draw(st.integers(1, min(total, max_query or total)))))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 4), (1, 5), (1, 8), (2, 7)]))
    shape = {
        "layout": layout,
        "requests": requests,
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "dtype": draw(st.sampled_from([torch.bfloat16, torch.float16])),
        "seed": draw(st.integers(0, 2**31)),
        "value_bias": draw(st.sampled_from([0.0, 4.0])),
        "query_bias": draw(st.sampled_from([0.0, 4.0])),
        "smooth": draw(st.booleans()),
        "smooth_v": draw(st.booleans()),
        "equalize": draw(st.booleans()),
    }
    variant = {
        "window": draw(st.sampled_from([0, 0, 1, 40, 130])),
        "soft_cap": draw(st.sampled_from([0.0, 0.0, 15.0])),
        "sinks": draw(st.booleans()),
    }
    return shape, variant


def build(
    shape: dict[str, Any], variant: dict[str, Any], device: str, q_block: int = 0
) -> tuple[Batch, Modifiers, torch.Tensor]:
    """The batch and the modifiers on `device`, and the reference's output on the CPU. Random sinks come from the global
    generator. variant: window, soft_cap, and whether there are sinks; what is missing is off."""
    batch = make_batch(**shape)
    modifiers = Modifiers(
        window=variant.get("window", 0),
        soft_cap=variant.get("soft_cap", 0.0),
        sinks=torch.randn(shape["heads"]) if variant.get("sinks") else None,
        calibration=batch.calibration,
        q_block=q_block,
    )
    expected = reference.attention(*batch.attention_args(), modifiers)
    return batch.to(device), modifiers.to(device), expected


def smoothing_tokens(shape: dict[str, Any], device: str) -> int:
    """The Modifiers.q_block of a shape in the portable prefill kernel, which sm_90 uses, too, if queries are smoothed.
    (`api.smoothing_block` says the same on a GPU. On a CPU it is the block of the CPU's own path.)"""
    group = shape["heads"] // shape["kv_heads"]
    return tile(torch.device(device), shape["layout"], group, smooth_q=True)[0] // group
