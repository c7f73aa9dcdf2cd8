# SPDX-License-Identifier: Apache-2.0
"""Features of a layer's attention: calibration, observers, and RoPE frequencies for pages at other positions."""
