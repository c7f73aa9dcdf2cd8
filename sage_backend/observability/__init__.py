# SPDX-License-Identifier: Apache-2.0
"""Metrics, the canary and the coverage of memory: what a server shows of its steps."""
