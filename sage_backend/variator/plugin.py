# SPDX-License-Identifier: Apache-2.0
"""The compression plugin in plain torch, for serving and for training."""

import torch.nn.functional as F
from torch import Tensor, nn

BOTTLENECK = 64
"""Channels of the adapter between its two layers, as in the paper."""


class CompressionPlugin(nn.Module):
    """Pools `ratio` consecutive vectors into one, and expands the FFN's result to `ratio` vectors.

    An untrained plugin averages, and repeats the result.
    """

    def __init__(self, hidden: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.weigh = nn.Linear(ratio * hidden, ratio)
        self.down = nn.Linear(2 * hidden, BOTTLENECK)
        self.up = nn.Linear(BOTTLENECK, hidden)
        for parameter in (*self.weigh.parameters(), *self.up.parameters()):
            nn.init.zeros_(parameter)

    def pool(self, x: Tensor) -> Tensor:
        """[..., tokens, hidden] -> [..., tokens / ratio, hidden]: sums of groups, with weights that depend on the whole
        group."""
        groups = x.unflatten(-2, (-1, self.ratio))
        weights = self.weigh(groups.flatten(-2)).softmax(-1)
        return (weights.unsqueeze(-1) * groups).sum(-2)

    def expand(self, y: Tensor, x: Tensor) -> Tensor:
        """The FFN's results for groups, y [..., tokens / ratio, hidden], and what was pooled, x -> [..., tokens, hidden].

        Each vector of a group gets the group's result plus the adapter's output for that result and the vector itself.
        """
        # The adapter's input is [y, x]; y's part is the same for the whole group.
        of_y, of_x = self.down.weight.split(y.shape[-1], -1)
        inner = F.linear(x, of_x, self.down.bias).unflatten(-2, (-1, self.ratio)) + F.linear(y, of_y).unsqueeze(-2)
        return (self.up(F.gelu(inner)) + y.unsqueeze(-2)).flatten(-3, -2)


def saved_operations(tokens: int, ratio: int, layers: int, hidden: int, intermediate: int) -> int:
    """Operations of gated FFNs that plugins save for `tokens` tokens, less their own; a multiply-add is two."""
    rows = tokens // ratio
    of_ffns = 2 * 3 * hidden * intermediate * (tokens - rows)
    of_plugins = 2 * hidden * (tokens * (ratio + 1) + BOTTLENECK * (2 * tokens + rows))
    return layers * (of_ffns - of_plugins)
