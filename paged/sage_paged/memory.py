# SPDX-License-Identifier: Apache-2.0
"""Which pages of a long context are read, after InfLLM (Xiao et al., NeurIPS 2024).

Queries are taken in rows: the tokens of one request that lie in one block of `query_block` positions, or all tokens of a
request that decodes. For each row and KV head, what is read is a list of pages in the order of the context:

    sinks     the first pages of the context
    recalled  the `topk_pages` pages in between whose keys may fit the row's queries best, each head its own
    local     the pages from the one that holds the token `local_tokens` - 1 before the row's first, to the row's last token

Where all pages fit into the list, it is the context itself, and attention is what it is without memory.

Past the length that a model was trained for (`trained_tokens`), queries and keys reach distances that it has never seen. There,
all sinks and recalled pages are read at shifted positions: those of the page right before the local ones, where InfLLM puts
them too (section 3.2). The order inside a page stays.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Memory:
    """sink_tokens, local_tokens, query_block, trained_tokens: tokens. trained_tokens: 0 for positions as they are."""

    sink_tokens: int = 128
    local_tokens: int = 4096
    topk_pages: int = 32
    query_block: int = 512
    trained_tokens: int = 0

    def sink_pages(self, page_tokens: int) -> int:
        return -(-self.sink_tokens // page_tokens)

    def local_page(self, first: int, page_tokens: int) -> int:
        """The first local page of a row whose first query is the context's token `first`."""
        return max(first - self.local_tokens + 1, 0) // page_tokens

    def list_pages(self, page_tokens: int, row_tokens: int) -> int:
        """The most pages that a row of up to `row_tokens` queries reads."""
        local = (self.local_tokens + row_tokens - 3) // page_tokens + 2
        return self.sink_pages(page_tokens) + self.topk_pages + local

    def reads_all(self, page_tokens: int, tokens: int) -> bool:
        """Whether all contexts of up to `tokens` tokens are read whole and where they are."""
        listed = (self.sink_pages(page_tokens) + self.topk_pages) * page_tokens
        return tokens <= self.local_tokens + listed and (not self.trained_tokens or tokens <= self.trained_tokens)

    def farthest(self, page_tokens: int) -> int:
        """The largest distance, in tokens, at which a context with shifted pages is read."""
        return self.local_tokens + self.query_block + 2 * page_tokens
