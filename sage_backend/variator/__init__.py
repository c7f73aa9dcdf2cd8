# SPDX-License-Identifier: Apache-2.0
"""Compression plugins on the feed-forward layers (FFNs) of a decoder, after Variator (Xiao et al., Findings of EMNLP 2023).

A plugin pools a few consecutive hidden vectors of a prompt into one before an FFN and expands the result behind it, so that the
FFN computes fewer rows. docs/user/variator.md is the user's side.
"""
