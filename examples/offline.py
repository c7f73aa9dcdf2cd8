# SPDX-License-Identifier: Apache-2.0
"""Offline inference with quantized KV pages: `python examples/offline.py [MODEL]`.

Without an argument, it takes the small model that the package embeds. It runs on a GPU or a CPU.
"""

import sys

from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from sage_backend.demo import MODEL_DIR

PROMPTS = ["def fibonacci(n):", "import os\n\ndef remove_file(path):"]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(MODEL_DIR)
    # On a CPU, the cache is not a share of GPU memory, so set its size. Skip compilation for a quick start.
    on_cpu = {"kv_cache_memory_bytes": 256 << 20, "enforce_eager": True} if current_platform.is_cpu() else {}
    llm = LLM(
        model,
        attention_backend="SAGE",
        additional_config={"sage": {"k_bits": 8}},  # 4 for more tokens and a larger loss
        max_model_len=2048,
        **on_cpu,
    )
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=32)):
        print(f"--- {output.prompt!r}\n{output.outputs[0].text}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
