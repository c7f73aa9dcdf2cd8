# SPDX-License-Identifier: Apache-2.0
"""A vLLM attention backend on quantized KV pages. Importing this package imports neither torch nor vLLM."""

__version__ = "0.1.0"

BACKEND = "SAGE"
"""The name of `--attention-backend sage` in vLLM's enum of backends."""

TESTED_VLLM = ("0.31.0", "0.32.0", "0.33.0")
"""vLLM releases that the tests have run against, the newest last; others start with a warning."""

DEFAULT_VLLM = "0.32.0"
"""The release that `deploy/setup.sh` and the images install: the newest of which there is a CPU build, and which Ray serves."""
