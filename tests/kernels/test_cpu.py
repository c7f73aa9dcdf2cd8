# SPDX-License-Identifier: Apache-2.0
"""Attention on a CPU that serves requests, against the reference."""

import hypothesis
import pytest
from hypothesis import strategies as st
from kernel_cases import KERNEL_ERROR, SCHEDULE_ERROR, batches, build, many
from paged_batch import make_batch, poisoned, relative_error

from sage_kernels import Modifiers, cpu
from sage_paged import K_BITS, PageLayout


@many
@hypothesis.given(batches(), st.sampled_from([0, 1, 16, 50]))
def test_cpu(case, q_block: int) -> None:
    batch, modifiers, expected = build(*case, "cpu", q_block=q_block)
    out = poisoned(batch.query)
    cpu.attention(*batch.attention_args(), out, modifiers)
    assert relative_error(out, expected) < KERNEL_ERROR


@pytest.mark.parametrize("k_bits", K_BITS)
@pytest.mark.parametrize("q_block", [0, 32, 100])
def test_cpu_in_pieces(k_bits: int, q_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt too long for one logits matrix gives the same result: blocks of Q smoothing are not cut."""
    batch = make_batch(PageLayout(64, k_bits, 64), [(500, 500), (300, 20)], heads=4, kv_heads=2, query_bias=4.0)
    whole, pieces = poisoned(batch.query), poisoned(batch.query)
    modifiers = Modifiers(window=100, q_block=q_block)
    cpu.attention(*batch.attention_args(), whole, modifiers)
    monkeypatch.setattr(cpu, "MAX_LOGITS", 4 * 500 * 70)
    cpu.attention(*batch.attention_args(), pieces, modifiers)
    assert relative_error(pieces, whole) < SCHEDULE_ERROR
