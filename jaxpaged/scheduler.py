"""The scheduler: a value and the pure functions that advance it.

A sequence has `num_tokens` tokens, of which the host knows `num_known` (all but those that steps in flight are sampling)
and of which the keys of `num_computed` are cached, or will be once the steps already scheduled have run. There
is no prefill phase and no decode phase: a step gives each running sequence as many tokens to compute as it lacks and the
budget has, in the order of their keys (priority, arrival); what is left over admits waiting sequences. A sequence whose
last token is computed samples one more, and lacks one again; or it ends, if it is there to be pooled.

Order of events in `schedule`:
  0. Pages that no token to come sees (layers with a window) come back.
  1. Running sequences get tokens, oldest first, under `max_num_batched_tokens`.
  2. They get pages. If there are too few, the newest running sequence is preempted (its pages are released, its tokens go
     back to the queue with its old key) and 1 begins again. The oldest is never preempted: it fits alone, or `add` would
     have refused it. So there is always progress.
  3. Pages that this step fills with known tokens are published at once: in every layer a step writes keys before it reads
     them, so a sequence admitted in the same step may already share them.
  4. Waiting sequences are admitted while budget, slots and pages last: only if all pages of their known tokens are there.
     One that does not fit makes those behind it wait.
Then in `commit`, a step (or more) later: tokens become known, sequences end, pages filled by generated tokens and partly
filled last pages ("tails") are published. Tails only here: who shares one copies it, before the step that needs the copy,
so what it holds must come from an earlier step.

Invariants (`check`): every page is held or free; its references are the sequences that hold it; a page that is written is
held once and not published beyond; num_computed and num_known <= num_tokens <= max_total_tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxpaged import pages, publish, residents, seating
from jaxpaged import waiting as queue
from jaxpaged.pages import Pool
from jaxpaged.request import FinishReason, Request, RequestError
from jaxpaged.seating import Draft
from jaxpaged.state import (
    NO_TOKEN,
    NUM_STOPS,
    Limits,
    Outputs,
    Plan,
    State,
    Stats,
    Waiting,
    check,
    copied,
    held_by,
    initial,
    spread,
    stats,
)

__all__ = [
    "Limits", "Outputs", "Plan", "State", "Stats", "abort", "add", "check", "check_fits", "commit", "fail", "fail_running",
    "finish", "initial", "reset_prefix_cache", "schedule", "stats",
]  # fmt: skip


# -- events ---------------------------------------------------------------------------------------------------------------


def check_fits(limits: Limits, request: Request) -> None:
    """RequestError if the request could not even run alone: it would wait for ever."""
    if request.adapter is not None and not limits.max_loras:
        raise RequestError("LoRA adapters are off; start with enable_lora=True (--enable-lora).", "lora_request")
    if limits.whole_prompts:
        _check_whole(limits, request)
    K, usable = limits.page_size, limits.num_pages - 1
    last = request.pooling is None  # the last token that is sampled needs no place in the cache
    needed = limits.pages_for(request.max_total_tokens - last)
    if needed <= usable and request.max_total_tokens <= limits.max_model_len:
        return
    longest = min(limits.tokens_in(usable) + last, limits.max_model_len)
    what, remedy, param = "", f"shorten the prompt to at most {longest:,} tokens", "prompt"
    if request.pooling is None:
        left = max(0, longest - len(request.prompt))
        what, remedy, param = " and the output", f"set max_tokens to at most {left:,}", "max_tokens"
    raise RequestError(
        f"the prompt's {len(request.prompt):,} tokens{what} need {needed:,} pages of {K} "
        f"tokens, the cache has {usable:,} and max_model_len is {limits.max_model_len:,}; {remedy}, or give the cache more "
        "memory.", param,
    )  # fmt: skip


def _check_whole(limits: Limits, request: Request) -> None:
    if request.pooling is None:
        raise RequestError("this model is not causal: it makes vectors of texts (embed, /v1/embeddings) and does not generate.")
    if len(request.prompt) > limits.max_num_batched_tokens:
        raise RequestError(f"the prompt has {len(request.prompt):,} tokens and must be computed in one step, of at most "
                           f"{limits.max_num_batched_tokens:,} tokens, as this model is not causal; shorten it or raise "
                           "max_num_batched_tokens.", "prompt")  # fmt: skip


def add(state: State, request: Request) -> State:
    """Puts a request into the queue."""
    check_fits(state.limits, request)
    return queue.push(state, Waiting(request, np.asarray(request.prompt, np.int32), False))


def abort(state: State, request_id: str) -> State:
    """Ends a request wherever it is; an unknown id changes nothing."""
    if request_id in state.waiting:
        return state._replace(waiting=state.waiting.delete(request_id))
    slot = state.slot_of.get(request_id)
    return state if slot is None else _end(state, slot)


def finish(state: State, slot: int, generation: int) -> State:
    """Ends the sequence of a slot, unless the slot has another one by now."""
    if not state.seats.active[slot] or state.seats.generation[slot] != generation:
        return state
    return _end(state, slot)


def reset_prefix_cache(state: State) -> State:
    """Nothing that was computed until now is shared with what comes."""
    seats = state.seats
    # Pages of running sequences stay unpublished from here on: their chain of keys is broken.
    closed = np.where(seats.active, np.iinfo(np.int32).max, seats.num_published)
    return state._replace(pool=pages.reset(state.pool), seats=seats._replace(num_published=closed.astype(np.int32)))


def fail(state: State, plan: Plan) -> tuple[State, list[str]]:
    """A step crashed: its sequences end and nothing that is cached is trusted any more. Returns their ids."""
    live = [int(s) for s, g in zip(plan.slots, plan.generations) if _is(state, s, g)]
    return _fail_slots(state, live)


def fail_running(state: State) -> tuple[State, list[str]]:
    """The cache is lost: every running sequence ends. Returns their ids."""
    return _fail_slots(state, np.flatnonzero(state.seats.active).tolist())


def _is(state: State, slot: int, generation: int) -> bool:
    return bool(state.seats.active[slot]) and state.seats.generation[slot] == generation


def _fail_slots(state: State, slots: list[int]) -> tuple[State, list[str]]:
    ids = [state.requests.read()[slot].id for slot in slots]
    state = reset_prefix_cache(state)
    for slot in slots:
        state = _end(state, slot)
    in_use = state.seats.adapter[state.seats.active]
    return state._replace(residents=residents.forget(state.residents, in_use)), ids


def _end(state: State, slot: int, trusted: bool = True) -> State:
    """Frees a slot and its pages. Its tail is published; if its content is not to be trusted, nothing of it stays, also of the
    pages that it has given back before."""
    seats, held = state.seats, held_by(state, slot)
    request = state.requests.read()[slot]
    if trusted:
        state = publish.tail(state, slot, int(min(seats.num_computed[slot], seats.num_known[slot])))
        pool = state.pool
    else:
        known = state.tokens.read()[slot, : seats.num_known[slot]]
        given_back = pages.filed(state.pool, known, request.salt, len(state.limits.reaches))
        pool = pages.forget(state.pool, list({*held.tolist(), *given_back}))
    changed = copied(seats, "active", "num_pages", "generation")
    changed.active[slot], changed.num_pages[slot] = False, 0
    changed.generation[slot] += 1
    return state._replace(pool=pages.release(pool, held), seats=changed, slot_of=state.slot_of.delete(request.id),
                          requests=state.requests.set(slot, None))  # fmt: skip


# -- a step ---------------------------------------------------------------------------------------------------------------


def schedule(state: State) -> tuple[State, Plan]:
    """Decides the next step. May be called again before the last plan is committed."""
    preempted, groups = [], len(state.limits.reaches)
    state = _drop_unseen(state)
    while True:
        slots, counts, budget = _shares(state)
        copying, need = _wants(state, slots, counts)
        if int(need.sum()) * groups + np.count_nonzero(copying) <= state.pool.num_free:
            break
        state, request_id = _preempt_newest(state)
        preempted.append(request_id)
    draft = Draft(slots, counts, budget, preempted)
    state = _copy_pages(state, slots[copying], draft)
    state = _advance(state, slots, counts, need)
    if not preempted:
        state = _admit(state, draft)
    if draft.borrowed:
        state = state._replace(pool=_release_each(state.pool, draft.borrowed))
    return _finish_plan(state, draft)


def _drop_unseen(state: State) -> State:
    """Gives back the pages that no token to come sees. (Steps in flight may still read them; who gets them writes later.)"""
    limits, seats, M = state.limits, state.seats, state.limits.max_pages_per_seq
    if all(reach.unlimited for reach in limits.reaches):
        return state
    unseen = [reach.first_seen(seats.num_computed) // limits.page_size for reach in limits.reaches]
    dropped = np.where(seats.active[:, None], np.stack(unseen, 1), 0).astype(np.int32)
    dropped = np.maximum(dropped, seats.dropped)
    pool, table = state.pool, state.page_table.read()
    for slot in np.flatnonzero((dropped > seats.dropped).any(1)).tolist():  # one by one: two slots may share a page
        ends = zip(seats.dropped[slot].tolist(), dropped[slot].tolist())
        pool = pages.release(pool, np.concatenate([table[slot, g * M + a : g * M + b] for g, (a, b) in enumerate(ends)]))
    return state._replace(pool=pool, seats=seats._replace(dropped=dropped))


def _release_each(pool: Pool, borrowed: list[int]) -> Pool:
    for page in borrowed:  # one by one: a page may have been borrowed twice
        pool = pages.release(pool, np.array([page], np.int32))
    return pool


def _shares(state: State) -> tuple[np.ndarray, np.ndarray, int]:
    """Running slots that lack tokens, oldest first, how many tokens each gets, and how many are left over."""
    s, limits = state.seats, state.limits
    ready = s.active & (s.num_computed < s.num_tokens) & (s.pooling | (s.num_tokens < s.max_total))
    ready &= ~s.lagging | (s.num_known == s.num_tokens)
    (slots,) = ready.nonzero()
    slots = slots[np.lexsort((s.arrival[slots], s.priority[slots]))]
    counts = s.num_tokens[slots] - s.num_computed[slots]
    if limits.pipeline > 1:  # the other decodes are left for the steps that follow: each stage has some of them at a time
        decodes = counts == 1  # chunks of a prompt are ready in every step: they come on top, or decodes would wait for good
        now = ~decodes | (np.cumsum(decodes) <= -(-np.count_nonzero(s.active) // limits.pipeline))
        slots, counts = slots[now], counts[now]
    if limits.long_prefill_token_threshold:
        counts = np.minimum(counts, limits.long_prefill_token_threshold)
    left = limits.max_num_batched_tokens - int(counts.sum())
    if left < 0:
        over = np.maximum(np.cumsum(counts) - limits.max_num_batched_tokens, 0)
        counts = np.maximum(counts - over, 0).astype(np.int32)
        slots, counts = slots[counts > 0], counts[counts > 0]
    return slots, counts, max(left, 0)


def _wants(state: State, slots: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each slot: does its next token go into a page that somebody else may read there? How many new pages does it need?"""
    s, pool, K = state.seats, state.pool, state.limits.page_size
    start = s.num_computed[slots].astype(np.int64)  # as an index, int32 takes three times as long
    at = start // K
    offset, page = start - at * K, state.page_table.read()[slots, at].astype(np.int64)
    shared = (pool.refs.read()[page] > 1) | (offset < pool.valid.read()[page])
    shared &= offset > 0  # never with several groups: they share whole pages only
    return shared, (start + counts + (K - 1)) // K - s.num_pages[slots]


def _copy_pages(state: State, slots: np.ndarray, draft: Draft) -> State:
    """Copy-on-write: a page of its own for the next token of each slot. They are known to be there."""
    if not len(slots):
        return state
    pool, fresh = pages.take(state.pool, len(slots))
    at = state.seats.num_computed[slots] // state.limits.page_size
    old = state.page_table.read()[slots, at].tolist()
    draft.copies += zip(old, fresh.tolist())
    draft.borrowed += old  # its reference, which ends with the plan
    return state._replace(pool=pool, page_table=state.page_table.set((slots, at), fresh))


def _advance(state: State, slots: np.ndarray, counts: np.ndarray, need: np.ndarray) -> State:
    """Gives slots the pages that they need, counts the tokens as computed and publishes what they fill."""
    seats = copied(state.seats, "num_computed", "num_pages")
    seats.num_computed[slots] += counts
    (growing,) = need.nonzero()
    if len(growing):
        to, more = slots[growing], need[growing]
        first = seats.num_pages[to]
        seats.num_pages[to] += more
        row, column = spread(first, first + more)
        groups = len(state.limits.reaches)
        pool, fresh = pages.take(state.pool, len(row) * groups)
        if groups > 1:
            row, column = np.tile(row, groups), _in_each_group(column, state.limits)
        state = state._replace(pool=pool, page_table=state.page_table.set((to[row], column), fresh))
    return publish.full_pages(state._replace(seats=seats), slots)


def _in_each_group(column: np.ndarray, limits: Limits) -> np.ndarray:
    """Columns of the page table: the same pages of the first group, of the second, ..."""
    return (np.arange(len(limits.reaches))[:, None] * limits.max_pages_per_seq + column).reshape(-1)


def _preempt_newest(state: State) -> tuple[State, str]:
    s = state.seats
    slots = np.flatnonzero(s.active)
    slot = int(slots[np.lexsort((s.arrival[slots], s.priority[slots]))[-1]])
    request = state.requests.read()[slot]
    tokens = np.array(state.tokens.read()[slot, : s.num_known[slot]])
    state = _end(state, slot)._replace(num_preemptions=state.num_preemptions + 1)
    return queue.push(state, Waiting(request, tokens, True)), request.id


# -- admission ------------------------------------------------------------------------------------------------------------


def _admit(state: State, draft: Draft) -> State:
    free, limits = np.flatnonzero(~state.seats.active).tolist(), state.limits
    added: list[tuple[int, int]] = []
    while free and draft.budget > 0:
        state, waiting = queue.peek(state)
        if waiting is None:
            break
        place = seating.place(state, waiting.request)
        found = seating.match(state, waiting)
        if limits.whole_prompts and draft.budget < len(waiting.tokens):
            break
        if place is None or not seating.has_room(state, waiting, found):
            break
        state = seating.lodge(state, free[0], place, waiting.request, draft)
        state, count = seating.seat(queue.pop(state, waiting), free[0], waiting, found, draft)
        added.append((free.pop(0), count))
    if added:
        draft.slots = np.concatenate([draft.slots, [slot for slot, _ in added]]).astype(np.int64)
        draft.counts = np.concatenate([draft.counts, [count for _, count in added]]).astype(np.int32)
    return state


def _finish_plan(state: State, draft: Draft) -> tuple[State, Plan]:
    """Batch order, and the tokens that the step will sample."""
    slots, counts = draft.slots, draft.counts
    num_decode = int(np.count_nonzero(counts == 1))
    if num_decode < len(slots):
        order = np.argsort(counts > 1, kind="stable")
        slots, counts = slots[order], counts[order]
    seats = state.seats
    ends, pooling = seats.num_computed[slots] == seats.num_tokens[slots], seats.pooling[slots]
    samples, pools = ends & ~pooling, ends & pooling
    requests = state.requests.read()
    plan = Plan(
        slots, seats.generation[slots], (seats.num_computed[slots] - counts).astype(np.int32), counts,
        samples, pools, num_decode, np.asarray(draft.copies, np.int32).reshape(-1, 2),
        tuple(requests[slots].tolist()), tuple(draft.admitted), tuple(draft.preempted), tuple(draft.loads),
    )  # fmt: skip
    seats = copied(seats, "num_tokens")
    seats.num_tokens[slots[samples]] += 1
    return state._replace(seats=seats), plan


# -- results --------------------------------------------------------------------------------------------------------------


def commit(state: State, plan: Plan, tokens: np.ndarray, finite: np.ndarray) -> tuple[State, Outputs]:
    """Takes in what a plan's step sampled (`tokens`, `finite` [R] in batch order, padded; of a row that pools, whether its
    vector is finite). Sequences that ended or were preempted meanwhile are passed over."""
    n, s = len(plan.slots), state.seats
    live = s.active[plan.slots] & (s.generation[plan.slots] == plan.generations)
    state = _publish_prompt_tails(state, plan, live)
    (rows,), (pooled,) = (live & plan.samples).nonzero(), (live & plan.pools).nonzero()
    slots, new = plan.slots[rows], tokens[:n][rows]
    at = (plan.start[rows] + plan.num_tokens[rows]).astype(np.int64)
    seats = copied(state.seats, "num_known")
    seats.num_known[slots] = at + 1
    state = state._replace(seats=seats, tokens=state.tokens.set((slots, at), new))
    state = publish.full_pages(state, slots)
    reasons = _reasons(state, slots, new, at + 1, finite[:n][rows])
    reasons += [FinishReason.STOP if ok else FinishReason.ERROR for ok in finite[pooled].tolist()]
    rows, new = np.concatenate([rows, pooled]), [*new.tolist(), *[NO_TOKEN] * len(pooled)]
    slots = plan.slots[rows]
    ids = [request.id for request in state.requests.read()[slots].tolist()]
    outputs = Outputs(ids, slots.tolist(), plan.generations[rows].tolist(), new, reasons, rows.tolist())
    for slot, reason in zip(outputs.slots, outputs.reasons) if any(outputs.reasons) else ():
        if reason is not None:
            state = _end(state, slot, trusted=reason is not FinishReason.ERROR)
    return state, outputs


def _publish_prompt_tails(state: State, plan: Plan, live: np.ndarray) -> State:
    """The partly filled last page of a prompt that this plan has computed to its end."""
    s, end = state.seats, plan.start + plan.num_tokens
    prompt = s.num_prompt[plan.slots]
    for row in np.flatnonzero(live & (plan.start < prompt) & (end >= prompt)).tolist():
        state = publish.tail(state, int(plan.slots[row]), int(min(end[row], s.num_known[plan.slots[row]])))
    return state


def _reasons(state: State, slots: np.ndarray, tokens: np.ndarray, totals: np.ndarray, finite: np.ndarray) -> list:
    """Why each sequence ends now, None if it goes on."""
    s = state.seats
    stops = s.stops.take(slots, axis=0)
    stopped = np.flatnonzero(stops == tokens[:, None]) // NUM_STOPS  # three times as fast as any(axis=1)
    ended, full = totals >= s.max_total[slots], stops[:, -1] != NO_TOKEN
    reasons: list[FinishReason | None] = [None] * len(slots)
    for i in {*stopped.tolist(), *np.flatnonzero(ended | full | ~finite).tolist()}:
        request: Any = state.requests.read()[slots[i]]
        if not finite[i]:
            reasons[i] = FinishReason.ERROR
        elif int(tokens[i]) in request.stop_ids:
            reasons[i] = FinishReason.STOP
        elif ended[i]:
            reasons[i] = FinishReason.LENGTH
    return reasons
