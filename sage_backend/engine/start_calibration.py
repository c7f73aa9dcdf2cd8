# SPDX-License-Identifier: Apache-2.0
"""The calibration of keys when an engine starts.

Before an engine takes requests, it reads four short texts (`calibration_texts`) and calibrates its keys with what its layers
make of them. The result is kept in vLLM's cache folder, under the identity of the model and of everything else that keys depend
on. So restarts, replicas and ranks quantize alike, whatever their first requests are.

A file of `sage calibrate`, given as the option `calibration`, takes its place. Only such a file has anchors of values: which
kernels are used depends on them, and CUDA graphs have been captured when an engine is calibrated here.
"""

import hashlib
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from sage_backend import __version__
from sage_backend.engine.calibration_texts import CHAT, TEXTS
from sage_backend.engine.checks import is_chosen
from sage_backend.features import calibration, calibration_file, positions
from sage_backend.model_file import identity
from sage_backend.observability import recorder
from sage_backend.options import SageOptions

T = TypeVar("T")

logger = logging.getLogger(__name__)

MAX_TOKENS = 512
"""Tokens of a text that are read."""
_MAX_STEPS = 1000
"""Steps of the scheduler after which a text that has not been read never will be."""


def calibrate(core: Any) -> None:
    """Calibrate the keys of an engine (EngineCore) that this backend serves, unless its options say otherwise."""
    config = core.vllm_config
    if not is_chosen(config):
        return
    options = SageOptions.parse(config.additional_config)
    if options.calibration is not None or not (options.smooth_k or options.equalize):
        return
    if config.load_config.load_format == "dummy":
        logger.warning(
            "keys are calibrated for random weights (load format dummy); if others replace these in the engine, give it a file "
            "of sage calibrate as the option calibration"
        )
    path = cache_path(config)
    tensors = _load(path)
    if _joins_running_engines():
        if tensors is None:
            logger.warning("there is no calibration at %s for an engine that joins others; its keys are not calibrated", path)
            return
    elif _any_rank(core, tensors is None):
        began = time.monotonic()
        tensors = _keep(path, _measure(core), config.model_config)
        logger.info("calibrated keys in %.1f s", time.monotonic() - began)
    core.model_executor.collective_rpc(calibration.calibrate_layers, args=(tensors,))


def cache_path(config: Any) -> Path:
    """Where the calibration of an engine of this configuration (VllmConfig) is kept. The name is a hash of all that a layer's
    keys depend on."""
    # Not at the top: the variable is read when it is asked for, and the command line sets it first.
    from vllm import __version__ as vllm_version
    from vllm import envs

    models = [config.model_config]
    drafter = getattr(config.speculative_config, "draft_model_config", None)
    if drafter is not None and drafter is not config.model_config:  # which it is for drafts without a model
        models.append(drafter)
    parts = [__version__, vllm_version, config.load_config.load_format, config.parallel_config.pipeline_parallel_size]
    parts += [_prompt_tokens(config), config.model_config.skip_tokenizer_init, positions.context(config.model_config)]
    parts += [SageOptions.parse(config.additional_config).variator]
    for model in models:
        parts += [identity(model.model, model.hf_config), _as_json(model.hf_config), model.dtype, model.quantization]
        # Of a drafter, vLLM takes the length of the drafter or of the engine, by its kind.
        lengths = config.model_config.max_model_len, model.max_model_len
        parts += [positions.takes_long_factors(model, length) for length in lengths]
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
    return Path(envs.VLLM_CACHE_ROOT) / "sage" / "calibrations" / f"{digest}.safetensors"


def _as_json(hf_config: Any) -> str:
    """A model's configuration, without the defaults of its class if that can be made without arguments."""
    try:
        return str(hf_config.to_json_string())
    except (TypeError, ValueError):  # classes of models with code of their own
        return str(hf_config.to_json_string(use_diff=False))


def _load(path: Path) -> dict[str, torch.Tensor] | None:
    if not path.is_file():
        return None
    try:
        return calibration_file.tensors(str(path))
    except ValueError as error:
        logger.warning("%s; it is made anew", error)
        return None


def _keep(path: Path, tensors: dict[str, torch.Tensor], model_config: Any) -> dict[str, torch.Tensor]:
    """Keep a calibration, unless another engine has kept one meanwhile. Returns the one that is kept."""
    own = path.with_name(f"{path.name}.{uuid.uuid4()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        calibration_file.save(own, tensors, model_config)
        try:
            path.hardlink_to(own)  # which fails if there is such a file
        except FileExistsError:
            if (other := _load(path)) is not None:
                return other
            own.replace(path)  # in place of a damaged one
        finally:
            own.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the calibration cannot be kept (%s); the next start makes another", error)
    return tensors


def _joins_running_engines() -> bool:
    """Whether this is a data parallel engine that is added to others (elastic expert parallelism). These take no part in what
    it does before it is ready."""
    from vllm import envs  # as above

    return bool(getattr(envs, "VLLM_ELASTIC_EP_SCALE_UP_LAUNCH", False))


def _any_rank(core: Any, flag: bool) -> bool:
    """Whether `flag` is true in any of the engines that have to make each step together."""
    flag, group = any(_of_all_ranks(core, [flag], with_replicas=True)), getattr(core, "dp_group", None)
    return flag if group is None else type(core.vllm_config.parallel_config).has_unfinished_dp(group, flag)


def _of_all_ranks(core: Any, found: list[T], with_replicas: bool = False) -> list[T]:
    """What an engine's workers have found, those of other processes included. With the executor "external_launcher" (torchrun,
    and trainers that have engines in their own processes), each rank has an engine of its own, which asks its own worker.
    with_replicas: also what those of data parallel replicas have found, which then are in no group of the engine's."""
    if core.vllm_config.parallel_config.distributed_executor_backend != "external_launcher":
        return found
    from vllm.distributed import get_dp_group, get_pp_group, get_tp_group  # as above

    for group in (get_tp_group(), get_pp_group(), *([get_dp_group()] if with_replicas else [])):
        parts: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(parts, found, group=group.cpu_group)
        found = [each for part in parts for each in part]
    return found


def _observe(worker: Any) -> dict[str, str]:
    recorder.pause(True)
    return calibration.observe(worker)


def _statistics(worker: Any) -> dict[str, torch.Tensor]:
    recorder.pause(False)
    return calibration.statistics(worker)


@contextmanager
def _without_connector(core: Any) -> Iterator[None]:
    """Keep an engine's KV connector out of what it reads.

    Pages of a text that a connector loads are not computed, so the layers would not show their keys. And pages that it stored
    would have keys that are not calibrated, where others find them: some connectors ask for the tokens only, not for the salt.
    """
    connector, core.scheduler.connector = core.scheduler.connector, None
    try:
        core.model_executor.collective_rpc(_hold_connector)
        yield
    finally:
        core.model_executor.collective_rpc(_return_connector)
        core.scheduler.connector = connector


_HELD = "_sage_connector"
"""The attribute of a worker with the KV connector that takes no part in its steps."""


def _hold_connector(worker: Any) -> None:
    # As vLLM's second model runner does for its warm-up (`set_disabled` in vllm/v1/worker/gpu/kv_connector.py).
    from vllm.distributed.kv_transfer import kv_transfer_state

    setattr(worker, _HELD, kv_transfer_state._KV_CONNECTOR_AGENT)
    _connect(worker, None)


def _return_connector(worker: Any) -> None:
    _connect(worker, getattr(worker, _HELD))


def _connect(worker: Any, connector: Any) -> None:
    """Let a worker's steps go through this KV connector, or, with None, through none."""
    from vllm.distributed.kv_transfer import kv_transfer_state  # as above

    own = getattr(worker.model_runner, "kv_connector", None)
    if own is not None:  # that of vLLM's second model runner
        own.set_disabled(connector is None)
    kv_transfer_state._KV_CONNECTOR_AGENT = connector


def _measure(core: Any) -> dict[str, torch.Tensor]:
    """Let the engine read the texts. Returns its calibration, by the names of a calibration file."""
    executor = core.model_executor
    calibration.log_reasons(executor.collective_rpc(_observe))
    with _without_connector(core):
        for prompt in _prompts(core.vllm_config):
            executor.collective_rpc(calibration.begin_prompt)
            _read(core, prompt)
    of_workers, heads = (_of_all_ranks(core, executor.collective_rpc(call)) for call in (_statistics, calibration.kv_heads))
    core.reset_prefix_cache()
    tensors = calibration.tensors_of(of_workers, heads)
    if not tensors:
        logger.warning("no layer has shown its keys, so they are not calibrated; give the engine a file of sage calibrate")
    return {name: x for name, x in tensors.items() if not name.endswith(calibration_file.OF_VALUES)}


def _prompt_tokens(config: Any) -> int:
    """Most tokens of a text that are read."""
    return min(MAX_TOKENS, config.model_config.max_model_len - 1)


def _prompts(config: Any) -> list[list[int]]:
    """The texts as token ids, cut to `_prompt_tokens`."""
    model, most = config.model_config, _prompt_tokens(config)
    if model.skip_tokenizer_init:
        logger.warning("the engine has no tokenizer: keys are calibrated on random tokens; sage calibrate makes a better file")
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(1, model.get_vocab_size(), (most,), generator=generator).tolist() for _ in TEXTS]
    from vllm.tokenizers import cached_tokenizer_from_config  # as above

    tokenizer = cached_tokenizer_from_config(model)
    return [ids[:most] for ids in (*(tokenizer.encode(text) for text in TEXTS), _chat(tokenizer)) if ids]


def _chat(tokenizer: Any) -> list[int]:
    """The conversation as the model's chat template writes it; as plain text if the model has none."""
    messages = [{"role": "assistant" if turn % 2 else "user", "content": text} for turn, text in enumerate(CHAT)]
    try:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    except Exception:  # a template, which is a program of the model's, may refuse anything
        ids = tokenizer.encode("\n".join(CHAT))
    return list(ids)


def _read(core: Any, prompt: list[int]) -> None:
    """Let the engine read a prompt. Raises RuntimeError if it does not."""
    # As above; EngineCore's module is being imported when the patches are applied.
    from vllm import PoolingParams, SamplingParams
    from vllm.tasks import POOLING_TASKS
    from vllm.v1.engine import EngineCoreRequest

    pooling = sampling = None
    if core.is_pooling_model:
        pooling = PoolingParams(task=next(task for task in core.get_supported_tasks() if task in POOLING_TASKS))
    else:
        sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    name = f"sage-calibration-{uuid.uuid4()}"
    request = EngineCoreRequest(
        request_id=name,
        external_req_id=name,
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=sampling,
        pooling_params=pooling,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=name,  # so that nobody finds these pages in a cache, whose keys are not calibrated yet
        data_parallel_rank=None,
    )
    core.add_request(*core.preprocess_add_request(request))
    for _ in range(_MAX_STEPS):
        if not core.scheduler.has_requests() and not core.batch_queue:
            return
        core.post_step(core.step_fn()[1])
    raise RuntimeError("the engine does not read the texts of its calibration; give it a file of sage calibrate")
