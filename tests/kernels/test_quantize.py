# SPDX-License-Identifier: Apache-2.0
"""The reference's quantization of P and of smoothed queries. `test_page` has that of K and V."""

import torch

from sage_kernels import reference


def test_the_largest_weight_of_a_page_is_exact() -> None:
    logits = torch.randn(3, 5, 300, generator=torch.Generator().manual_seed(0)) * 40
    logits[0, 0, 128:] = float("-inf")
    weights, m_ref = reference.quantize_p(logits, 128)
    exact = torch.exp2(logits - m_ref)
    for page in (slice(0, 128), slice(128, 256), slice(256, 300)):
        best = logits[..., page].argmax(-1, keepdim=True)
        near = (logits[..., page].amax(-1, keepdim=True) - logits.amax(-1, keepdim=True)) > -reference.FALL_BITS
        found, wanted = (x[..., page].gather(-1, best)[near] for x in (weights, exact))
        assert len(wanted) > 5
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0.0)  # the error of exp2 of float32 logits
        assert (weights[..., page].amax(-1, keepdim=True)[~near] <= 2.0 ** (reference.P_BITS - reference.FALL_BITS)).all()


def test_query_terms_add_up() -> None:
    """However the mean was rounded, no query is further from the sum of its terms than half a step of its own."""
    query = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0))
    query[..., 5::17] += 30
    (codes, scale), (mean_codes, mean_scale) = reference.query_terms(query, 1.0, 16)
    assert torch.equal(mean_codes[:, 32:48], mean_codes[:, 32:33].expand(-1, 16, -1))
    error = codes * scale[..., None] + mean_codes * mean_scale[..., None] - query
    assert (error.abs() <= 0.5001 * scale[..., None] + 1e-5).all()
    [(whole_codes, whole_scale)] = reference.query_terms(query, 1.0)
    assert error.norm() < 0.2 * (whole_codes * whole_scale[..., None] - query).norm()
    (_, last), _ = reference.query_terms(query, 1.0, 49)
    assert last[:, -1].max() < 0.01, "a block of one token leaves only the rounding error of its mean"
