# SPDX-License-Identifier: Apache-2.0
"""Real checkpoints, which are not in the repository: quantized keys against vLLM's own FP8 cache.

SAGE_MODELS=FOLDER names a folder of checkpoints in the Hugging Face layout; every one in it is tested. The bounds were chosen
on SmolLM2-135M-Instruct, Qwen2.5-Coder-0.5B-Instruct and Gemma 3 270M.
"""

import json
import os
from pathlib import Path

import pytest
from engines import PLAIN, environment

from sage_backend.tools import quality

FOLDER = os.environ.get("SAGE_MODELS")
MODELS = sorted(config.parent for config in Path(FOLDER).glob("*/config.json")) if FOLDER else []


@pytest.mark.engine
@pytest.mark.skipif(not MODELS, reason="SAGE_MODELS names no folder with checkpoints")
@pytest.mark.parametrize("model", MODELS or [Path("none")], ids=lambda model: model.name)
def test_quantized_keys_lose_less_than_fp8(model: Path, tmp_path: Path) -> None:
    """In all three measures; INT8 keys by a factor of two and more."""
    out = tmp_path / "report.json"
    runs = [PLAIN, f"{PLAIN}/fp8", "SAGE", "SAGE:k_bits=4"]
    with environment():
        assert quality.main([*runs, "--model", str(model), "--tokens", "2046", "--out", str(out)]) == 0
    _, fp8, int8, int4 = json.loads(out.read_text())["runs"]
    print([(run["loss_change"], run["mean_abs_logprob_change"], run["top1_agreement"]) for run in (fp8, int8, int4)])
    assert int8["mean_abs_logprob_change"] < min(0.065, fp8["mean_abs_logprob_change"] / 2)
    assert int4["mean_abs_logprob_change"] < min(0.11, fp8["mean_abs_logprob_change"])
    assert int8["top1_agreement"] > int4["top1_agreement"] > fp8["top1_agreement"]
    assert abs(int8["loss_change"]) < 0.006
    assert abs(int4["loss_change"]) < max(0.006, fp8["loss_change"])
