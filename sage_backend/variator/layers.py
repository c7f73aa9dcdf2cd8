# SPDX-License-Identifier: Apache-2.0
"""The worker's side: plugins attached to a model's FFNs, and the rows of a step that they compress.

The FFN of a layer becomes one custom op, which torch.compile does not look into and piecewise CUDA graphs leave out, since the
number of rows that it computes depends on the step. A CUDA graph of a whole decode captures the plain FFN.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.utils.torch_utils import direct_register_custom_op

from sage_backend.features.layers import own_impls
from sage_backend.features.step_requests import StepRequests
from sage_backend.observability.recorder import Recorder, recorder
from sage_backend.options import VariatorOptions
from sage_backend.variator import files
from sage_backend.variator.admission import PLAN_KEY
from sage_backend.variator.groups import COMPRESSOR, PLAIN, CompressionPlan, Segment, compressed, segments
from sage_backend.variator.lora import AdaptersOfGroups
from sage_backend.variator.plugin import CompressionPlugin, saved_operations

_LIBRARY = torch.library.Library("sage", "FRAGMENT")


@eager_break_during_capture
def _ffn(x: Tensor, out: Tensor, layer: str) -> None:
    get_forward_context().no_compile_layers[layer].compute(x, out)


direct_register_custom_op("ffn", _ffn, mutates_args=["out"], fake_impl=lambda x, out, layer: None, target_lib=_LIBRARY)


class CompressedFFN:
    """An FFN and its plugins by ratio. attention: vLLM's name of the same layer's attention, whose metadata have the
    segments. adapted: given the segments, the context in which `plain` computes their rows."""

    def __init__(
        self,
        plain: Callable[[Tensor], Tensor],
        plugins: dict[int, CompressionPlugin],
        attention: str,
        adapted: Callable[[Sequence[Segment]], AbstractContextManager[Any]],
    ) -> None:
        self.plain, self.plugins, self.attention, self.adapted = plain, plugins, attention, adapted

    def compute(self, x: Tensor, out: Tensor) -> None:
        """x -> out, both [rows, hidden]. All rows, pooled or not, go through the FFN at once."""
        metadata = get_forward_context().attn_metadata
        cut: Sequence[Segment] = metadata[self.attention].segments if isinstance(metadata, dict) else ()
        if not cut:
            out.copy_(self.plain(x))
            return
        inputs = [x[segment.first : segment.end] for segment in cut]
        pooled = [rows if s.ratio == 1 else self.plugins[s.ratio].pool(rows) for s, rows in zip(cut, inputs, strict=True)]
        with self.adapted(cut):
            results = self.plain(torch.cat(pooled)).split([segment.rows for segment in cut])
        for segment, rows, y in zip(cut, inputs, results, strict=True):
            out[segment.first : segment.end] = y if segment.ratio == 1 else self.plugins[segment.ratio].expand(y, rows)
        out[cut[-1].end :] = 0  # padding


class Compressor(StepRequests[CompressionPlan]):
    """The compression plans of a worker's requests, and the segments of its steps."""

    def __init__(self, layers: int, hidden: int, intermediate: int, recorder: Recorder | None) -> None:
        """layers: the number of FFNs with plugins; hidden, intermediate: their sizes."""
        super().__init__(lambda arguments: CompressionPlan(*arguments.get(PLAN_KEY, PLAIN)))
        self.recorder = recorder
        self._shape = layers, hidden, intermediate
        self._counted = False

    def began(self, asked: CompressionPlan) -> None:
        if self.recorder is not None:
            self.recorder.add_request(asked.ratio)

    @contextmanager
    def step(self, scheduled: Any) -> Iterator[None]:
        self._counted = False
        with super().step(scheduled):
            yield

    def segments(self, common: Any, num_decodes: int) -> list[Segment]:
        """The segments of the step's batch (CommonAttentionMetadata), whose first `num_decodes` requests are decodes."""
        if not (plans := self.in_order()):
            return []
        starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound.tolist()
        requests = []
        for i, plan in enumerate(plans):
            first, end = starts[i], starts[i + 1]
            requests.append((first, end, lengths[i] - (end - first), plan if i >= num_decodes else PLAIN))
        cut = segments(requests)
        if self.recorder is not None and not self._counted:  # layers of several kinds have metadata of their own
            self._counted = True
            for ratio, tokens in compressed(cut).items():
                self.recorder.add_compressed(ratio, tokens, saved_operations(tokens, ratio, *self._shape))
        return cut


def attach(worker: Any, config: Any, options: VariatorOptions, ratios: list[int]) -> Compressor:
    """Give the FFNs of a worker's model, which has been loaded, plugins of these ratios. config: VllmConfig.

    Returns the compressor, which learns of steps through `engine.patches.model_runner`. Raises ValueError for a model
    that lacks one of the FFNs.
    """
    runner, known = worker.model_runner, config.compilation_config.static_forward_context
    model, hf_config = runner.get_model(), config.model_config.hf_config
    modules = dict(model.named_modules())
    layers, _ = files.contents(options.plugins)
    ours = own_impls(config)
    adapters = None if config.lora_config is None else AdaptersOfGroups(model.lora_manager)
    for layer in layers:
        if isinstance(modules.get(layer.removesuffix(".mlp")), PPMissingLayer):
            continue  # another worker of the pipeline has it
        ffn: Any = modules.get(layer)
        attention = layer.removesuffix("mlp") + "self_attn.attn"
        if not (attention in ours and hasattr(ffn, "gate_up_proj") and hasattr(ffn, "down_proj")):
            name = type(model).__name__
            raise ValueError(f"{name} has no FFN {layer} next to attention of this backend; leave the option variator out")
        plugins = files.load(options.plugins, layer, hf_config.hidden_size, ratios)
        for plugin in plugins.values():
            plugin.to(runner.device, config.model_config.dtype)
        known[layer] = CompressedFFN(ffn.forward, plugins, attention, adapters.of(ffn) if adapters else nullcontext)
        ffn.forward = _call(layer)
    compressor = known[COMPRESSOR] = Compressor(
        len(layers), hf_config.hidden_size, hf_config.intermediate_size, recorder(config)
    )
    return compressor


def _call(layer: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        out = torch.empty_like(x)  # here, so that in CUDA graphs its address stays the same
        torch.ops.sage.ffn(x, out, layer)
        return out

    return forward
