# SPDX-License-Identifier: Apache-2.0
"""The prefill kernels against the reference: portable, and for sm_90."""

import weakref
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from kernel_cases import KERNEL_ERROR, ON_GPU, ON_HOPPER, batches, build, many, smoothing_tokens
from paged_batch import make_batch, poisoned, relative_error

from sage_kernels import LayerCalibration, Modifiers, PagedBatch, RopeShift, cpu, reference
from sage_kernels.portable import widen
from sage_paged import PageLayout


@many
@hypothesis.given(batches(), st.booleans())
def test_prefill(kernels, case, smooth_q: bool) -> None:
    batch, modifiers, expected = build(
        *case, kernels.device, q_block=smoothing_tokens(case[0], kernels.device) if smooth_q else 0
    )
    out = poisoned(batch.query)
    kernels.prefill(*batch.attention_args(), out, modifiers)
    assert relative_error(out, expected) < KERNEL_ERROR


@pytest.mark.parametrize("variant", [{}, {"soft_cap": 15.0}], ids=str)
@pytest.mark.parametrize(("head_dim", "k_bits", "group"), [(80, 8, 4), (64, 4, 4), (64, 8, 7), (128, 4, 7), (512, 4, 1)])
def test_smoothed_queries(kernels, head_dim: int, k_bits: int, group: int, variant: dict[str, float]) -> None:
    """A prompt, a chunk, and a single token behind a history; the last tile of each is only partly filled. Without
    smoothing, or with means of other blocks, attention is further away."""
    shape = {"layout": PageLayout(head_dim, k_bits), "requests": [(90, 90), (300, 37), (200, 1)], "query_bias": 8.0}
    shape |= {"heads": 2 * group, "kv_heads": 2, "smooth": True, "smooth_v": True, "equalize": True}
    q_block, outputs = smoothing_tokens(shape, kernels.device), []
    for block in (q_block, 0, 5):
        torch.manual_seed(0)  # for sinks
        batch, modifiers, expected = build(shape, {**variant, "sinks": True}, kernels.device, block)
        outputs.append(expected)
    out = poisoned(batch.query)
    kernels.prefill(*batch.attention_args(), out, replace(modifiers, q_block=q_block))
    errors = [relative_error(out, expected) for expected in outputs]
    assert errors[0] < 2e-3
    assert min(errors[1:]) > 2 * errors[0]


def test_other_smoothing_blocks_are_refused(kernels) -> None:
    """A kernel takes means of its own tiles only."""
    from sage_kernels.portable.prefill import prefill

    shape = {"layout": PageLayout(64), "requests": [(90, 90)], "heads": 8, "kv_heads": 2}
    batch = make_batch(**shape, device=kernels.device)
    with pytest.raises(ValueError, match="q_block is 5; on this device it must be 16 tokens, or 0"):
        prefill(*batch.attention_args(), poisoned(batch.query), Modifiers(q_block=5))


@pytest.mark.parametrize(
    ("fp8", "head_dim", "rows"), [("half", 256, 32), ("half", 128, 64), ("native", 256, 64), ("native", 512, 16)]
)
def test_tiles_of_smoothed_queries_in_99_kib(fp8: str, head_dim: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sage_kernels.portable import prefill

    monkeypatch.setattr(prefill, "fp8_path", lambda _: fp8)
    tile = prefill.tile.__wrapped__
    for group in (1, 4, 7, 16):
        assert tile(torch.device("cpu"), PageLayout(head_dim), group, True)[0] == rows
        assert tile(torch.device("cpu"), PageLayout(head_dim), group)[0] == (64 if head_dim <= 256 else 32)
    assert tile(torch.device("cpu"), PageLayout(head_dim), 64, True)[0] == 64 == reference.tile_rows(64)


@pytest.mark.skipif(ON_GPU, reason="widens pages that are not on the GPU")
@pytest.mark.parametrize(("scratch", "parts"), [(1, 9), (200_000, 6), (1 << 30, 1)])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("window", "k_bits", "v_bits"), [(0, 4, 8), (70, 4, 8), (0, 4, 4), (70, 8, 4)])
def test_int4_prompts_in_parts(
    scratch: int, parts: int, per_head: bool, window: int, k_bits: int, v_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts that the kernel for sm_90 is given make up the whole, and the memory of one is given back before the next is
    widened. The CPU path, which reads as few pages, replaces the kernel."""
    from sage_kernels.hopper import prefill
    from sage_kernels.hopper.copy import PageDescriptors

    launched = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]):
            return self.launch

        def launch(self, query, out, k, v, pages, table, lengths, starts, *rest: Any, **constants: Any) -> None:
            sinks, k_anchor, equalizer, order, v_anchor, _, _, scale, soft_cap, *_ = rest
            layout = PageLayout(constants["HEAD_DIM"], 8, constants["PAGE"])
            if constants["ORDER"]:
                # Queries come in the model's order. The kernel puts them into that of the keys, which these pages have.
                channels = torch.cat([order, order + 64], -1).long().repeat_interleave(4, 0)
                query = query.gather(-1, channels.expand_as(query))
                k_anchor, equalizer = (x.gather(-1, channels[::4]) for x in (k_anchor, equalizer))
            calibration = LayerCalibration(k_anchor, equalizer, None, v_anchor)
            modifiers = Modifiers(constants["WINDOW"], soft_cap, sinks, calibration)
            cpu.attention(query, pages, layout, PagedBatch(table, lengths, starts), scale, out, modifiers)
            launched.append(lengths)

    make, made = widen.widen, []

    def widen_after_the_last(*args: Any) -> Any:
        assert not any(each() is not None for each in made)
        wide, *rest = make(*args)
        made.append(weakref.ref(wide))
        return wide, *rest

    monkeypatch.setattr(widen, "widen", widen_after_the_last)
    monkeypatch.setattr(prefill, "_prefill_kernel", Kernel())
    monkeypatch.setattr(prefill, "descriptors", lambda pages, layout: PageDescriptors(None, None, None, None, pages))
    monkeypatch.setattr(widen, "SCRATCH", scratch)
    shape = {"requests": [(300, 8), (70, 70), (200, 1)], "heads": 12, "kv_heads": 3}
    batch = make_batch(PageLayout(128, k_bits, 64, v_bits=v_bits), **shape, smooth=True, smooth_v=True, equalize=True)
    requests = replace(batch.requests, max_seq_len=300)
    if per_head:
        requests = replace(requests, block_table=requests.block_table[:, None].repeat(1, 3, 1))
    batch.requests = requests
    modifiers = Modifiers(window, 15.0, torch.randn(12), batch.calibration)
    out = poisoned(batch.query)
    prefill.prefill(*batch.attention_args(), out, modifiers)
    assert len(launched) == parts
    assert relative_error(out, reference.attention(*batch.attention_args(), modifiers)) < 1e-3


def test_pages_that_tma_cannot_address_are_refused() -> None:
    from sage_kernels.hopper.copy import descriptors

    layout = PageLayout(128)
    cache = torch.zeros(3 * (2 * layout.page_bytes + layout.tokens), dtype=torch.uint8)
    pages = cache.as_strided((3, 2, layout.page_bytes), (2 * layout.page_bytes + layout.tokens, layout.page_bytes, 1))
    with pytest.raises(ValueError, match=r"pages are 67712 and 33792 bytes apart.*must be multiples of 512"):
        descriptors(pages, layout)


def test_heads_may_be_further_apart_than_blocks() -> None:
    """TMA reads zeros behind the extent that its descriptor has."""
    from sage_kernels.hopper.copy import descriptors

    layout = PageLayout(128)
    for blocks, heads in ((3, 2), (1, 4)):
        pages = torch.zeros(heads, blocks, layout.page_bytes, dtype=torch.uint8).transpose(0, 1)
        for pages_of in (pages, layout.empty(blocks, heads)):
            found = descriptors(pages_of, layout)
            assert found.k.shape[0] * found.k.shape[1] == pages.numel()
            assert found.scales.shape[0] * found.scales.shape[1] * 4 == pages.numel()


@pytest.mark.parametrize(("k_bits", "v_bits"), [(4, 8), (4, 4), (8, 4)])
def test_scratch_memory_for_one_context(kernels, k_bits: int, v_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are widened for one KV head of one request at a time."""
    monkeypatch.setattr(widen, "SCRATCH", 1)
    requests = [(500, 8), (70, 70), (300, 1)]
    layout = PageLayout(128, k_bits, v_bits=v_bits)
    shape = {"layout": layout, "requests": requests, "heads": 8, "kv_heads": 2, "smooth": True, "smooth_v": True}
    batch, modifiers, expected = build(shape, {"soft_cap": 15.0, "sinks": True}, kernels.device)
    out = poisoned(batch.query)
    kernels.prefill(*batch.attention_args(), out, modifiers)
    assert relative_error(out, expected) < KERNEL_ERROR


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="the portable kernel has a program for each tile")
def test_tiles_of_many_prompts(kernels) -> None:
    """More tiles than multiprocessors: short prompts, whose KV heads go side by side, and long contexts, of which one or two
    heads do."""
    requests = [(700, 700)] * 6 + [(0, 0), (45_000, 300), (1, 1), (15_000, 900), (33, 33), (2000, 2000)]
    shape = {"layout": PageLayout(128), "requests": requests, "heads": 12, "kv_heads": 3, "smooth": True}
    batch, modifiers, expected = build(shape, {}, kernels.device)
    for _ in range(2):  # a launch leaves the counters as they were
        out = poisoned(batch.query)
        kernels.prefill(*batch.attention_args(), out, modifiers)
        assert relative_error(out, expected) < KERNEL_ERROR


FORM_CASES = [(300, 300), (900, 130), (128, 128), (200, 1), (2300, 70)]


@pytest.mark.parametrize(
    ("head_dim", "heads", "max_seq_len", "window", "expected"),
    [
        (128, 8, None, 0, "COOPERATIVE"),  # what the block table holds
        (128, 8, 512, 0, "SINGLE"),
        (128, 8, 513, 0, "COOPERATIVE"),
        (128, 8, 2049, 0, "PINGPONG"),
        (128, 8, 2049, 256, "SINGLE"),
        (128, 130, 512, 0, "COOPERATIVE"),  # 65 heads of a group do not fit into 64 rows
        (64, 8, None, 0, "SINGLE"),
        (64, 8, 10_000, 0, "PINGPONG"),
        (256, 8, 100, 0, "COOPERATIVE"),
        (256, 8, 2049, 0, "PINGPONG"),
    ],
)
def test_forms_by_context(
    head_dim: int, heads: int, max_seq_len: int | None, window: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sage_kernels.hopper import prefill
    from sage_kernels.hopper.copy import PageDescriptors

    launched = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]):
            return lambda *_, **constants: launched.append((grid, constants))

    monkeypatch.setattr(prefill, "_prefill_kernel", Kernel())
    monkeypatch.setattr(prefill, "descriptors", lambda *_: PageDescriptors(*[None] * 5))
    monkeypatch.setattr(prefill, "multiprocessors", lambda _: 3)
    pages = (max_seq_len or 2048) // 128 + 1 if max_seq_len else 16
    batch = make_batch(PageLayout(head_dim), [(200, 200)], heads, 2)
    table = torch.zeros(1, pages, dtype=torch.int32)
    batch.requests = replace(batch.requests, block_table=table, max_seq_len=max_seq_len)
    prefill.prefill(*batch.attention_args(), poisoned(batch.query), Modifiers(window))
    ((programs,), constants), form = launched[0], getattr(prefill, expected)
    assert (constants["num_warps"], constants["PARTITIONS"], constants["PROGRAMS"]) == (
        form.warps,
        form.partitions,
        form.programs,
    )
    assert constants["BLOCK_Q"] == form.rows // (heads // 2)
    assert programs == 3 * form.programs


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="the portable kernel has one form")
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("variant", [{}, {"window": 130, "soft_cap": 15.0, "sinks": True}], ids=str)
@pytest.mark.parametrize(("k_bits", "v_bits"), [(8, 8), (4, 4)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_forms_agree(
    kernels, head_dim: int, k_bits: int, v_bits: int, variant: dict[str, Any], shifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, if not in how a query times the anchor of keys is summed up: which form runs depends on other requests."""
    from sage_kernels.hopper import prefill

    layout = PageLayout(head_dim, k_bits, v_bits=v_bits)
    shape = {"layout": layout, "requests": FORM_CASES, "heads": 8, "kv_heads": 2, "smooth": True, "smooth_v": True}
    batch, modifiers, expected = build(shape | {"equalize": True}, variant, kernels.device)
    if shifted:
        table = batch.requests.block_table[:, None].repeat(1, 2, 1)
        pages = torch.randint(0, 50, table.shape, dtype=torch.int32, device=table.device)
        pages[..., -3:] = 0
        frequencies = 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim)
        shift = RopeShift(pages, reference.rope_shift_table(frequencies, 50, 128).to(kernels.device))
        batch.requests = replace(batch.requests, block_table=table, rope_shift=shift)
    outputs = []
    for form in (prefill.SINGLE, prefill.COOPERATIVE, prefill.PINGPONG):
        if form != prefill.SINGLE or head_dim < 256:
            monkeypatch.setattr(prefill, "choose_form", lambda *_, form=form: form)
            outputs.append(poisoned(batch.query))
            kernels.prefill(*batch.attention_args(), outputs[-1], modifiers)
    assert shifted or relative_error(outputs[0], expected) < KERNEL_ERROR
    rounded = bool(variant) and head_dim == 128  # only a soft cap and sinks take that product
    for other in outputs[1:]:
        assert torch.equal(other, outputs[0]) or (rounded and relative_error(other, outputs[0].cpu()) < KERNEL_ERROR)
