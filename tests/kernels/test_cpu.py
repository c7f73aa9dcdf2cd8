# SPDX-License-Identifier: Apache-2.0
"""Attention on a CPU that serves requests, against the reference."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from kernel_cases import KERNEL_ERROR, SCHEDULE_ERROR, batches, build, many
from paged_batch import make_batch, poisoned, relative_error

from sage_kernels import Modifiers, PagedBatch, cpu, reference
from sage_paged import K_BITS, V_BITS, PageLayout, v_token


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


def test_requests_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short queries of many requests give what each gives alone, and take few steps."""
    requests = [(700, 1), (40, 1), (690, 1), (500, 3), (130, 130), (512, 3), (60, 1)]
    batch = make_batch(PageLayout(64, tokens=64), requests, heads=4, kv_heads=2)
    together, alone, sizes = poisoned(batch.query), poisoned(batch.query), []
    attend = cpu._attend

    def counted(q: torch.Tensor, *args) -> torch.Tensor:
        sizes.append(q.shape[1])
        return attend(q, *args)

    monkeypatch.setattr(cpu, "_attend", counted)
    for window in (0, 100):
        modifiers = Modifiers(window=window)
        cpu.attention(*batch.attention_args(), together, modifiers)
        for request in range(len(requests)):
            own = batch.requests.requests(request, request + 1)
            cpu.attention(batch.query, batch.pages, batch.layout, own, batch.scale, alone, modifiers)
        assert relative_error(together, alone) < SCHEDULE_ERROR
    assert sizes[:4] == [2, 2, 2, 1], "of about 700 tokens, of about 50, with three queries, and the prompt"


@pytest.mark.parametrize("v_bits", V_BITS)
@pytest.mark.parametrize("k_bits", K_BITS)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("own_lists", [False, True])
def test_load(own_lists: bool, head_dim: int, k_bits: int, v_bits: int) -> None:
    """Bit for bit what the reference loads, values that are no numbers included."""
    layout = PageLayout(head_dim, k_bits, 64, v_bits=v_bits)
    g = torch.Generator().manual_seed(0)
    pages, table = layout.empty(7, 3), torch.tensor([[5, 1, 3, 2]], dtype=torch.int32)
    keys, values = (torch.randn(7 * 64, 3, head_dim, generator=g) * torch.rand(448, 3, 1, generator=g) for _ in range(2))
    values[70, 0, 0] = float("nan")
    reference.store(keys, values, pages, torch.arange(7 * 64), layout)
    if own_lists:
        table = torch.stack([table, table.flip(1), table.roll(1)], 1)
    [piece] = cpu._pieces(3, layout, PagedBatch(table, torch.tensor([256]), torch.tensor([0, 256])), window=0)
    stored = cpu._load(pages, table, piece, layout)
    k, k_scale, v, v_exponent = (x[:, v_token(torch.arange(256))] for x in reference.load(pages, table[0], layout))
    assert torch.equal(stored.k[:, 0], k.float())
    assert torch.equal(stored.k_scale[:, 0], k_scale)
    assert torch.equal((stored.v[:, 0].mT * cpu.OVER_FLOAT16).nan_to_num(1e9), v.nan_to_num(1e9))
    assert torch.equal(stored.v_exponent[:, 0].nan_to_num(1e9), v_exponent.nan_to_num(1e9))
    assert (v.isnan() if v_bits == 8 else v_exponent.isnan()).any()


def test_rounding_to_e4m3() -> None:
    """As torch converts: at every number, halfway between two, and right beside it."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, halfway, halfway.nextafter(numbers[1:]), halfway.nextafter(numbers[:-1])])
    assert torch.equal(cpu._round_to_e4m3(x.clone()), x.to(torch.float8_e4m3fn).float())
