# SPDX-License-Identifier: Apache-2.0
"""Pages at other RoPE positions than their own: which forms of RoPE can be changed, and by which frequencies."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import environment

from sage_backend import BACKEND
from sage_backend.features import calibration, positions
from sage_kernels import reference
from sage_paged import PageLayout


@pytest.mark.parametrize(
    ("rope", "form"),
    [
        ({"rope_type": "dynamic"}, "dynamic"),
        ({"mrope_section": [1]}, "mrope"),
        ({"partial_rotary_factor": 0.5}, "partial"),
        ({"use_fope": True}, "fope"),
        ({"full_attention": {"rope_type": "ntk"}, "sliding_attention": {"rope_type": "default"}}, "ntk"),
    ],
)
def test_positions_that_cannot_be_turned_are_refused(rope: dict[str, Any], form: str) -> None:
    config = SimpleNamespace(model="m", hf_text_config=SimpleNamespace(rope_parameters=rope))
    with pytest.raises(ValueError, match=f"cannot serve m: its rotary positions are of the form '{form}'"):
        positions.check(config)


def test_sliding_layers_may_have_any_positions() -> None:
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "dynamic"}}
    positions.check(SimpleNamespace(model="m", hf_text_config=SimpleNamespace(rope_parameters=rope)))


HEAD, TRAINED = 64, 1024
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": TRAINED // 4,
    },
    "linear": {"factor": 8.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED},
    "longrope": {
        "short_factor": [1.0] * (HEAD // 2), "long_factor": [1.0 + i / 4 for i in range(HEAD // 2)],
        "original_max_position_embeddings": TRAINED,
    },
}  # fmt: skip


class AttentionModule(torch.nn.Module):
    """An attention layer of this backend beside its rotary embedding, as in vLLM's models."""

    def __init__(self, rotary: torch.nn.Module | None, window: int = 0, **switches: bool) -> None:
        super().__init__()
        self.attn, self.rotary_emb = torch.nn.Module(), rotary
        layer = {"rotates_pages": not window, "window": window, "head_size": HEAD, "layout": PageLayout(HEAD)}
        self.attn.impl = SimpleNamespace(backend=BACKEND, **layer)
        for name, value in switches.items():
            setattr(self, name, value)


def worker(attention: AttentionModule, max_model_len: int = 4 * TRAINED, context: float = TRAINED) -> Any:
    """One whose drafter has this layer."""
    trained = SimpleNamespace(derived_max_model_len_and_key=(context, "max_position_embeddings"))
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"draft.layers.0.attn": attention.attn}),
        model_config=SimpleNamespace(model="m", max_model_len=max_model_len, model_arch_config=trained),
    )
    runner = SimpleNamespace(drafter=SimpleNamespace(model=attention))
    return SimpleNamespace(vllm_config=config, model_runner=runner, get_model=torch.nn.Module)


def frequencies(attention: AttentionModule, max_model_len: int = 4 * TRAINED) -> torch.Tensor:
    positions.find_frequencies(worker(attention, max_model_len))
    return torch.tensor(attention.attn.impl.frequencies)


def rope(attention: AttentionModule) -> positions.Rope:
    return positions.ropes(worker(attention))["draft.layers.0.attn"]


@contextmanager
def embedding(form: str = "default", max_model_len: int = TRAINED, neox: bool = True, **parameters: Any) -> Iterator[Any]:
    """vLLM's own rotary embedding."""
    with environment():
        from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.rotary_embedding import get_rope

        config = VllmConfig(device_config=DeviceConfig("cpu"))
        config.model_config = SimpleNamespace(max_model_len=max_model_len)  # type: ignore[assignment]
        parameters = {"rope_type": form, "rope_theta": 1e4, **ROPES.get(form, {}), **parameters}
        with set_current_vllm_config(config):
            yield get_rope(HEAD, TRAINED, neox, parameters, torch.float32)


@pytest.mark.parametrize("max_model_len", [TRAINED, 4 * TRAINED])
@pytest.mark.parametrize("form", ROPES)
def test_keys_are_turned_as_the_model_turned_them(form: str, max_model_len: int) -> None:
    """A key at position 1000 that is turned back by 10 pages is the same key 640 positions earlier, in vLLM's own embedding."""
    with embedding(form, max_model_len) as rotary:
        key = torch.randn(1, HEAD, generator=torch.Generator().manual_seed(0)).expand(2, -1)
        apply = getattr(rotary, "forward_native", rotary.forward)  # longrope has only the latter
        _, rotated = apply(torch.tensor([1000, 360]), key.clone(), key.clone())
    table = reference.rope_shift_table(frequencies(AttentionModule(rotary), max_model_len), 11, 64)
    turned = reference.turn_back(rotated[0], table[10])
    assert (turned - rotated[1]).abs().max() < 1e-4
    assert (turned - rotated[0]).abs().max() > 1


def test_layers_without_positions_are_not_turned() -> None:
    """Their keys stay as they are: Llama 4, Command R, EXAONE and others have such layers."""
    rotary = torch.nn.Identity()
    switches = positions._SWITCHES + positions._SWITCHES_OF_FULL_ATTENTION
    for attention in (AttentionModule(None), *(AttentionModule(rotary, **{switch: False}) for switch in switches)):
        assert frequencies(attention).eq(torch.zeros(HEAD // 2)).all()


def test_layers_with_a_sliding_window_have_frequencies_of_their_own() -> None:
    """Some models have RoPE only there. Such layers rotate no pages, so no form of theirs is refused."""
    zeros = (0.0,) * (HEAD // 2)
    with embedding(rope_theta=100.0) as rotary:
        for switch in positions._SWITCHES_OF_FULL_ATTENTION:
            found = rope(AttentionModule(rotary, window=512, **{switch: False})).frequencies
            assert found == pytest.approx([100.0 ** (-2 * pair / HEAD) for pair in range(HEAD // 2)])
        for switch in positions._SWITCHES:
            assert rope(AttentionModule(rotary, window=512, **{switch: False})).frequencies == zeros
    attention = AttentionModule(torch.nn.Identity(), window=512)
    assert rope(attention) == ("Identity", None)
    positions.find_frequencies(worker(attention))


@pytest.mark.parametrize(
    ("form", "arguments"),
    [
        ("RotaryEmbedding", {"neox": False}),
        ("RotaryEmbedding", {"partial_rotary_factor": 0.5}),
        ("MRotaryEmbedding", {"mrope_section": [8, 12, 12]}),
        ("NTKScalingRotaryEmbedding", {"form": "ntk", "factor": 2.0}),
    ],
)
def test_forms_that_are_not_known(form: str, arguments: dict[str, Any]) -> None:
    with embedding(**arguments) as rotary:
        attention = AttentionModule(rotary)
        assert rope(attention) == (form, None)
        with pytest.raises(ValueError, match=f"its rotary positions are of the form '{form}'"):
            frequencies(attention)


def test_a_layer_whose_rotary_embedding_is_unknown_is_refused() -> None:
    attention = AttentionModule(torch.nn.Identity())
    with pytest.raises(ValueError, match="cannot serve m: its rotary positions are of the form 'Identity'"):
        frequencies(attention)
    del attention.rotary_emb
    with pytest.raises(ValueError, match=r"not found next to draft\.layers\.0\.attn"):
        frequencies(attention)


@pytest.mark.parametrize(("trained", "context"), [(2048, 2048), (1 << 20, 1 << 17), (float("inf"), 0)])
def test_contexts_of_a_calibration(trained: float, context: int) -> None:
    model = worker(AttentionModule(None), max_model_len=512, context=trained).vllm_config.model_config
    assert positions.context(model) == context


def test_layers_are_observed_at_offsets_where_their_positions_are_known() -> None:
    """Elsewhere at their own positions, which is said."""

    def observed(attention: AttentionModule, **arguments: Any) -> tuple[list[str], list[float]]:
        reasons = calibration.observe(worker(attention, **arguments))
        return [*reasons.values()], attention.attn.impl.observer.turns[:, -1].angle().tolist()

    slowest = 1e4 ** (2 / HEAD - 1)
    with embedding() as rotary:
        angles = [slowest * offset for offset in (0, 512, 1024, 2048) if offset <= TRAINED]
        assert observed(AttentionModule(rotary)) == ([], pytest.approx(angles))
        assert observed(AttentionModule(rotary), context=float("inf")) == (
            ["no length of contexts in the model's configuration"], [0.0],
        )  # fmt: skip
    assert observed(AttentionModule(None)) == ([], [0.0])
    attention = AttentionModule(torch.nn.Identity())
    assert observed(attention) == (["rotary positions of the form 'Identity'"], [0.0])
    del attention.rotary_emb
    assert observed(attention) == (["no rotary positions found"], [0.0])
