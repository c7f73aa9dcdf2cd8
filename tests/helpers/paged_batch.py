# SPDX-License-Identifier: Apache-2.0
"""Random batches for the kernel tests: requests of any lengths, with pages in random order in a cache full of garbage."""

from dataclasses import dataclass, replace

import torch

from sage_kernels import LayerCalibration, PagedBatch, PageLayout, reference


@dataclass
class Batch:
    """Requests, their tokens, and a cache that holds them.

    key, value: [tokens, kv_heads, head_dim], the tokens of all requests and one of padding, last. slots: int64 [tokens]. query:
    [query tokens, heads, head_dim]. requests: where the requests' queries and pages are.
    """

    layout: PageLayout
    key: torch.Tensor
    value: torch.Tensor
    slots: torch.Tensor
    pages: torch.Tensor
    """The cache after the reference has stored the tokens, uint8 [blocks, kv_heads, page_bytes]."""
    garbage: torch.Tensor
    """The cache before."""
    calibration: LayerCalibration
    """What keys and values were stored with."""
    query: torch.Tensor
    requests: PagedBatch
    scale: float

    def to(self, device: str) -> "Batch":
        """The same batch with all tensors on `device`."""
        movable = torch.Tensor | PagedBatch | LayerCalibration
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if isinstance(x, movable)})

    def attention_args(self) -> tuple[torch.Tensor, torch.Tensor, PageLayout, PagedBatch, float]:
        """What every attention function takes first: query, pages, layout, batch, scale."""
        return self.query, self.pages, self.layout, self.requests, self.scale


def make_batch(
    layout: PageLayout,
    requests: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: str = "cpu",
    channel_bias: float = 4.0,
    value_bias: float = 0.0,
    query_bias: float = 0.0,
    smooth: bool = False,
    smooth_v: bool = False,
    equalize: bool = False,
) -> Batch:
    """A batch of random tokens, stored by the reference.

    requests: (tokens, query tokens) of each; the batch's max_query_len is the largest number of query tokens. channel_bias,
    value_bias, query_bias: constants added to some channels of keys, values and queries. smooth, smooth_v: whether keys and
    values are stored less an anchor; equalize: whether keys are equalized and ordered, at random.
    """
    g = torch.Generator().manual_seed(seed)
    table, slots, blocks = random_blocks(g, layout.tokens, [length for length, _ in requests])
    total = len(slots)
    key = torch.randn(total, kv_heads, layout.head_dim, generator=g)
    key[..., ::17] += channel_bias
    value = torch.randn(total, kv_heads, layout.head_dim, generator=g) * torch.rand(total, 1, 1, generator=g) * 4
    value[..., 3::17] += value_bias
    starts = torch.tensor([0] + [n for _, n in requests]).cumsum(0).int()
    query = torch.randn(int(starts[-1]), heads, layout.head_dim, generator=g)
    query[..., 5::17] += query_bias
    # Bytes of an earlier owner, NaN codes and NaN scales among them.
    garbage = torch.randint(0, 256, (blocks, kv_heads, layout.page_bytes), generator=g, dtype=torch.uint8)
    equalizer = torch.randn(kv_heads, layout.head_dim // 2, generator=g).exp().repeat(1, 2)
    order = torch.rand(kv_heads, layout.head_dim // 2, generator=g).argsort(-1).int()
    calibration = LayerCalibration(
        key[:8].mean(0) if smooth else None,
        equalizer if equalize else None,
        order if equalize else None,
        value.mean(0) if smooth_v else None,
    )
    lengths = torch.tensor([length for length, _ in requests], dtype=torch.int32)
    batch = Batch(
        layout,
        key.to(dtype),
        value.to(dtype),
        slots,
        garbage.clone(),
        garbage,
        calibration,
        query.to(dtype),
        PagedBatch(table, lengths, starts, max_query_len=max(n for _, n in requests)),
        layout.head_dim**-0.5,
    )
    reference.store(batch.key, batch.value, batch.pages, batch.slots, layout, batch.calibration)
    return batch.to(device)


def random_blocks(g: torch.Generator, tokens: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A block table for requests of these lengths in pages of `tokens` tokens, the slots of their tokens and one of padding,
    and the number of blocks."""
    counts = [-(-length // tokens) for length in lengths]
    blocks = sum(counts) + 3
    free = torch.randperm(blocks, generator=g).tolist()
    # Entries past a request's own blocks point at real but foreign pages: reading them must change nothing.
    table = torch.randint(0, blocks, (len(lengths), max(counts) + 2), generator=g, dtype=torch.int32)
    slots = []
    for row, length in enumerate(lengths):
        for i in range(counts[row]):
            table[row, i] = free.pop()
        t = torch.arange(length)
        slots.append(table[row][t // tokens].long() * tokens + t % tokens)
    return table, torch.cat([*slots, torch.tensor([-1])]), blocks


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN anywhere gives NaN, which no bound accepts."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm())


def poisoned(query: torch.Tensor) -> torch.Tensor:
    """An output for `query` full of NaN, float32: a row that a kernel forgets stays NaN."""
    return torch.full(query.shape, float("nan"), dtype=torch.float32, device=query.device)
