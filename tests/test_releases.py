# SPDX-License-Identifier: Apache-2.0
"""Where this package touches vLLM, checked against the text of vLLM's source. Nothing of vLLM is imported or run.

    SAGE_VLLM_SOURCE=FOLDER python -m pytest tests/test_releases.py

checks the release that is unpacked in FOLDER (which holds the folder `vllm`) in place of the installed one: for instance a
wheel for CUDA on a machine without a GPU. It finds names that are gone and arguments that are new. It cannot find that the same
name means something else.
"""

import ast
import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from sage_backend.engine import patches
from sage_backend.engine.checks import _UNSUPPORTED, reasons
from sage_backend.engine.patches import (
    block_hash,
    input_processor,
    model_runner,
    pages_gauge,
    scheduler,
    target,
    zero_block_ids,
)
from sage_backend.options import MemoryOptions, VariatorOptions

PACKAGE = Path(patches.__file__).parents[3]


@functools.cache
def source() -> Path:
    """The folder that holds vLLM's."""
    if chosen := os.environ.get("SAGE_VLLM_SOURCE"):
        return Path(chosen)
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


class Text:
    """A module, a class or an instance of a class in vLLM's source. Its attributes are the names that the text binds. What is
    set is noted in `changes`: of what, its name, what it was (a node of the syntax tree or None), and what it is now."""

    changes: ClassVar[list[tuple["Text", str, Any, Any]]] = []

    def __init__(self, name: str, module: str, tree: Any, is_instance: bool = False) -> None:
        vars(self).update(__qualname__=name, _module=module, _tree=tree, _is_instance=is_instance)

    def __getattr__(self, name: str) -> Any:
        tree, module = vars(self)["_tree"], vars(self)["_module"]
        if (node := bound(tree, module).get(name)) is None:
            raise AttributeError(name)
        return Text(f"{self.__qualname__}.{name}", module, node) if isinstance(node, ast.ClassDef) else node

    def __setattr__(self, name: str, value: Any) -> None:
        self.changes.append((self, name, getattr(self, name, None), value))


@functools.cache
def module_text(module: str) -> Text:
    """Raises ModuleNotFoundError, as an import does."""
    path = source() / module.replace(".", "/")
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return Text(module, module, ast.parse(file.read_text(encoding="utf-8")))
    raise ModuleNotFoundError(f"no module {module} in {source()}", name=module)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module or a class, also under `if`, `try` and `with`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody", "handlers"):
                for inner in getattr(node, part, []):
                    yield from statements(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def bound(tree: Any, module: str) -> dict[str, ast.AST]:
    """The names that a module or a class binds, and where. A class has those of its bases in the same module, too, and what its
    methods assign to `self`. A module has those that it imports, and, where it imports lazily, those that its text names."""
    found: dict[str, ast.AST] = {}
    for node in statements(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id: node for each in targets for name in ast.walk(each) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*" and isinstance(node, ast.ImportFrom):
                    found |= bound(vars(module_text(f"{module}.{node.module}"))["_tree"], module)
                found[alias.asname or alias.name] = node
    if isinstance(tree, ast.ClassDef):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                found.setdefault(node.attr, node)
        for base in tree.bases:
            name = ast.unparse(base).partition("[")[0]
            own = bound(vars(module_text(module))["_tree"], module)
            if isinstance(own.get(name), ast.ClassDef):
                found = bound(own[name], module) | found
    elif "__getattr__" in found:
        found |= {node.value: node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return found


def look_up(path: str) -> Any:
    """ "module:Class" or "module" of vLLM."""
    module, _, name = path.partition(":")
    return getattr(module_text(module), name) if name else module_text(module)


def instance(path: str) -> Any:
    text = vars(look_up(path))
    return Text(text["__qualname__"], text["_module"], text["_tree"], is_instance=True)


def signature(function: ast.FunctionDef, without_self: bool = False) -> inspect.Signature:
    """Of a function in a syntax tree, without annotations. Every default is None."""
    arguments = ast.parse(ast.unparse(function)).body[0].args  # type: ignore[attr-defined]
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [each and ast.Constant(None) for each in arguments.kw_defaults]
    if without_self:
        arguments.args.pop(0)
    return inspect.signature(eval(f"lambda {ast.unparse(arguments)}: None"))


def assert_accepts(ours: inspect.Signature, theirs: inspect.Signature, where: str, by_name: bool = False) -> None:
    """Assert that `ours` can be called with all arguments of `theirs`, and with those that have no default. by_name: by
    keyword, as vLLM calls an attention backend; otherwise by position, as far as `theirs` can."""
    kinds = inspect.Parameter
    for every in (True, False):
        given = [p for p in theirs.parameters.values() if every or p.default is kinds.empty]
        positional = [p.name for p in given if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        named = [p.name for p in given if p.kind is kinds.KEYWORD_ONLY]
        try:
            if by_name:
                ours.bind(**dict.fromkeys([*positional, *named]))
            else:
                ours.bind(*positional, **dict.fromkeys(named))
        except TypeError as error:
            raise AssertionError(f"{where}{ours} is not what vLLM has, {theirs}: {error}") from None


def vllm_imports() -> list[tuple[str, str, str]]:
    """Every `from vllm... import name` of this package: file, module, name."""
    return [
        (str(file.relative_to(PACKAGE)), node.module, alias.name)
        for file in sorted((PACKAGE / "sage_backend").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm"
        for alias in node.names
    ]


def test_imports() -> None:
    imports = vllm_imports()
    assert len(imports) > 40
    missing = []
    for file, module, name in imports:
        try:
            getattr(module_text(module), name)
        except (AttributeError, ModuleNotFoundError):
            try:
                module_text(f"{module}.{name}")
            except ModuleNotFoundError:
                missing.append(f"{file}: from {module} import {name}")
    assert not missing


PATCHES: dict[str, Callable[[], Any]] = {
    **{apply.__module__.rpartition(".")[2]: apply.__wrapped__ for apply in patches.AT_START},  # type: ignore[attr-defined]
    **{module.__name__.rpartition(".")[2]: module.apply.__wrapped__ for module in (block_hash, pages_gauge, zero_block_ids)},
    "attached scheduler": lambda: scheduler.attach(
        instance("vllm.v1.core.sched.scheduler:Scheduler"), VariatorOptions("file"), [2]
    ),
    "V1 model runner": lambda: model_runner.apply(
        instance("vllm.v1.worker.gpu_model_runner:GPUModelRunner"), SimpleNamespace()
    ),
    "V2 model runner": lambda: model_runner.apply(
        instance("vllm.v1.worker.gpu.model_runner:GPUModelRunner"), SimpleNamespace()
    ),
    "attached input processor": lambda: input_processor.attach(
        instance("vllm.v1.engine.input_processor:InputProcessor"), None, MemoryOptions(max_topk_pages=8)
    ),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds what it replaces, and its replacement takes the arguments of what was there."""
    Text.changes.clear()
    monkeypatch.setattr(target.importlib, "import_module", module_text)
    monkeypatch.setattr(scheduler.block_hash, "apply", lambda: None)
    PATCHES[name]()
    assert Text.changes
    for owner, key, before, after in Text.changes:
        if isinstance(before, ast.FunctionDef):
            ours = inspect.signature(after, follow_wrapped=False)
            assert_accepts(ours, signature(before, vars(owner)["_is_instance"]), f"{owner.__qualname__}.{key}: ")


OVERRIDES = {
    "engine/backend.py:SageBackend": "vllm.v1.attention.backend:AttentionBackend",
    "engine/impl.py:SageImpl": "vllm.v1.attention.backend:AttentionImpl",
    "engine/metadata.py:SageMetadataBuilder": "vllm.v1.attention.backend:AttentionMetadataBuilder",
    "engine/cpu_platform.py:SageCpuPlatform": "vllm.platforms.cpu:CpuPlatform",
}


@pytest.mark.parametrize("ours", OVERRIDES)
def test_overridden_methods(ours: str) -> None:
    """They take what vLLM's own take, by the same names."""
    file, _, name = ours.partition(":")
    tree = ast.parse((PACKAGE / "sage_backend" / file).read_text(encoding="utf-8"))
    [own] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    theirs = look_up(OVERRIDES[ours])
    compared = 0
    for method in own.body:
        if isinstance(method, ast.FunctionDef) and isinstance(base := getattr(theirs, method.name, None), ast.FunctionDef):
            assert_accepts(signature(method), signature(base), f"{name}.{method.name}", by_name=True)
            compared += 1
    assert compared


SERVED = {"has_sink", "has_sliding_window", "use_kv_connector", "use_per_head_quant_scales"}
"""Flags of vLLM's selector that make no difference to this backend."""


def test_flags_of_the_selector() -> None:
    """Each is known: a new one has to be served or refused."""
    fields = look_up("vllm.v1.attention.selector:AttentionSelectorConfig")
    flags = {node.target.id for node in vars(fields)["_tree"].body if isinstance(node, ast.AnnAssign)}
    of_models = {"use_alibi", "attention_free"}  # which only `checks.check_config` knows
    assert flags - set(inspect.signature(reasons).parameters) == SERVED | _UNSUPPORTED.keys() - of_models


READ = {
    "vllm.config.kv_transfer:KVTransferConfig": "has_connector kv_connector kv_connector_extra_config",
    "vllm.distributed.kv_transfer.kv_transfer_state": "_KV_CONNECTOR_AGENT",
    "vllm.lora.layers.base:BaseLayerWithLoRA": "punica_wrapper set_mapping",
    "vllm.lora.layers.utils:LoRAMapping": "index_mapping",
    "vllm.lora.model_manager:LoRAModelManager": "_last_mapping device lora_config lora_index_to_id lora_slots "
    "max_num_batched_tokens max_num_seqs vocab_size",
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase": "update_metadata",
    "vllm.model_executor.models.interfaces:SupportsLoRA": "lora_manager",
    "vllm.v1.attention.backend:AttentionBackend": "forward_includes_kv_cache_update supports_sink supports_sliding_window",
    "vllm.v1.attention.backend:AttentionMetadataBuilder": "_cudagraph_support reorder_batch_threshold layer_names vllm_config",
    "vllm.v1.attention.backend:CommonAttentionMetadata": "block_table_tensor max_seq_len num_actual_tokens query_start_loc "
    "query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound slot_mapping",
    "vllm.v1.core.sched.output:NewRequestData": "req_id sampling_params",
    "vllm.v1.core.sched.output:SchedulerOutput": "finished_req_ids scheduled_new_reqs",
    "vllm.v1.core.sched.scheduler:Scheduler": "connector get_kv_cache_usage get_request_counts has_requests",
    "vllm.v1.engine:EngineCoreRequest": "request_id external_req_id prompt_token_ids mm_features sampling_params "
    "pooling_params arrival_time lora_request cache_salt data_parallel_rank",
    "vllm.v1.engine.core:EngineCore": "add_request batch_queue get_supported_tasks is_pooling_model model_executor post_step "
    "preprocess_add_request reset_prefix_cache scheduler step_fn vllm_config",
    "vllm.v1.kv_cache_interface:AttentionSpec": "head_size head_size_v num_kv_heads state_content_bytes",
    "vllm.v1.kv_cache_layout:KVCacheLayout": "LBHNC",
    "vllm.v1.metrics.loggers:PrometheusStatLogger": "_gauge_cls engine_indexes per_engine_labelvalues vllm_config",
    "vllm.v1.request:Request": "block_hashes num_computed_tokens num_prompt_tokens sampling_params update_block_hashes",
    "vllm.v1.worker.gpu.input_batch:InputBatch": "req_ids",
    "vllm.v1.worker.gpu.kv_connector:KVConnector": "set_disabled",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": "kv_connector",
    "vllm.v1.worker.gpu_input_batch:InputBatch": "req_ids",
    "vllm.v1.worker.worker_base:WorkerBase": "get_model model_runner",
    "vllm.v1.worker.worker_base:WorkerWrapperBase": "__getattr__ vllm_config worker",
    "vllm.config.model:ModelConfig": "original_max_model_len",
    "vllm.config.parallel:ParallelConfig": "has_unfinished_dp nnodes_within_dp data_parallel_size_local _api_process_count "
    "_api_process_rank distributed_executor_backend use_ubatching",
    "vllm.config.vllm:VllmConfig": "additional_config attention_config cache_config compilation_config instance_id "
    "kv_transfer_config load_config lora_config model_config parallel_config scheduler_config speculative_config",
}
"""What is read of vLLM's objects, where the code does not look whether it is there."""


@pytest.mark.parametrize("path", READ)
def test_attributes(path: str) -> None:
    text = look_up(path)
    missing = [name for name in READ[path].split() if name not in bound(vars(text)["_tree"], vars(text)["_module"])]
    assert not missing
