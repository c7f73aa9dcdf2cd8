# SPDX-License-Identifier: Apache-2.0
"""The `sage` command and what its subcommands share."""
