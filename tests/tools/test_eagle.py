# SPDX-License-Identifier: Apache-2.0
"""benchmarks/eagle.py: what is trained is what an engine computes, a token at a time."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CONFIG = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 10000.0},
}  # fmt: skip
TOKENS = 7


@pytest.fixture
def eagle(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delitem(sys.modules, "eagle", raising=False)
    import eagle

    return eagle


def test_second_drafts(eagle: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """All second drafts of a sequence at once, each as in an engine: alone, behind the first drafts of the tokens before it."""
    monkeypatch.setattr(eagle, "DRAFT_VOCABULARY", 64)
    torch.manual_seed(0)
    drafter = eagle.Drafter(CONFIG).double()
    embeds, states = torch.randn(2, 1, TOKENS, CONFIG["hidden_size"], dtype=torch.double)
    with torch.inference_mode():
        _, state, kept = drafter(embeds, states, None)
        shifted = torch.cat([states[:, :1], state[:, :-1]], 1)
        second, _, _ = drafter(embeds, shifted, kept)
        for token in range(1, TOKENS):
            mixed = torch.cat([states[:, :token], state[:, token - 1 : token]], 1)
            alone, _, _ = drafter(embeds[:, : token + 1], mixed, None)
            torch.testing.assert_close(second[:, token], alone[:, token])
