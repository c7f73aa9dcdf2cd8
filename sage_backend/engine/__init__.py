# SPDX-License-Identifier: Apache-2.0
"""What vLLM runs of this backend: the attention backend, its checks, its CPU platform and the patches of vLLM."""
