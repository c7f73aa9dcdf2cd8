# SPDX-License-Identifier: Apache-2.0
"""Every kernel against the reference, on the GPU if there is one and in Triton's interpreter otherwise."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from paged_batch import Batch, make_batch, relative_error

from sage_kernels import cpu, reference
from sage_paged import HEAD_DIMS, K_BITS, PAGE_TOKENS, PageLayout

KERNEL_ERROR = 2e-2
"""Bound on relative L2 distance to the reference for any shape: a logit that is one float32 step off may move a weight over
a rounding boundary of e4m3, which in a row of few keys is up to 3%. `test_long_rows` has the bound where that averages out."""

ON_GPU = torch.cuda.is_available()

SCHEDULE_ERROR = 5e-4 if ON_GPU else 1e-4
"""The same between two schedules of one kernel: the rounding of float32 sums and, on a GPU, that tensor cores sum a page's FP8
products in 22 bits."""

DECODE_ERROR = 5e-3 if ON_GPU and torch.cuda.get_device_capability() == (9, 0) else SCHEDULE_ERROR
"""The same between prompts and decodes. On sm_90 they have kernels of their own: that for prompts rounds logits to 2**-13, so
that in some rows a weight falls on the other side of a rounding boundary. One of 64 rows did, by 2e-3 of all."""


@st.composite
def batches(draw: st.DrawFn, max_query: int | None = None) -> tuple[dict, dict]:
    layout = PageLayout(draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from(K_BITS)), draw(st.sampled_from(PAGE_TOKENS)))
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
    }
    mask = {
        "window": draw(st.sampled_from([0, 0, 1, 40, 130])),
        "soft_cap": draw(st.sampled_from([0.0, 0.0, 15.0])),
        "sinks": draw(st.booleans()),
    }
    return shape, mask


def build(shape: dict, mask: dict, device: str, q_block: int = 0) -> tuple[Batch, dict, torch.Tensor]:
    """The batch, what attention takes beside it, and the reference's output."""
    sinks = torch.randn(shape["heads"]) if mask["sinks"] else None
    batch = make_batch(**shape)
    mask = {**mask, "sinks": sinks, "anchor": batch.anchor, "v_anchor": batch.v_anchor}
    expected = reference.attention(*batch.attention_args(), **mask, q_block=q_block)
    on_device = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in mask.items()}
    return make_batch(**shape, device=device), on_device, expected


def poisoned(query: torch.Tensor) -> torch.Tensor:
    return torch.full(query.shape, float("nan"), dtype=torch.float32, device=query.device)


many = hypothesis.settings(max_examples=25, deadline=None, print_blob=True)  # on a GPU, most of them compile a kernel


@many
@hypothesis.given(batches())
def test_store(kernels, case) -> None:
    batch = make_batch(**case[0], device=kernels.device)
    written = batch.garbage.clone()
    kernels.store(batch.key, batch.value, written, batch.slots, batch.layout, batch.anchor, batch.v_anchor)
    if not ON_GPU:
        assert torch.equal(written, batch.pages)
        return
    # A GPU fuses the multiply and the rounding: codes on a boundary may be one off, everything else is equal. For INT4 keys,
    # such a code may lead to other levels for its group.
    mine, theirs = (batch.layout.views(pages.cpu()) for pages in (written, batch.pages))
    for name in ("k_scale", "v_exponent", "v"):
        if getattr(mine, name) is not None:
            assert torch.equal(getattr(mine, name).view(torch.uint8), getattr(theirs, name).view(torch.uint8)), name
    k, k_expected = (reference.key_codes(pages.cpu(), batch.layout)[0].int() for pages in (written, batch.pages))
    assert (k - k_expected).abs().max() <= (1 if batch.layout.k_bits == 8 else 17)
    assert (k != k_expected).float().mean() < (1e-3 if batch.layout.k_bits == 8 else 1e-2)


def stored_keys(pages: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The keys that were written for the tokens of a batch, [tokens, kv_heads, head_dim], less their anchor."""
    codes, k_scale = reference.key_codes(pages, batch.layout)
    slots = batch.slots[batch.slots >= 0]
    block, offset = slots // batch.layout.tokens, slots % batch.layout.tokens
    return (codes * k_scale[..., None])[block, :, offset]


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_first_tokens_fix_the_anchor(kernels, head_dim: int, triton: bool) -> None:
    store, device = (kernels.store, kernels.device) if triton else (reference.store, "cpu")
    batch = make_batch(PageLayout(head_dim), [(100, 1), (80, 1)], heads=2, kv_heads=2, channel_bias=20.0, device=device)
    anchor = torch.full((2, head_dim), float("nan"), device=device)
    pages = batch.garbage.clone()
    store(batch.key, batch.value, pages, torch.full_like(batch.slots, -1), batch.layout, anchor)
    assert anchor.isnan().all(), "padding has no say"
    assert torch.equal(pages, batch.garbage)

    batch.slots[:3] = -1
    store(batch.key, batch.value, pages, batch.slots, batch.layout, anchor)
    assert torch.allclose(anchor, batch.key[3 : reference.ANCHOR_TOKENS].float().mean(0), atol=1e-5)
    fixed = anchor.clone()
    store(2 * batch.key, batch.value, batch.garbage.clone(), batch.slots, batch.layout, anchor)
    assert torch.equal(anchor, fixed), "it changed"

    # Every token block was stored with the same anchor: with another, errors would be of the size of the keys.
    keys = batch.key[batch.slots >= 0].float()
    error = stored_keys(pages, batch) + anchor - keys
    assert error.abs().max() <= (keys - anchor).abs().max() / 200


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="the interpreter runs one program after another")
def test_programs_that_run_at_once_fix_one_anchor(kernels) -> None:
    layout = PageLayout(128)
    key = torch.randn(16384, 8, 128, dtype=torch.bfloat16, device=kernels.device) + 10
    slots = torch.arange(len(key), device=kernels.device)
    for _ in range(200):
        anchor = torch.full((8, 128), float("nan"), device=kernels.device)
        fixing, fixed = (layout.empty(128, 8, kernels.device) for _ in range(2))
        kernels.store(key, key, fixing, slots, layout, anchor)
        kernels.store(key, key, fixed, slots, layout, anchor)
        assert torch.equal(fixing, fixed)


@pytest.mark.parametrize("triton", [False, True])
def test_anchors_are_finite(kernels, triton: bool) -> None:
    store, device = (kernels.store, kernels.device) if triton else (reference.store, "cpu")
    batch = make_batch(PageLayout(64), [(100, 1)], heads=2, kv_heads=2, device=device)
    for slots, key in (
        (torch.where(torch.arange(101, device=device) < 90, -1, batch.slots), batch.key),  # none among the first
        (batch.slots, torch.full_like(batch.key, float("inf"))),
        (batch.slots, torch.full_like(batch.key, float("nan"))),
    ):
        anchor = torch.full((2, 64), float("nan"), device=device)
        store(key, batch.value, batch.garbage.clone(), slots, batch.layout, anchor)
        assert torch.equal(anchor, torch.zeros_like(anchor))


def tile_tokens(shape: dict, device: str) -> int:
    """The tokens whose queries have one mean in the kernel."""
    from sage_kernels import prefill

    group = shape["heads"] // shape["kv_heads"]
    return prefill.tile(torch.device(device), shape["layout"], group, smooth_q=True)[0] // group


@many
@hypothesis.given(batches(), st.booleans())
def test_prefill(kernels, case, smooth_q: bool) -> None:
    batch, mask, expected = build(*case, kernels.device, q_block=tile_tokens(case[0], kernels.device) if smooth_q else 0)
    out = poisoned(batch.query)
    kernels.prefill(*batch.attention_args(), out, **mask, smooth_q=smooth_q)
    assert relative_error(out, expected) < KERNEL_ERROR


@many
@hypothesis.given(batches(max_query=8), st.sampled_from([1, 2, 3, 5, 17, 40]))
def test_decode(kernels, case, programs: int) -> None:
    batch, mask, expected = build(*case, kernels.device)
    longest = int(batch.query_start_loc.diff().max())
    out = poisoned(batch.query)
    kernels.decode(*batch.attention_args(), out, **mask, max_query_len=longest, programs=programs)
    assert relative_error(out, expected) < KERNEL_ERROR


@many
@hypothesis.given(batches(), st.sampled_from([0, 1, 16, 50]))
def test_cpu(case, q_block: int) -> None:
    batch, mask, expected = build(*case, "cpu", q_block=q_block)
    out = poisoned(batch.query)
    cpu.attention(*batch.attention_args(), out, **mask, q_block=q_block)
    assert relative_error(out, expected) < KERNEL_ERROR


@pytest.mark.parametrize("k_bits", K_BITS)
@pytest.mark.parametrize("q_block", [0, 32, 100])
def test_cpu_in_pieces(k_bits: int, q_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt too long for one logits matrix gives the same result: blocks of queries are not cut."""
    batch = make_batch(PageLayout(64, k_bits, 64), [(500, 500), (300, 20)], heads=4, kv_heads=2, query_bias=4.0)
    whole, pieces = poisoned(batch.query), poisoned(batch.query)
    cpu.attention(*batch.attention_args(), whole, window=100, q_block=q_block)
    monkeypatch.setattr(cpu, "MAX_LOGITS", 4 * 500 * 70)
    cpu.attention(*batch.attention_args(), pieces, window=100, q_block=q_block)
    assert relative_error(pieces, whole) < SCHEDULE_ERROR


@pytest.mark.parametrize("mask", [{}, {"soft_cap": 15.0}], ids=str)
@pytest.mark.parametrize(("head_dim", "k_bits", "group"), [(80, 8, 4), (64, 4, 4), (64, 8, 7), (128, 4, 7)])
def test_smoothed_queries(kernels, head_dim: int, k_bits: int, group: int, mask: dict) -> None:
    """A prompt, a chunk of one and a single token behind a history; no tile is full of tokens at its end. Without smoothing, or
    with means of other blocks, attention is further away than this."""
    shape = {"layout": PageLayout(head_dim, k_bits), "requests": [(90, 90), (300, 37), (200, 1)], "query_bias": 8.0}
    shape |= {"heads": 2 * group, "kv_heads": 2, "smooth": True, "smooth_v": True}
    mask = {"window": 0, "soft_cap": 0.0, "sinks": True, **mask}
    outputs = []
    for q_block in (tile_tokens(shape, kernels.device), 0, 5):
        torch.manual_seed(0)  # for sinks
        batch, on_device, expected = build(shape, mask, kernels.device, q_block)
        outputs.append(expected)
    out = poisoned(batch.query)
    kernels.prefill(*batch.attention_args(), out, **on_device, smooth_q=True)
    errors = [relative_error(out, expected) for expected in outputs]
    assert errors[0] < 2e-3
    assert min(errors[1:]) > 2 * errors[0]


def test_parts_of_queries_add_up() -> None:
    """However the mean was rounded, no query is further from the sum of its parts than half a step of its own."""
    query = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0))
    query[..., 5::17] += 30
    (codes, scale), (mean_codes, mean_scale) = reference.query_parts(query, 1.0, 16)
    assert torch.equal(mean_codes[:, 32:48], mean_codes[:, 32:33].expand(-1, 16, -1))
    error = codes * scale[..., None] + mean_codes * mean_scale[..., None] - query
    assert (error.abs() <= 0.5001 * scale[..., None] + 1e-5).all()
    [(whole_codes, whole_scale)] = reference.query_parts(query, 1.0)
    assert error.norm() < 0.2 * (whole_codes * whole_scale[..., None] - query).norm()
    (_, last), _ = reference.query_parts(query, 1.0, 49)
    assert last[:, -1].max() < 0.01, "a block of one token leaves nothing but what its mean was rounded by"


@pytest.mark.parametrize("k_bits", K_BITS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_long_rows(kernels, head_dim: int, k_bits: int) -> None:
    layout = PageLayout(head_dim, k_bits)
    shape = {"layout": layout, "requests": [(500, 8), (700, 8)], "heads": 8, "kv_heads": 2}
    shape |= {"smooth": True, "value_bias": 4.0, "smooth_v": True}
    batch, mask, expected = build(shape, {"window": 0, "soft_cap": 0.0, "sinks": True}, kernels.device)
    for run, options in ((kernels.prefill, {}), (kernels.decode, {"max_query_len": 8, "programs": 7})):
        out = poisoned(batch.query)
        run(*batch.attention_args(), out, **mask, **options)
        assert relative_error(out, expected) < 1e-3


def test_result_does_not_depend_on_the_schedule(kernels) -> None:
    """A query's output is the same in a whole prompt and in a chunk, and as a decode by any number of programs."""
    layout = PageLayout(128)
    whole = make_batch(layout, [(500, 500)], heads=8, kv_heads=2, device=kernels.device, smooth_v=True)
    sums = {"sinks": torch.linspace(-3, 6, 8, device=kernels.device), "v_anchor": whole.v_anchor}
    prompt = poisoned(whole.query)
    kernels.prefill(*whole.attention_args(), prompt, **sums)
    for n in (1, 3, 77):
        tail = [whole.query[-n:], whole.pages, layout, whole.block_table, whole.seq_lens]
        starts = torch.tensor([0, n], dtype=torch.int32, device=kernels.device)
        chunk = poisoned(whole.query[-n:])
        kernels.prefill(*tail, starts, whole.scale, chunk, **sums)
        assert relative_error(chunk, prompt[-n:]) < SCHEDULE_ERROR
        decoded = []
        for programs in (1, 3, 8) if n <= 8 else ():
            decoded.append(poisoned(whole.query[-n:]))
            kernels.decode(*tail, starts, whole.scale, decoded[-1], **sums, max_query_len=n, programs=programs)
            assert relative_error(decoded[-1], decoded[0]) < SCHEDULE_ERROR
            assert relative_error(decoded[-1], prompt[-n:]) < DECODE_ERROR


@pytest.mark.parametrize("steps", [(0.0, 90.0, -60.0, 180.0), (200.0, 0.0, -200.0, 199.0), (-300.0, -250.0, -350.0, -300.0)])
@pytest.mark.parametrize("k_bits", K_BITS)
def test_pages_whose_logits_lie_far_apart(kernels, k_bits: int, steps: tuple[float, ...]) -> None:
    """From page to page, the largest logit rises and falls by more than a float32 has exponents for."""
    batch = make_batch(PageLayout(128, k_bits), [(500, 8)], heads=8, kv_heads=2)
    batch.key[:, :, 0] = torch.tensor(steps).repeat_interleave(128)[: len(batch.key), None]
    batch.query[:, :, 0] = 128**0.5
    reference.store(batch.key, batch.value, batch.pages, batch.slots, batch.layout)
    expected = reference.attention(*batch.attention_args())
    batch = batch.to(kernels.device)
    for run, options in ((kernels.prefill, {}), (kernels.decode, {"max_query_len": 8, "programs": 3})):
        out = poisoned(batch.query)
        run(*batch.attention_args(), out, **options)
        assert relative_error(out, expected) < KERNEL_ERROR


@pytest.mark.parametrize("k_bits", K_BITS)
def test_values_of_all_sizes(kernels, k_bits: int) -> None:
    """Around the largest value that has finer scales, and up to what saturates."""
    batch = make_batch(PageLayout(128, k_bits), [(300, 8)], heads=8, kv_heads=2)
    sizes = torch.tensor([1e-5, 1e-2, 1.0, 100.0, 112.0, 113.0, 224.0, 225.0, 448.0, 800.0, 900.0])
    sizes = sizes.repeat(28)[: len(batch.value), None, None]
    batch.value *= (sizes / batch.value.abs().amax(-1, keepdim=True)).to(torch.bfloat16)
    reference.store(batch.key, batch.value, batch.pages, batch.slots, batch.layout)
    expected = reference.attention(*batch.attention_args())
    batch.pages = batch.garbage
    batch = batch.to(kernels.device)
    kernels.store(batch.key, batch.value, batch.pages, batch.slots, batch.layout)
    for run, options in ((kernels.prefill, {}), (kernels.decode, {"max_query_len": 8, "programs": 3})):
        out = poisoned(batch.query)
        run(*batch.attention_args(), out, **options)
        assert relative_error(out, expected) < KERNEL_ERROR


def test_many_pages(kernels) -> None:
    """Sums are carried from one page's reference to the next, over and over."""
    shape = {"layout": PageLayout(64, 8, 64), "requests": [(12000 if ON_GPU else 4000, 1)], "heads": 4, "kv_heads": 1}
    batch, mask, expected = build(shape, {"window": 0, "soft_cap": 0.0, "sinks": False}, kernels.device)
    for run, options in ((kernels.prefill, {}), (kernels.decode, {"programs": 1}), (kernels.decode, {"programs": 5})):
        out = poisoned(batch.query)
        run(*batch.attention_args(), out, **mask, **options)
        assert relative_error(out, expected) < max(1e-3, DECODE_ERROR)


def test_the_largest_weight_of_a_page_is_exact() -> None:
    logits = torch.randn(3, 5, 300, generator=torch.Generator().manual_seed(0)) * 40
    logits[0, 0, 128:] = float("-inf")
    weights, base = reference.quantize_p(logits, 128)
    exact = torch.exp2(logits - base)
    for page in (slice(0, 128), slice(128, 256), slice(256, 300)):
        best = logits[..., page].argmax(-1, keepdim=True)
        near = (logits[..., page].amax(-1, keepdim=True) - logits.amax(-1, keepdim=True)) > -reference.FALL_BITS
        found, wanted = (x[..., page].gather(-1, best)[near] for x in (weights, exact))
        assert len(wanted) > 5
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0.0)  # what exp2 makes of logits in float32
        assert (weights[..., page].amax(-1, keepdim=True)[~near] <= 2.0 ** (reference.P_BITS - reference.FALL_BITS)).all()


def test_requests_without_queries_and_padding_are_left_alone(kernels) -> None:
    """A captured graph runs with padding requests: no query tokens, no length, and rows that belong to nobody."""
    batch = make_batch(PageLayout(64), [(90, 1), (70, 1)], heads=4, kv_heads=2, device=kernels.device)
    expected = poisoned(batch.query)
    kernels.decode(*batch.attention_args(), expected)
    query = torch.cat([batch.query, batch.query])
    seq_lens = torch.cat([batch.seq_lens, torch.zeros_like(batch.seq_lens)])
    starts = torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32, device=kernels.device)
    table = torch.cat([batch.block_table, batch.block_table])
    for run in (kernels.decode, kernels.prefill):
        out = poisoned(query)
        run(query, batch.pages, batch.layout, table, seq_lens, starts, batch.scale, out)
        assert torch.equal(out[:2], expected) or relative_error(out[:2], expected) < DECODE_ERROR


@pytest.mark.parametrize(("k_bits", "smooth", "bound"), [(8, False, 0.05), (8, True, 0.045), (4, False, 0.2), (4, True, 0.11)])
@pytest.mark.parametrize("soft_cap", [0.0, 10.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [0, 50])
def test_accuracy_on_biased_keys(
    k_bits: int, smooth: bool, bound: float, soft_cap: float, with_sinks: bool, window: int
) -> None:
    """Against exact attention, keys with strong channel bias."""
    layout = PageLayout(128, k_bits)
    batch = make_batch(layout, [(384, 384)], heads=8, kv_heads=2, channel_bias=8.0, smooth=smooth)
    sinks = torch.linspace(-3, 6, 8) if with_sinks else None
    mask = {"window": window, "soft_cap": soft_cap, "sinks": sinks}
    actual = reference.attention(*batch.attention_args(), **mask, anchor=batch.anchor)
    exact = reference.exact_attention(batch.query, batch.key[:-1], batch.value[:-1], batch.scale, **mask)  # without padding
    assert relative_error(actual, exact) < bound


@pytest.mark.parametrize(("k_bits", "gain"), [(8, 0.15), (4, 0.05)])
@pytest.mark.parametrize("mask", [{}, {"soft_cap": 10.0}, {"window": 50}, {"sinks": torch.linspace(-3, 6, 8)}], ids=str)
def test_accuracy_on_biased_values(k_bits: int, gain: float, mask: dict) -> None:
    """Against exact attention, values with strong channel bias: smoothing them takes away more than this share of the error."""
    errors = []
    for smooth_v in (False, True):
        shape = {"requests": [(384, 384)], "heads": 8, "kv_heads": 2, "value_bias": 8.0, "smooth": True, "smooth_v": smooth_v}
        batch = make_batch(PageLayout(128, k_bits), **shape)
        actual = reference.attention(*batch.attention_args(), **mask, anchor=batch.anchor, v_anchor=batch.v_anchor)
        exact = reference.exact_attention(batch.query, batch.key[:-1], batch.value[:-1], batch.scale, **mask)
        errors.append(relative_error(actual, exact))
    assert errors[1] < (1 - gain) * errors[0]


@pytest.mark.parametrize(("k_bits", "gain"), [(8, 0.07), (4, 0.006)])
@pytest.mark.parametrize("mask", [{}, {"soft_cap": 10.0}, {"window": 50}, {"sinks": torch.linspace(-3, 6, 8)}], ids=str)
def test_accuracy_on_biased_queries(k_bits: int, gain: float, mask: dict) -> None:
    """Against exact attention, queries with strong channel bias: smoothing takes away more than this share of the error."""
    shape = {"requests": [(384, 384)], "heads": 8, "kv_heads": 2, "query_bias": 8.0, "smooth": True}
    batch = make_batch(PageLayout(128, k_bits), **shape)
    exact = reference.exact_attention(batch.query, batch.key[:-1], batch.value[:-1], batch.scale, **mask)
    plain, smoothed = (
        relative_error(reference.attention(*batch.attention_args(), **mask, anchor=batch.anchor, q_block=q_block), exact)
        for q_block in (0, reference.tile_tokens(4))
    )
    assert smoothed < (1 - gain) * plain


@pytest.mark.parametrize(("fp8", "head_dim", "rows"), [("half", 256, 32), ("half", 128, 64), ("native", 256, 64)])
def test_tiles_of_smoothed_queries_in_99_kib(fp8: str, head_dim: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sage_kernels import prefill

    monkeypatch.setattr(prefill, "fp8_path", lambda _: fp8)
    tile = prefill.tile.__wrapped__
    for group in (1, 4, 7, 32):
        assert tile(torch.device("cpu"), PageLayout(head_dim), group, True)[0] == rows
        assert tile(torch.device("cpu"), PageLayout(head_dim), group)[0] == 64 == reference.tile_rows(group)
    assert tile(torch.device("cpu"), PageLayout(head_dim), 64, True)[0] == 64


@pytest.mark.parametrize(
    ("own", "reads", "smooth_q", "reason"),
    [
        (False, True, True, None),
        (None, True, True, "gluon_missing"),
        (True, False, True, "page_format"),
        (True, True, True, "smooth_q"),
        (True, True, False, None),
    ],
)
def test_which_kernel_prompts_get(
    own: bool | None, reads: bool, smooth_q: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that the one which takes no memory takes none."""
    from sage_kernels import hopper, prefill

    monkeypatch.setattr(prefill, "has_own_kernels", lambda _: own)
    monkeypatch.setattr(prefill, "choose_kernel", prefill.choose_kernel.__wrapped__)
    monkeypatch.setattr(hopper, "supports", lambda *_: reads)
    which = torch.device("cpu"), PageLayout(128, 4), 4, smooth_q
    kernel = None if smooth_q else hopper
    assert prefill.choose_kernel(*which) == (kernel, reason)
    assert prefill.scratch_bytes(*which) == (hopper.SCRATCH if kernel else 0)


@pytest.mark.parametrize("k_bits", K_BITS)
def test_only_widened_pages_take_memory(kernels, k_bits: int) -> None:
    from sage_kernels import hopper, prefill

    widens = k_bits == 4 and ON_GPU and torch.cuda.get_device_capability() == (9, 0)
    taken = prefill.scratch_bytes(torch.device(kernels.device), PageLayout(128, k_bits), 4)
    assert taken == (hopper.SCRATCH if widens else 0)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tokens", PAGE_TOKENS)
@pytest.mark.parametrize("per_head", [False, True])
def test_widened_pages_hold_the_same(kernels, head_dim: int, tokens: int, per_head: bool) -> None:
    """INT4 keys as INT8 keys: the same codes, scales and values, to the bit."""
    from sage_kernels.widen import widened

    batch = make_batch(PageLayout(head_dim, 4, tokens), [(384, 5), (128, 128)], 4, 2, device=kernels.device)
    table = batch.block_table
    if per_head:
        table = table[:, None].repeat(1, 2, 1)
        table[0, 1, : 384 // tokens] = table[0, 0, : 384 // tokens].flip(0)
    wide, layout, wide_table = widened(batch.pages, batch.layout, table, batch.seq_lens, batch.query_start_loc, 384)
    assert layout == PageLayout(head_dim, 8, tokens)
    for r, length in enumerate(batch.seq_lens.tolist()):
        used = length // tokens
        mine = reference.load(wide.cpu(), wide_table[r, :used].cpu(), layout)
        theirs = reference.load(batch.pages.cpu(), table[r, ..., :used].cpu(), batch.layout)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.skipif(ON_GPU, reason="widens pages that are not on the GPU")
@pytest.mark.parametrize(("scratch", "parts"), [(1, 9), (200_000, 6), (1 << 30, 1)])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("window", [0, 70])
def test_int4_prompts_in_parts(
    scratch: int, parts: int, per_head: bool, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel for sm_90 is given, part by part, is the whole. A CPU stands in for it, which reads as few pages."""
    from sage_kernels import hopper

    taken = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]):
            return self.launch

        def launch(self, query, out, k, v, pages, table, lengths, starts, *masks, **sizes):
            sinks, anchor, v_anchor, _, scale, soft_cap, *_ = masks
            layout = PageLayout(sizes["HEAD_DIM"], 8, sizes["PAGE"])
            where = pages, layout, table, lengths, starts, scale
            cpu.attention(query, *where, out, sizes["WINDOW"], soft_cap, sinks, anchor, v_anchor)
            taken.append(lengths)

    monkeypatch.setattr(hopper, "_prefill_kernel", Kernel())
    monkeypatch.setattr(hopper, "descriptors", lambda pages, layout: (None, None, None, pages))
    monkeypatch.setattr(hopper, "SCRATCH", scratch)
    shape = {"requests": [(300, 8), (70, 70), (200, 1)], "heads": 12, "kv_heads": 3, "smooth": True, "smooth_v": True}
    batch = make_batch(PageLayout(128, 4, 64), **shape)
    if per_head:
        batch.block_table = batch.block_table[:, None].repeat(1, 3, 1)
    mask = {"window": window, "soft_cap": 15.0, "sinks": torch.randn(12), "anchor": batch.anchor, "v_anchor": batch.v_anchor}
    out = poisoned(batch.query)
    hopper.prefill(*batch.attention_args(), out, **mask, max_seq_len=300)
    assert len(taken) == parts
    assert relative_error(out, reference.attention(*batch.attention_args(), **mask)) < 1e-3


def test_pages_that_cannot_be_copied_are_refused() -> None:
    from sage_kernels import hopper

    layout = PageLayout(128)
    cache = torch.zeros(3 * (2 * layout.page_bytes + layout.tokens), dtype=torch.uint8)
    pages = cache.as_strided((3, 2, layout.page_bytes), (2 * layout.page_bytes + layout.tokens, layout.page_bytes, 1))
    with pytest.raises(ValueError, match=r"pages are 67712 and 33792 bytes apart.*must be multiples of 512"):
        hopper.descriptors(pages, layout)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="only the kernel for sm_90 widens pages")
def test_prefill_with_room_for_one_context(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are widened for one KV head of one request at a time."""
    from sage_kernels import hopper

    monkeypatch.setattr(hopper, "SCRATCH", 1)
    requests = [(500, 8), (70, 70), (300, 1)]
    shape = {"layout": PageLayout(128, 4), "requests": requests, "heads": 8, "kv_heads": 2, "smooth": True}
    batch, mask, expected = build(shape, {"window": 0, "soft_cap": 15.0, "sinks": True}, kernels.device)
    out = poisoned(batch.query)
    kernels.prefill(*batch.attention_args(), out, **mask)
    assert relative_error(out, expected) < KERNEL_ERROR


def test_decode_refuses_too_many_rows_and_small_workspaces(kernels) -> None:
    from sage_kernels.decode import Workspace

    batch = make_batch(PageLayout(64), [(90, 9)], heads=8, kv_heads=1, device=kernels.device)
    out = poisoned(batch.query)
    with pytest.raises(ValueError, match="exceed the decode kernel's 64 rows"):
        kernels.decode(*batch.attention_args(), out, max_query_len=9)
    for programs, rows, channels in ((1, 128, 64), (2, 8, 64), (2, 64, 32)):
        workspace = Workspace.allocate(programs, rows, channels, kernels.device)
        with pytest.raises(ValueError, match=r"a workspace for \d programs, .* channels; needed are 2, 256 and 64"):
            kernels.decode(*batch.attention_args(), out, max_query_len=8, programs=2, workspace=workspace)


def test_requests_of_very_different_lengths(kernels) -> None:
    """One share holds many short requests and padding between them, and the long one is spread over many shares."""
    requests = [(3000, 1), (5, 1), (64, 1), (0, 0), (65, 1), *[(10, 1)] * 9, (700, 1)]
    shape = {"layout": PageLayout(64, 8, 64), "requests": requests, "heads": 4, "kv_heads": 2, "smooth": True}
    batch, mask, expected = build(shape, {"window": 0, "soft_cap": 0.0, "sinks": True}, kernels.device)
    for programs in (1, 9, 32):
        out = poisoned(batch.query)
        kernels.decode(*batch.attention_args(), out, **mask, programs=programs)
        assert relative_error(out, expected) < KERNEL_ERROR


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="the portable kernel has a program for each tile")
def test_tiles_of_many_prompts(kernels) -> None:
    """More tiles than processors: short prompts whose KV heads go side by side, long contexts of which one or two do."""
    requests = [(700, 700)] * 6 + [(0, 0), (45_000, 300), (1, 1), (15_000, 900), (33, 33), (2000, 2000)]
    shape = {"layout": PageLayout(128), "requests": requests, "heads": 12, "kv_heads": 3, "smooth": True}
    batch, mask, expected = build(shape, {"window": 0, "soft_cap": 0.0, "sinks": False}, kernels.device)
    for _ in range(2):  # the counters are as they were
        out = poisoned(batch.query)
        kernels.prefill(*batch.attention_args(), out, **mask)
        assert relative_error(out, expected) < KERNEL_ERROR


def test_a_workspace_is_used_again(kernels) -> None:
    """For batches of other sizes, whatever those before have left; one context has more parts than are merged at a time, and
    behind the last request stands padding."""
    from sage_kernels.decode import Workspace

    workspace = Workspace.allocate(40, 6, 64, kernels.device)
    for left in (workspace.out, workspace.base, workspace.total):
        left.fill_(float("nan"))
    for requests in ([(2600, 3), (70, 1), (0, 0), (0, 0)], [(64, 1), (130, 2)], [(2600, 3), (70, 1), (0, 0), (0, 0)]):
        shape = {"layout": PageLayout(64, 8, 64), "requests": requests, "heads": 2, "kv_heads": 1, "smooth": True}
        batch, mask, expected = build(shape, {"window": 0, "soft_cap": 0.0, "sinks": True}, kernels.device)
        out = poisoned(batch.query)
        kernels.decode(*batch.attention_args(), out, **mask, max_query_len=3, programs=40, workspace=workspace)
        assert relative_error(out, expected) < KERNEL_ERROR
