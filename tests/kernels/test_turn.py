# SPDX-License-Identifier: Apache-2.0
"""Pages at shifted RoPE positions: keys that are rotated in copies of pages, and what their anchor adds to logits."""

from dataclasses import replace

import pytest
import torch
from paged_batch import Batch, make_batch, poisoned, relative_error

from sage_kernels import Modifiers, reference
from sage_kernels.batch import PagedBatch, RopeShift
from sage_paged import PageLayout


def shifted(layout: PageLayout, device: str = "cpu", requests: tuple[tuple[int, int], ...] = ((300, 37), (290, 1))) -> Batch:
    """Requests whose KV heads read the pages before their last ones at shifts of their own, some of them 0."""
    batch = make_batch(layout, list(requests), 4, 2, smooth=True, equalize=True)
    frequencies = 1e4 ** -(torch.arange(0, layout.head_dim, 2) / layout.head_dim)
    table = reference.rope_shift_table(frequencies, 50, layout.tokens)
    lists = batch.requests.block_table[:, None].repeat(1, 2, 1)
    pages = torch.zeros_like(lists)
    g = torch.Generator().manual_seed(1)
    for row, (length, _) in enumerate(requests):
        if before := max(0, length // layout.tokens - 1):
            pages[row, :, :before] = torch.randint(0, 50, (2, before), generator=g).int()
            pages[row, 0, 0], pages[row, 1, 0] = 0, 49
    batch.requests = replace(batch.requests, block_table=lists, rope_shift=RopeShift(pages, table))
    return batch.to(device)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("k_bits", "v_bits", "fp8"), [(8, 8, "native"), (4, 8, "native"), (4, 4, "half")])
def test_keys_turn(kernels, head_dim: int, k_bits: int, v_bits: int, fp8: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes and scales are those of the reference. Where a shift is 0, they are those of the page, to the bit."""
    from sage_kernels.portable import turn, widen

    monkeypatch.setattr(widen, "fp8_path", lambda _: fp8)
    batch = shifted(PageLayout(head_dim, k_bits, 64, v_bits=v_bits), kernels.device)
    shift, requests = batch.requests.rope_shift, replace(batch.requests, rope_shift=None)
    wide, layout, copies = widen.widen(batch.pages, batch.layout, requests, 300)
    before = layout.views(wide.cpu().clone())
    order = batch.calibration.order if k_bits == 4 else None
    turn.turn(wide, layout, copies, shift, order)
    after, moved = layout.views(wide.cpu()), 0
    for r, length in enumerate(requests.seq_lens.tolist()):
        for page in range(length // 64):
            for head in range(2):
                at, pages_back = (int(copies.block_table[r, page]), head), int(shift.pages[r, head, page])
                if not pages_back:
                    assert torch.equal(after.k[at], before.k[at])
                    assert torch.equal(after.k_scale[at], before.k_scale[at])
                    continue
                row = shift.table[pages_back].cpu()
                if order is not None:
                    row = row.view(2, -1)[:, order[head].long().cpu()].flatten()
                codes, scale = reference.turn_keys(before.k[at], before.k_scale[at], row)
                assert (after.k[at].int() - codes.int()).abs().max() <= 1  # ties, after sums in another order
                assert (after.k[at] != codes).float().mean() < 1e-3
                assert torch.allclose(after.k_scale[at], scale, rtol=1e-5)
                moved += 1
    assert moved >= 8
    assert torch.equal(after.v.view(torch.uint8), before.v.view(torch.uint8))


@pytest.mark.parametrize(
    ("head_dim", "group", "longest"), [(64, 2, 300), (80, 7, 300), (128, 1, 300), (128, 64, 300), (128, 4, 8500)]
)
def test_page_bias(kernels, head_dim: int, group: int, longest: int) -> None:
    """Of up to 133 pages, in which a program looks for shifts 64 at a time: of one KV head there are none behind page 64."""
    from sage_kernels.portable import turn

    g, layout, lengths = torch.Generator().manual_seed(2), PageLayout(head_dim, tokens=64), (longest, 290)
    used = [-(-length // 64) for length in lengths]
    frequencies = 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim)
    pages = torch.randint(0, 50, (2, 2, max(used)), generator=g, dtype=torch.int32)
    pages[:, 0, 64:], pages[:, 1, 128:] = 0, 0
    shift = RopeShift(pages.to(kernels.device), reference.rope_shift_table(frequencies, 50, 64).to(kernels.device))
    starts, seq_lens = (torch.tensor(of, dtype=torch.int32, device=kernels.device) for of in ((0, 37, 38), lengths))
    batch = PagedBatch(torch.zeros(2, max(used), dtype=torch.int32, device=kernels.device), seq_lens, starts, max_query_len=40)
    query = torch.randn(38, 2 * group, head_dim, generator=g).bfloat16().to(kernels.device)
    anchor = (300 * torch.randn(2, head_dim, generator=g)).to(kernels.device)
    bias = turn.page_bias(query, layout, batch, shift, 0.5, anchor)
    assert bias.shape == (2, 2, max(used), 38, group)
    for r, (first, last) in enumerate(((0, 37), (37, 38))):
        q = query[first:last].double().unflatten(1, (2, group))  # [queries, kv_heads, group, head_dim]
        rotated = reference.turn_back(q[:, :, None], shift.table[shift.pages[r, :, : used[r]].long()].double()[:, :, None])
        expected = ((rotated - q[:, :, None]) * anchor.double()[:, None, None]).sum(-1) * 0.5 * reference.LOG2E
        actual = bias[:, r, : used[r], : last - first].permute(2, 0, 1, 3)
        assert expected.abs().max() > 500
        assert (actual - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize(("k_bits", "bound"), [(8, 1.25), (4, 1.1)])
def test_turned_keys_are_nearly_as_exact_as_turned_queries(k_bits: int, bound: float) -> None:
    """INT8 rounds queries once and keys twice instead of both once: sqrt(3 / 2) of the error, if P and V had none."""
    batch = shifted(PageLayout(128, k_bits, 64), requests=((1000, 200),))
    shift, modifiers = batch.requests.rope_shift, Modifiers(calibration=batch.calibration)
    outputs = [reference.attention(*batch.attention_args(), modifiers, turns_keys=turns) for turns in (False, True)]
    key = rotated_keys(batch, shift)
    errors = []
    for head in range(2):
        expected = reference.exact_attention(
            batch.query[:, 2 * head : 2 * head + 2], key[:, head : head + 1], batch.value[:1000, head : head + 1], batch.scale
        )
        errors.append([relative_error(out[:, 2 * head : 2 * head + 2], expected) for out in outputs])
    for of_queries, of_keys in errors:
        assert of_keys < bound * of_queries


def rotated_keys(batch: Batch, shift: RopeShift) -> torch.Tensor:
    """The keys of the only request, each where its KV head reads it: [tokens, kv_heads, head_dim]."""
    tokens = torch.arange(len(batch.slots) - 1)
    table = shift.table[shift.pages[0][:, tokens // batch.layout.tokens].long()].transpose(0, 1)
    cos, sin = table.chunk(2, -1)
    return reference.turn_back(batch.key[tokens].float(), torch.cat([cos, -sin], -1))


@pytest.mark.parametrize("soft_cap", [0.0, 15.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("head_dim", "k_bits", "v_bits"), [(64, 8, 8), (128, 8, 8), (128, 4, 4), (96, 4, 8), (256, 8, 8)])
def test_prompts_with_shifts(
    kernels, head_dim: int, k_bits: int, v_bits: int, sinks: bool, soft_cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole batches, and one KV head of one request at a time."""
    from sage_kernels.portable import widen

    requests = ((300, 130), (290, 1), (40, 40), (640, 65))
    batch = shifted(PageLayout(head_dim, k_bits, 64, v_bits=v_bits), requests=requests)
    modifiers = Modifiers(0, soft_cap, torch.randn(4) if sinks else None, batch.calibration)
    expected = reference.attention(*batch.attention_args(), modifiers, turns_keys=True)
    of_queries = reference.attention(*batch.attention_args(), modifiers)
    batch = batch.to(kernels.device)
    for scratch in (widen.SCRATCH, 1):
        monkeypatch.setattr(widen, "SCRATCH", scratch)
        out = poisoned(batch.query)
        kernels.prefill(*batch.attention_args(), out, modifiers.to(kernels.device))
        # On sm_90, 13 bits are left behind the point of logits, and some codes of P round the other way.
        assert relative_error(out, expected) < 6e-3
        assert relative_error(out, of_queries) > 3e-2  # which turns queries, as decodes do
