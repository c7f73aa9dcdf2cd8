# SPDX-License-Identifier: Apache-2.0
"""Patches of vLLM: each documents itself and is applied once. If vLLM lacks what one replaces, the error names it."""

import importlib
import pkgutil
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import PLAIN, environment

from sage_backend.demo import MODEL_DIR
from sage_backend.engine import patches
from sage_backend.engine.patches import config_check, model_runner, nixl_handshake, target
from sage_backend.engine.patches import scheduler as scheduling
from sage_backend.engine.patches.target import PatchError
from sage_backend.options import VariatorOptions
from sage_backend.plugin import backend_member

NAMES = sorted(module.name for module in pkgutil.iter_modules(patches.__path__) if module.name != "target")


@pytest.mark.parametrize("name", NAMES)
def test_every_patch_says_what_it_is(name: str) -> None:
    module = importlib.import_module(f"{patches.__name__}.{name}")
    labels = re.findall(r"^(What|Why|Releases|Remove when): \S", module.__doc__ or "", re.MULTILINE)
    assert labels == ["What", "Why", "Releases", "Remove when"]
    assert callable(module.apply)
    assert re.search(rf"^\| {name} +\|", patches.__doc__ or "", re.MULTILINE)


def test_the_table_lists_no_other() -> None:
    rows = re.findall(r"^\| (\w+) +\|", patches.__doc__ or "", re.MULTILINE)
    assert sorted(rows) == sorted([*NAMES, "patch"])


def test_patches_are_applied_once() -> None:
    with environment():
        from vllm.engine.arg_utils import EngineArgs

        patches.apply_all()
        patched = EngineArgs.create_engine_config
        patches.apply_all()
    assert EngineArgs.create_engine_config is patched


def refused(call: Any, *arguments: Any) -> str:
    with environment(), pytest.raises(PatchError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the patch, what it replaces, the version of vLLM that lacks it, and what to do."""
    with environment():
        import vllm
        from vllm.engine.arg_utils import EngineArgs
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.delattr(EngineArgs, "create_engine_config")
    config_check.apply.cache_clear()
    try:
        message = refused(patches.apply_all)
    finally:
        monkeypatch.undo()
        config_check.apply.cache_clear()
        restored = EngineArgs.create_engine_config
        config_check.apply()
        EngineArgs.create_engine_config = restored  # which was patched before
    assert message == (
        "sage-backend's patch 'config_check' replaces EngineArgs.create_engine_config, which vLLM 0.99.0 does not have; "
        "install vLLM 0.31.0, 0.32.0 or 0.33.0, or uninstall sage-backend"
    )


@pytest.mark.parametrize(
    ("module", "names", "missing"),
    [
        ("vllm.no_such_module", ("Anything",), "vllm.no_such_module"),
        ("vllm.engine.arg_utils", ("NoSuchClass",), "vllm.engine.arg_utils.NoSuchClass"),
        ("vllm.engine.arg_utils", ("EngineArgs", "no_such_method"), "EngineArgs.no_such_method"),
    ],
)
def test_what_can_be_missing(module: str, names: tuple[str, ...], missing: str) -> None:
    assert f"patch 'any' replaces {missing}, which vLLM 0." in refused(target.find, "a.package.any", module, *names)


def test_a_worker_method_that_is_missing() -> None:
    found = refused(target.wrap_worker_method, "any", "no_such_method", lambda call: call)
    assert "replaces WorkerBase.no_such_method" in found


def test_objects_that_lack_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers and model runners are patched one by one."""
    monkeypatch.setattr(scheduling.block_hash, "apply", lambda: None)
    scheduler = SimpleNamespace(_get_local_prefix_cache_hit=lambda request: None)
    message = refused(scheduling.attach, scheduler, VariatorOptions("file"), [2])
    assert "patch 'scheduler' replaces SimpleNamespace.need_mamba_block_aligned_split" in message
    assert "patch 'model_runner' replaces SimpleNamespace.execute_model" in refused(model_runner.apply, SimpleNamespace(), None)


def test_servers_with_other_pages_are_refused_by_nixl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two servers compare differs if their pages do, and only then. Other backends and connectors are left alone."""
    calibrations = [tmp_path / name for name in ("one", "copy", "other")]
    for file, contents in zip(calibrations, ("1", "1", "2"), strict=True):
        file.write_text(contents)
    with environment():
        from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
        from vllm.engine.arg_utils import EngineArgs

        monkeypatch.setattr(base_worker, "compute_nixl_compatibility_hash", base_worker.compute_nixl_compatibility_hash)
        nixl_handshake.apply.cache_clear()
        connector = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
        made = EngineArgs(str(MODEL_DIR), attention_backend=PLAIN, kv_transfer_config=connector).create_engine_config()
        plain = base_worker.compute_nixl_compatibility_hash(made, "any")
        unpatched = base_worker.compute_nixl_compatibility_hash
        for transfer, is_nixl in ((None, False), ({**connector, "kv_connector": "ExampleConnector"}, False), (connector, True)):
            nixl_handshake.apply_for(SimpleNamespace(kv_transfer_config=transfer))
            assert (base_worker.compute_nixl_compatibility_hash is unpatched) == (not is_nixl)

        def compared(**options: Any) -> str:
            made.attention_config.backend = backend_member("SAGE")
            made.additional_config = {"sage": options}
            return str(base_worker.compute_nixl_compatibility_hash(made, "any"))

        assert base_worker.compute_nixl_compatibility_hash(made, "any") == plain
        same = [{}, {"k_bits": 8}, {"smooth_q": True}, {"canary": 1}]
        other: list[dict[str, Any]] = [{"k_bits": 4}, {"k_bits": 4, "v_bits": 4}, {"page_tokens": 64}, {"memory": {}}]
        other.append({"memory": {"extrapolate": 32768}})  # whose summaries are of keys that are turned
        assert compared(memory={"topk_pages": 8, "dense_layers": [0]}) == compared(memory={})
        other += [{name: False} for name in ("smooth_k", "smooth_v", "equalize")]
        one, copy, third = (compared(calibration=str(file)) for file in calibrations)
        assert len({compared(**options) for options in same}) == 1
        assert len({compared(**options) for options in [{}, *other]} | {one, third}) == len(other) + 3
        assert one == copy
    nixl_handshake.apply.cache_clear()  # the function is restored
