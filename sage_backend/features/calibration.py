# SPDX-License-Identifier: Apache-2.0
"""How a model's keys and values are calibrated: statistics of its layers while it reads a text, and what follows from them.

`engine.start_calibration` does this when an engine starts, on short texts of its own, and `sage calibrate` on a text of the
user's. The functions with a `worker` run in the engine's workers.
"""

import logging
from collections import Counter
from typing import Any

import torch

from sage_backend.features import positions
from sage_backend.features.calibration_file import OF_EQUALIZER, OF_ORDER, OF_VALUES, worker_calibration
from sage_backend.features.layers import modules_beside, own_impls
from sage_backend.features.observers import Statistics
from sage_kernels import LayerCalibration

logger = logging.getLogger(__name__)

MIN_MEAN_FRACTION = 0.05
"""An anchor of values is kept if it reduces their mean square by more than this fraction. Errors of e4m3 are proportional to
the values, so V's errors fall by 2.5% and attention's, at most half of which come from V, by 1%. A smaller gain is not worth
another pass over every output."""


def observe(worker: Any) -> dict[str, str]:
    """Collect statistics of this worker's layers from now on. Returns, by layer, why its keys count at the positions of the
    text only, where they do."""
    impls, context = own_impls(worker.vllm_config), positions.context(worker.vllm_config.model_config)
    reasons = {}
    for name, rope in positions.ropes(worker).items():
        impls[name].observer = Statistics(impls[name], rope.frequencies or (), context)
        if rope.frequencies is None:
            reasons[name] = f"rotary positions of the form {rope.form!r}" if rope.form else "no rotary positions found"
        elif any(rope.frequencies) and not context:
            reasons[name] = "no length of contexts in the model's configuration"
    return reasons


def log_reasons(of_workers: list[dict[str, str]]) -> None:
    """Log, in one line, what `observe` returned in each worker."""
    reasons = Counter({layer: why for worker in of_workers for layer, why in worker.items()}.values())
    if reasons:
        found = "; ".join(f"{why} ({layers} layers)" for why, layers in reasons.items())
        logger.info("keys are calibrated at the positions of the text only, and not further on in contexts: %s", found)


def begin_prompt(worker: Any) -> None:
    """The prompt that this worker reads next is a new one."""
    for impl in own_impls(worker.vllm_config).values():
        if isinstance(impl.observer, Statistics):
            impl.observer.begin_prompt()


def statistics(worker: Any) -> dict[str, torch.Tensor]:
    """The statistics (`Statistics.result`) by layer, for the layers that have any. Ends what `observe` began."""
    found = {}
    for name, impl in own_impls(worker.vllm_config).items():
        observer, impl.observer = impl.observer, None
        if isinstance(observer, Statistics) and (result := observer.result()) is not None:
            found[name] = result
    return found


def kv_heads(worker: Any) -> dict[str, int]:
    """The KV heads of each of this worker's layers, with those of other tensor parallel ranks, by name. A drafter, and some
    layers of some models, have another number than the model's configuration says."""
    model = worker.vllm_config.model_config
    return {
        name: getattr(attention, "total_num_kv_heads", None) or model.get_total_num_kv_heads()
        for name, attention in modules_beside(worker).items()
    }


def calibrations(worker: Any, tensors: dict[str, torch.Tensor]) -> dict[str, LayerCalibration]:
    """The calibration of each of this worker's layers, by name. tensors: by the names of a calibration file."""
    # Not at the top: vLLM reads its settings from the environment when it is imported, and tools set them first.
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return {
        name: worker_calibration(tensors, name, impl.num_kv_heads, rank, ranks)
        for name, impl in own_impls(worker.vllm_config).items()
    }


@torch.inference_mode()  # in which the layers' tensors were allocated
def calibrate_layers(worker: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Calibrate this worker's layers. No stored key may still be needed. tensors: by the names of a calibration file."""
    impls = own_impls(worker.vllm_config)
    for name, found in calibrations(worker, tensors).items():
        impls[name].calibrate(found, worker.device)


def tensors_of(of_workers: list[dict[str, torch.Tensor]], heads: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    """The calibration of a model, by the names of a calibration file. of_workers, heads: the `statistics` and the `kv_heads` of
    each worker."""
    found, total = {}, {layer: number for worker in heads for layer, number in worker.items()}
    for layer in {layer: None for worker in of_workers for layer in worker}:
        by_head = torch.cat([worker[layer] for worker in of_workers if layer in worker])
        # With fewer heads than workers, several have the same head, each with query heads of its own.
        shared = by_head.unflatten(0, (-1, max(1, len(by_head) // total[layer])))
        mean, value, square, _, least, largest, _ = (each.clone() for each in shared[:, 0].unbind(1))
        key, query_square = torch.maximum(largest - mean, mean - least), shared[:, :, 3].mean(1)
        found[layer] = mean
        found[layer + OF_EQUALIZER] = _equalizer(key, shared[:, :, 6].amax(1))
        found[layer + OF_ORDER] = _order(key, query_square)
        if value.square().sum() > MIN_MEAN_FRACTION * square.sum():
            found[layer + OF_VALUES] = value
    return found


def _equalizer(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """sqrt(key / query) for each RoPE pair, float32 [kv_heads, head_dim]. key, query: the largest magnitudes of each channel.
    A channel that no key or no query uses gets 1."""
    key, query = (x.unflatten(-1, (2, -1)).amax(-2) for x in (key, query))
    used = (key > 0) & (query > 0)
    factor = torch.where(used, (key / query.clamp(min=torch.finfo(torch.float32).tiny)).sqrt(), 1.0)
    return factor.repeat(1, 2)


def _order(key: torch.Tensor, query_square: torch.Tensor) -> torch.Tensor:
    """RoPE pairs by how much the codes of their keys matter, int32 [kv_heads, head_dim // 2], the most first. That is the
    largest magnitude of their keys times the root mean square of their queries. key, query_square: [kv_heads, head_dim]."""
    key, query = key.unflatten(-1, (2, -1)).amax(-2), query_square.unflatten(-1, (2, -1)).mean(-2).sqrt()
    return (key * query).sort(dim=-1, descending=True, stable=True).indices.int()
