"""What requests take over from the prefix cache, and what they leave in it."""

from collections.abc import Sequence

from morphserve.runtime.blocks import BlockPool
from morphserve.runtime.prefix_cache import Found, next_name, root_name
from morphserve.runtime.request import Request


class Reuse:
    """The scheduler's hand in the prefix cache; without `enabled` it finds and leaves nothing."""

    def __init__(self, pool: BlockPool, block_tokens: int, enabled: bool) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._enabled = enabled
        self.queries = 0  # prompt tokens that were looked up when their request was first admitted
        self.hits = 0  # of these, found

    def find(self, request: Request, deepest: int) -> Found:
        """What is cached of a waiting request's beginning; a token is left to be computed."""
        if not self._enabled:
            return Found([], 0)
        count = (request.num_tokens - 1) // self._block_tokens
        return self._pool.find(self._names(request, count), deepest)

    def take(self, request: Request, found: Found) -> None:
        """Starts an admitted request's table with what was found."""
        self._pool.share(found.blocks)
        request.blocks = found.blocks
        request.num_registered = len(found.blocks)
        request.num_computed = len(found.blocks) * self._block_tokens
        request.kv_rung = found.rung
        if self._enabled and not request.num_preemptions:
            request.num_cached_tokens = request.num_computed
            self.queries += len(request.prompt)
            self.hits += request.num_computed

    def leave(self, request: Request) -> None:
        """Registers the blocks whose last token has been computed."""
        count = request.num_computed // self._block_tokens
        if not self._enabled or count == request.num_registered:
            return
        names = self._names(request, count)
        for i in range(request.num_registered, count):
            self._pool.register(request.blocks[i], names[i], request.kv_rung)
        request.num_registered = count

    def _names(self, request: Request, count: int) -> Sequence[bytes]:
        """The names of the request's first `count` full blocks, or of more."""
        names = request.block_names
        last = names[-1] if names else root_name(request.demands.cache_salt)
        for i in range(len(names), count):
            start = i * self._block_tokens
            last = next_name(last, request.tokens(start, start + self._block_tokens))
            names.append(last)
        return names
