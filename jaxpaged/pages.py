"""The page pool and its index by content: pure functions over a `Pool`, which is a value.

A page is in one of three places: *held* (refs > 0), *blank* (nobody holds it, its content is worth nothing) or *cached*
(nobody holds it, but it is published: its content can be found by its key). New pages come from the blank ones first,
then from the cached ones, least recently released first. Page 0 is the null page: padding points at it, it is never
given out.

Keys. A full page is named by a hash of (its parent's key, its tokens); the first page's parent is the salt's hash. So a
key says everything from the beginning of the sequence to the end of the page. A *tail* is a partly filled page: it is
filed under its parent's key with the tokens it holds, one a parent, the latest.

Nobody writes where somebody else may read: offset o of page p may be written only if refs[p] == 1 and o >= valid[p]
(tokens published). Otherwise the writer copies the page first (the scheduler does that).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxpaged.reach import EVERYTHING, Reach
from jaxpaged.versioned import Array, Map

NULL_PAGE = 0
Key = bytes


class Tail(NamedTuple):
    page: int
    tokens: tuple[int, ...]


class Match(NamedTuple):
    """What a prompt shares: its first full pages with their keys, and `tail_tokens` tokens of the page `tail` (-1: none).
    pages: of each group of layers those that are still seen, the last of them being the last of the full pages."""

    keys: list[Key]
    pages: tuple[list[int], ...]
    tail: int = -1
    tail_tokens: int = 0


class Pool(NamedTuple):
    """Versioned containers and counts. A tuple: making the next one costs a fifth of what `dataclasses.replace` does."""

    page_size: int
    refs: Array  # int32 [P]
    valid: Array  # int32 [P]: tokens published
    stamp: Array  # int64 [P]: place of a cached page's entry in `queue`; -1: it has none
    queue: Array  # int32 [2 P]: ring of released published pages, oldest first; stale entries are skipped
    blank: Array  # int32 [P]: stack of blank pages
    key_of: Map  # page -> (key or parent's key, is it a tail)
    full: Map  # key -> page
    tails: Map  # parent's key -> Tail
    head: int = 0
    tail: int = 0
    num_blank: int = 0  # on the stack
    num_used: int = 1  # pages below were given out at least once; those above are blank too
    num_held: int = 0

    @property
    def num_pages(self) -> int:
        return len(self.refs.read())

    @property
    def num_free(self) -> int:
        """Pages that `take` can give."""
        return self.num_pages - 1 - self.num_held

    @property
    def num_cached(self) -> int:
        return self.num_free - self.num_blank - (self.num_pages - self.num_used)


def create(num_pages: int, page_size: int) -> Pool:
    zeros = lambda n, dtype: Array(np.zeros(n, dtype))
    stamp = Array(np.full(num_pages, -1, np.int64))
    return Pool(page_size, zeros(num_pages, np.int32), zeros(num_pages, np.int32), stamp,
                zeros(2 * num_pages, np.int32), zeros(num_pages, np.int32), Map(), Map(), Map())  # fmt: skip


def root(salt: str) -> Key:
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


def page_key(parent: Key, words: bytes) -> Key:
    """words: the page's tokens, int32 [K], as bytes."""
    return hashlib.blake2b(parent + words, digest_size=16).digest()


def split(tokens: np.ndarray, page_size: int) -> Iterator[bytes]:
    """The words of each full page of `tokens` (int32)."""
    words, size = tokens.tobytes(), tokens.itemsize * page_size
    return (words[at : at + size] for at in range(0, len(words) - size + 1, size))


def of_group(key: Key, group: int) -> Key:
    """Where the page of that group of layers is filed: the first one's under the key itself."""
    return key + bytes((group,)) if group else key


def match(pool: Pool, tokens: np.ndarray, salt: str, reaches: Sequence[Reach] = EVERYTHING) -> Match:
    """The longest known prefix of `tokens`, but at least one token is left to compute. Of a group of layers that does not see
    everything, only the pages must be there that the next token sees."""
    K, most = pool.page_size, len(tokens) - 1
    keys, found = _walk(pool, tokens[:most], salt, reaches)
    count, first = _longest(found, K, reaches)
    pages = tuple([page for page in found[g][start:count] if page is not None] for g, start in enumerate(first))
    if len(reaches) > 1:
        return Match(keys[:count], pages)
    parent = keys[count - 1] if count else root(salt)
    return Match(keys[:count], pages, *_match_tail(pool, parent, tokens[count * K : most]))


def _walk(pool: Pool, tokens: np.ndarray, salt: str, reaches: Sequence[Reach]) -> tuple[list[Key], list[list[int | None]]]:
    """Keys of the full pages of `tokens`, and of each group the page that is filed there, up to where one is missing that
    every token sees."""
    full, parent = pool.full.read(), root(salt)
    keys: list[Key] = []
    found: list[list[int | None]] = [[] for _ in reaches]
    if reaches == EVERYTHING:  # the same with less work
        for words in split(tokens, pool.page_size):
            parent = page_key(parent, words)
            page = full.get(parent)
            if page is None:
                break
            keys.append(parent)
            found[0].append(page)
        return keys, found
    for words in split(tokens, pool.page_size):
        parent = page_key(parent, words)
        pages = [full.get(of_group(parent, g)) for g in range(len(reaches))]
        if any(page is None and reach.unlimited for page, reach in zip(pages, reaches)):
            break
        keys.append(parent)
        for group, page in zip(found, pages):
            group.append(page)
    return keys, found


def _longest(found: list[list[int | None]], K: int, reaches: Sequence[Reach]) -> tuple[int, list[int]]:
    """The longest prefix, in pages, of which each group has all that is seen, and where that begins. Its last page must be
    there: where a chunk ends nothing before is seen, and that alone says nothing of who has computed it."""
    best, run = (0, [0] * len(reaches)), [0] * len(reaches)
    if all(reach.unlimited for reach in reaches):
        return len(found[0]), best[1]
    for n in range(1, len(found[0]) + 1):
        run = [so_far + 1 if group[n - 1] is not None else 0 for so_far, group in zip(run, found)]
        first = [reach.first_seen(n * K) // K for reach in reaches]
        if any(run) and all(have >= n - start for have, start in zip(run, first)):
            best = n, first
    return best


def _match_tail(pool: Pool, parent: Key, tokens: np.ndarray) -> tuple[int, int]:
    entry = pool.tails.get(parent)
    if entry is None:
        return -1, 0
    shared = 0
    for ours, theirs in zip(tokens.tolist(), entry.tokens):
        if ours != theirs:
            break
        shared += 1
    return (entry.page, shared) if shared else (-1, 0)


def hold(pool: Pool, pages: Sequence[int]) -> Pool:
    """One more holder for each page (each named once)."""
    if not len(pages):
        return pool
    index = np.asarray(pages, np.int64)
    refs = pool.refs.read()[index]
    revived = int((refs == 0).sum())
    return pool._replace(refs=pool.refs.set(index, refs + 1), stamp=pool.stamp.set(index, -1),
                         num_held=pool.num_held + revived)  # fmt: skip


def take(pool: Pool, n: int) -> tuple[Pool, np.ndarray]:
    """n pages (int64), held once each, their old content forgotten. The caller has looked at `num_free`."""
    assert n <= pool.num_free, f"{n} pages wanted, {pool.num_free} free"
    if not n:
        return pool, np.zeros(0, np.int64)
    from_stack = min(n, pool.num_blank)
    fresh = min(n - from_stack, pool.num_pages - pool.num_used)
    blank, used = pool.num_blank - from_stack, pool.num_used + fresh
    taken = [pool.blank.read()[blank : pool.num_blank], np.arange(pool.num_used, used)]
    if n > from_stack + fresh:
        pool, evicted = _evict(pool, n - from_stack - fresh)
        taken.append(evicted)
    pages = np.concatenate(taken)
    refs = pool.refs.set(pages, 1)
    return pool._replace(refs=refs, num_blank=blank, num_used=used, num_held=pool.num_held + n), pages


def _evict(pool: Pool, n: int) -> tuple[Pool, np.ndarray]:
    """The n cached pages that were released first, no longer findable."""
    queue, stamp, size = pool.queue.read(), pool.stamp.read(), len(pool.queue.read())
    found: list[np.ndarray] = []
    head, missing = pool.head, n
    while missing:
        places = np.arange(head, min(head + max(64, missing), pool.tail))
        pages = queue[places % size].astype(np.int64)
        live = np.flatnonzero(stamp[pages] == places)[:missing]
        found.append(pages[live])
        missing -= len(live)
        head = int(places[live[-1]]) + 1 if not missing else int(places[-1]) + 1
    pages = np.concatenate(found)
    pool = pool._replace(head=head, stamp=pool.stamp.set(pages, -1))
    return unpublish(pool, pages.tolist()), pages


def unpublish(pool: Pool, pages: Sequence[int]) -> Pool:
    """Makes pages unfindable. Who holds them keeps them."""
    full, tails, gone, filed = [], [], [], pool.key_of.read()
    for page in pages:
        entry = filed.get(page)
        if entry is not None:
            gone.append(page)
            (tails if entry[1] else full).append(entry[0])
    if not gone:
        return pool
    return pool._replace(key_of=pool.key_of.update({}, gone), full=pool.full.update({}, full),
                         tails=pool.tails.update({}, tails), valid=pool.valid.set(np.asarray(gone), 0))  # fmt: skip


def release(pool: Pool, pages: np.ndarray) -> Pool:
    """One holder less for each page. The last of a chain first, so that it is evicted first."""
    if not len(pages):
        return pool
    pages = pages[::-1]
    refs = pool.refs.read()[pages] - 1
    free = pages[refs == 0]
    published = pool.valid.read()[free] > 0
    cached, blank = free[published], free[~published]
    pool = pool._replace(refs=pool.refs.set(pages, refs), num_held=pool.num_held - len(free))
    if len(blank):
        pool = _stack(pool, blank)
    return _enqueue(pool, cached) if len(cached) else pool


def _stack(pool: Pool, pages: np.ndarray) -> Pool:
    """Puts pages on the stack of blank ones."""
    end = pool.num_blank + len(pages)
    return pool._replace(blank=pool.blank.set(slice(pool.num_blank, end), pages), num_blank=end)


def _enqueue(pool: Pool, pages: np.ndarray) -> Pool:
    size = len(pool.queue.read())
    if pool.tail + len(pages) - pool.head > size:
        pool = _compact(pool)
    places = np.arange(pool.tail, pool.tail + len(pages))
    return pool._replace(queue=pool.queue.set(places % size, pages), stamp=pool.stamp.set(pages, places),
                         tail=pool.tail + len(pages))  # fmt: skip


def _compact(pool: Pool) -> Pool:
    """Drops stale entries: there are at most P live ones, so this happens once in P releases at the most."""
    size = len(pool.queue.read())
    places = np.arange(pool.head, pool.tail)
    pages = pool.queue.read()[places % size]
    pages = pages[pool.stamp.read()[pages] == places]
    places = np.arange(pool.tail, pool.tail + len(pages))
    return pool._replace(queue=pool.queue.set(places % size, pages), stamp=pool.stamp.set(pages, places),
                         head=pool.tail, tail=pool.tail + len(pages))  # fmt: skip


def publish(pool: Pool, pages: Sequence[int], keys: Sequence[Key]) -> Pool:
    """Files full pages under their keys, except where another page is there already or the page is filed."""
    full: dict[Key, int] = {}
    key_of: dict[int, tuple[Key, bool]] = {}
    tails = []  # pages that were tails and have been filled since
    known, filed = pool.full.read(), pool.key_of.read()
    for page, key in zip(pages, keys):
        entry = key_of.get(page) or filed.get(page)
        if key in full or key in known or (entry is not None and not entry[1]):
            continue
        if entry is not None:
            tails.append(page)
        full[key], key_of[page] = page, (key, False)
    if not full:
        return pool
    pool = unpublish(pool, tails)
    valid = pool.valid.set(np.fromiter(key_of, np.int64, len(key_of)), pool.page_size)
    return pool._replace(full=pool.full.update(full), key_of=pool.key_of.update(key_of), valid=valid)


def publish_tail(pool: Pool, page: int, parent: Key, tokens: tuple[int, ...]) -> Pool:
    """Files a partly filled page under its parent, in the place of the one that was there."""
    entry = pool.key_of.get(page)
    if not tokens or (entry is not None and not entry[1]):
        return pool
    old = pool.tails.get(parent)
    if old is not None and old.page != page:
        pool = forget(pool, [old.page])
    return pool._replace(tails=pool.tails.set(parent, Tail(page, tokens)), key_of=pool.key_of.set(page, (parent, True)),
                         valid=pool.valid.set(page, len(tokens)))  # fmt: skip


def filed(pool: Pool, tokens: np.ndarray, salt: str, num_groups: int) -> list[int]:
    """The pages that can be found by `tokens`, of any group."""
    full, parent, found = pool.full.read(), root(salt), list[int]()
    for words in split(tokens, pool.page_size):
        parent = page_key(parent, words)
        found += [full[key] for key in (of_group(parent, g) for g in range(num_groups)) if key in full]
    return found


def forget(pool: Pool, pages: Sequence[int]) -> Pool:
    """Unpublishes pages; those that nobody holds are blank then."""
    cached = [page for page in pages if pool.stamp.read()[page] >= 0]
    pool = unpublish(pool, pages)
    if not cached:
        return pool
    return _stack(pool._replace(stamp=pool.stamp.set(np.asarray(cached), -1)), np.asarray(cached))


def reset(pool: Pool) -> Pool:
    """Nothing can be found any more; pages that are held stay held."""
    published = [page for page, _ in pool.key_of.items()]
    refs = pool.refs.read()
    cached = np.asarray([page for page in published if refs[page] == 0], np.int32)
    pool = unpublish(pool, published)
    if len(cached):
        pool = _stack(pool._replace(stamp=pool.stamp.set(cached, -1)), cached)
    return pool._replace(head=pool.tail)


def check(pool: Pool) -> None:
    """Raises AssertionError if the pool contradicts itself. O(P): for tests and idle moments."""
    refs, valid, stamp = pool.refs.read(), pool.valid.read(), pool.stamp.read()
    assert refs[NULL_PAGE] == 0 and valid[NULL_PAGE] == 0, "the null page is in use"
    assert (refs >= 0).all(), f"negative references: {np.flatnonzero(refs < 0).tolist()}"
    blank = pool.blank.read()[: pool.num_blank].tolist()
    assert len(set(blank)) == len(blank), "a page is blank twice"
    cached = set(np.flatnonzero(stamp >= 0).tolist())
    for page in blank:
        assert refs[page] == 0 and valid[page] == 0 and page not in cached, f"blank page {page} is in use"
    for page in cached:
        assert refs[page] == 0 and pool.queue.read()[stamp[page] % len(pool.queue.read())] == page
        assert pool.head <= stamp[page] < pool.tail and page in pool.key_of, f"cached page {page} cannot be found"
    for page in range(1, pool.num_used):
        assert (refs[page] > 0) + (page in cached) + (page in set(blank)) == 1, f"page {page} is lost or in two places"
    for page, (key, is_tail) in pool.key_of.items():
        found = pool.tails[key].page if is_tail else pool.full[key]
        assert found == page and valid[page] > 0, f"page {page} is filed wrongly"
    assert len(pool.key_of) == len(pool.full) + len(pool.tails)
    assert pool.num_cached == len(cached)
