"""How fast a model on devices should be: steps, time to the first token and between tokens, by `cost`'s roofline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxpaged.batch import Bucket
from jaxpaged.cost import Rows, Times, Work, chunk, host_seconds, repeated, split_sums, total
from jaxpaged.memory import MemoryPlan
from jaxpaged.plan_model import Setting


class Line(NamedTuple):
    """A part of a step, on a device of each pipeline stage."""

    work: Work
    seconds: float
    bound: str


class Step(NamedTuple):
    """rows: of the step. lines: what its time is spent on, over all stages."""

    what: str
    tokens: int
    rows: int
    lines: tuple[Line, ...]
    seconds: float
    bound: str


class Speed(NamedTuple):
    """`batch` prompts of `prompt` tokens that come together to an idle engine, then their outputs. ttft: seconds until the
    first and the last of them has its first token. itl: seconds between tokens once all are there; tokens_per_s: of all
    engines."""

    prompt: int
    batch: int
    has_room: bool
    ttft_first: float
    ttft_last: float
    prefill_bound: str
    itl: float
    decode_bound: str
    tokens_per_s: float
    prompt_tokens_per_s: float


def bucket_of(setting: Setting, tokens: int, rows: int) -> Bucket:
    return next(b for b in setting.buckets if b.num_tokens >= tokens and b.num_rows >= rows)


def step(setting: Setting, what: str, rows: Rows) -> Step:
    """Of a step with these rows, line by line."""
    tokens, count = int(rows.count.sum()), len(rows.count)
    bucket = bucket_of(setting, tokens, count)
    works = [work for stage in setting.stages for work in stage.works(bucket, rows)]
    works += [stage.handover(bucket.num_tokens) for stage in setting.stages[:-1]]
    lines = []
    for name, whole in split_sums(works):
        spent = total((w for w in works if w.name == name), setting.device, setting.config.dtype)
        lines.append(Line(whole, spent.total, spent.bound))
    found = total(works, setting.device, setting.config.dtype)
    return Step(what, tokens, count, tuple(lines), found.total, found.bound)


def typical_steps(setting: Setting, batch: int, context: int) -> list[Step]:
    """One of `batch` decodes (of a part of them, where each pipeline stage has another part), and one that computes a prompt as
    far as the budget goes."""
    batch = -(-max(1, batch) // len(setting.stages))
    most = min(int(setting.config.max_num_batched_tokens), int(setting.config.max_model_len or 0))
    return [step(setting, f"{batch} decodes after {context:,} tokens each", repeated(context, batch)),
            step(setting, f"the first {most:,} tokens of a prompt", chunk(0, most))]  # fmt: skip


def itl(setting: Setting, batch: int, context: int) -> tuple[float, str]:
    """Seconds from one token of a sequence to its next, and what bounds them. With pipeline stages the batch is in as many
    parts, each on another stage."""
    parts = min(len(setting.stages), batch)
    rows = -(-batch // parts)
    of_stages = setting.cost.of_stages(bucket_of(setting, rows, rows), repeated(context, rows))
    slowest = max(of_stages, key=lambda t: t.total)
    seconds = max(sum(t.total for t in of_stages), parts * slowest.total)
    host = parts * host_seconds(rows)
    return (host, "host") if host > seconds else (seconds, slowest.bound)


def prompt_steps(batch: int, prompt: int, budget: int) -> Iterator[tuple[Rows, int]]:
    """The steps that compute `batch` prompts, as the scheduler makes them: decodes first, then prompts in their order; and how
    many prompts are done after each."""
    computed = np.zeros(batch, np.int64)
    while (computed < prompt).any():
        decodes = np.flatnonzero(computed >= prompt)
        lacking = np.flatnonzero(computed < prompt)
        ends = np.cumsum(prompt - computed[lacking])
        over = np.maximum(ends - (budget - len(decodes)), 0)
        counts = np.maximum(prompt - computed[lacking] - over, 0)
        lacking, counts = lacking[counts > 0], counts[counts > 0]
        order = np.argsort(counts > 1, kind="stable")
        lacking, counts = lacking[order], counts[order]
        yield (Rows(np.concatenate([computed[decodes], computed[lacking]]),
                    np.concatenate([np.ones(len(decodes), np.int64), counts])),
               int((computed[lacking] + counts >= prompt).sum()) + len(decodes))  # fmt: skip
        computed[decodes] += 1
        computed[lacking] += counts


def ttft(setting: Setting, batch: int, prompt: int) -> tuple[float, float, str]:
    """Seconds until the first and the last of the prompts has its first token, and what bounds them. A chunk is in the next
    stage while another is in this one."""
    now, first, spent = 0.0, 0.0, Times()
    for rows, done in prompt_steps(batch, prompt, int(setting.config.max_num_batched_tokens)):
        bucket = bucket_of(setting, int(rows.count.sum()), len(rows.count))
        of_stages = setting.cost.of_stages(bucket, rows)
        slowest = max(of_stages, key=lambda t: t.total)
        now, spent = now + max(slowest.total, host_seconds(len(rows.count))), spent.plus(slowest)
        behind = sum(t.total for t in of_stages) - slowest.total
        first = first or (now + behind if done else 0.0)
    return first, now + behind, spent.bound  # pyright: ignore[reportPossiblyUnboundVariable]  # there is a step


def room(setting: Setting, plan: MemoryPlan, tokens: int) -> int:
    """Sequences of so many tokens that run at once in an engine."""
    most = min(tokens, int(setting.config.max_model_len or 0))
    return min((plan.num_pages - 1) // setting.limits().pages_for(most), int(setting.config.max_num_seqs))


def speed(setting: Setting, plan: MemoryPlan, batch: int, prompt: int) -> Speed:
    first, last, prefill_bound = ttft(setting, batch, prompt)
    seconds, decode_bound = itl(setting, batch, prompt)
    engines = setting.sizes.data
    return Speed(prompt, batch, batch <= room(setting, plan, prompt + 1), first, last, prefill_bound, seconds, decode_bound,
                 batch * engines / seconds, batch * prompt * engines / last)  # fmt: skip


def speeds(setting: Setting, plan: MemoryPlan, batches: Sequence[int | None], prompts: Sequence[int]) -> list[Speed]:
    """Of each batch size, None: as many as have room, and each prompt length that max_model_len allows."""
    most, seqs = int(setting.config.max_model_len or 0), int(setting.config.max_num_seqs)
    found = []
    for prompt in dict.fromkeys(max(1, min(p, most - 1)) for p in prompts):
        sizes = [max(1, room(setting, plan, prompt + 1)) if b is None else min(b, seqs) for b in batches]
        found += [speed(setting, plan, batch, prompt) for batch in sorted(set(sizes))]
    return found


def least_itl(setting: Setting) -> float:
    """What no step is faster than: one token's products read their weights once."""
    products = [work for stage in setting.stages for work in stage.products(1) + stage.head(1)]
    return sum(work.bytes for work in products) / setting.device.stream
