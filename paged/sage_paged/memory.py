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

ALL_PAGES = 1 << 30
"""In place of a request's `topk_pages`: its context is read as without memory, whole and where it is."""


@dataclass(frozen=True)
class Memory:
    """sink_tokens, local_tokens, query_block, trained_tokens: tokens. trained_tokens: 0 for positions as they are.

    max_topk_pages: the most pages that a request may have recalled in place of `topk_pages`, which lists have room for; 0 if
    requests have no numbers of their own, or have none above topk_pages. whole: whether requests may have ALL_PAGES.
    """

    sink_tokens: int = 128
    local_tokens: int = 4096
    topk_pages: int = 32
    query_block: int = 512
    trained_tokens: int = 0
    max_topk_pages: int = 0
    whole: bool = False

    @property
    def most_pages(self) -> int:
        """The most pages that are recalled for a row, other than all."""
        return max(self.topk_pages, self.max_topk_pages)

    def sink_pages(self, page_tokens: int) -> int:
        return -(-self.sink_tokens // page_tokens)

    def local_page(self, first: int, page_tokens: int) -> int:
        """The first local page of a row whose first query is the context's token `first`."""
        return max(first - self.local_tokens + 1, 0) // page_tokens

    def list_pages(self, page_tokens: int, row_tokens: int, context_pages: int = 0) -> int:
        """The most pages that a row of up to `row_tokens` queries reads, of contexts of up to `context_pages` pages where
        requests may read them whole."""
        local = (self.local_tokens + row_tokens - 3) // page_tokens + 2
        listed = self.sink_pages(page_tokens) + self.most_pages + local
        return max(listed, context_pages) if self.whole else listed

    def reads_all(self, page_tokens: int, tokens: int, topk_pages: int | None = None) -> bool:
        """Whether all contexts of up to `tokens` tokens are read whole and where they are. topk_pages: the least of their
        requests, if these have numbers of their own."""
        topk = self.topk_pages if topk_pages is None else topk_pages
        listed = (self.sink_pages(page_tokens) + topk) * page_tokens
        trained = not self.trained_tokens or topk == ALL_PAGES or tokens <= self.trained_tokens
        return tokens <= self.local_tokens + listed and trained

    def farthest(self, page_tokens: int) -> int:
        """The largest distance, in tokens, at which a context with shifted pages is read."""
        return self.local_tokens + self.query_block + 2 * page_tokens
