# SPDX-License-Identifier: Apache-2.0
"""What changes how a layer attends: calibrations, observers of layers, and positions of pages."""
