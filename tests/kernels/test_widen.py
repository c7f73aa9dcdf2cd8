# SPDX-License-Identifier: Apache-2.0
"""Pages of 4-bit keys or values as pages of 8-bit ones or of float16 values, bit for bit."""

from dataclasses import replace

import pytest
import torch
from paged_batch import make_batch

from sage_kernels import reference
from sage_paged import PAGE_TOKENS, SCRATCH_V_BITS, PageLayout


def load(pages: torch.Tensor, table: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, ...]:
    """`reference.load`, of pages with float16 values, too."""
    if layout.v_bits != SCRATCH_V_BITS:
        return reference.load(pages, table, layout)
    views = layout.views(pages[table.long()])
    v = views.v.float() * 256
    assert views.v_exponent is not None
    return tuple(x.transpose(0, 1).flatten(1, 2) for x in (views.k, views.k_scale, v.transpose(-1, -2), views.v_exponent))


@pytest.mark.parametrize("head_dim", [64, 80, 112, 128, 192, 256])
@pytest.mark.parametrize("tokens", PAGE_TOKENS)
@pytest.mark.parametrize(
    ("k_bits", "v_bits", "per_head", "fp8"),
    [(4, 8, False, "native"), (4, 8, True, "half"), (8, 4, False, "native"), (4, 4, True, "native"), (4, 4, False, "half"),
     (8, 8, False, "half")],
)  # fmt: skip
def test_widened_pages_hold_the_same(
    kernels, head_dim: int, tokens: int, k_bits: int, v_bits: int, per_head: bool, fp8: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same codes, scales and values, to the bit; 4-bit values stay rotated."""
    from sage_kernels.portable import widen as module

    monkeypatch.setattr(module, "fp8_path", lambda _: fp8)
    batch = make_batch(PageLayout(head_dim, k_bits, tokens, v_bits=v_bits), [(384, 5), (128, 128)], 4, 2, device=kernels.device)
    requests = batch.requests
    if per_head:
        table = requests.block_table[:, None].repeat(1, 2, 1)
        table[0, 1, : 384 // tokens] = table[0, 0, : 384 // tokens].flip(0)
        requests = replace(requests, block_table=table)
    wide, layout, wide_requests = module.widen(batch.pages, batch.layout, requests, 384)
    half = fp8 == "half" and head_dim <= 128
    assert layout == PageLayout(head_dim, 8, tokens, v_bits=16 if half else 8)
    assert wide_requests == replace(requests, block_table=wide_requests.block_table)
    for r, length in enumerate(requests.seq_lens.tolist()):
        used = length // tokens
        actual = load(wide.cpu(), wide_requests.block_table[r, :used].cpu(), layout)
        expected = reference.load(batch.pages.cpu(), requests.block_table[r, ..., :used].cpu(), batch.layout)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
