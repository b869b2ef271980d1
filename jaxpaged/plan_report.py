"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from jaxpaged import devices_compiler
from jaxpaged.memory import FILLED
from jaxpaged.plan import Plan
from jaxpaged.plan_times import Speed, Step, least_itl

NOT_CHECKED = ("Times are a roofline's and have not been checked on a GPU: expect less. Of each device is counted on: "
               "{memory:.0%} of its memory's bandwidth, {compute:.0%} of its FLOP/s, {link:.0%} of its link's.")  # fmt: skip


def text(plan: Plan) -> str:
    lines = [*_head(plan), *_memory(plan)]
    if plan.memory is None:
        return "\n".join([*lines, *_what_would_fit(plan)])
    lines += _compiled(plan)
    for step in plan.steps:
        lines += ["", *_step(step, len(plan.setting.stages))]
    return "\n".join([*lines, "", *_speeds(plan), "", "to serve it:", f"  {plan.command}"])


def _head(plan: Plan) -> Iterator[str]:
    s = plan.setting
    c, n = s.config, s.sizes
    shape = f"tensor {n.tensor} x pipeline {n.pipeline} x data {n.data}" + (", experts shared out" if n.experts else "")
    yield f"{c.model} on {n.devices} x {s.device.name} ({shape}): {len(s.decoder.layers)} layers, {c.dtype}"
    kept = sorted({form.kind for form in s.forms.values()})
    yield f"  weights {', '.join(kept) or c.dtype}, KV cache {s.cache_dtype}, max_model_len {c.max_model_len:,}, " \
          f"{c.max_num_seqs} sequences and {c.max_num_batched_tokens:,} tokens a step"  # fmt: skip


def _memory(plan: Plan) -> Iterator[str]:
    s, memory = plan.setting, plan.memory
    yield ""
    yield f"bytes on {'a' if s.sizes.devices > 1 else 'the'} device:"
    fullest = max(s.stages, key=s.weights)
    weights = s.weights(fullest) if memory is None else memory.weights
    temporaries = s.expected_temporaries if memory is None else memory.temporaries
    if plan.compiled is not None:
        temporaries = plan.compiled.temporaries
    yield f"  weights       {_gib(weights)}"
    yield f"  temporaries   {_gib(temporaries)}   ({'as compiled' if plan.compiled else 'estimated'})"
    cache = 0 if memory is None else memory.cache
    if memory is not None:
        yield f"  KV cache      {_gib(cache)}   {memory.num_pages:,} pages of {s.config.block_size} tokens, " \
              f"{memory.page_bytes / 2**10:,.0f} KiB each"  # fmt: skip
    reserve = s.device.memory - weights - temporaries - cache
    kept = f"what gpu_memory_utilization={s.config.gpu_memory_utilization} leaves, and {1 - FILLED:.0%} of what it gives"
    yield f"  reserve       {_gib(reserve)}   ({kept})" if reserve > 0 else f"  too much by   {_gib(-reserve)}"
    yield f"  the device's  {_gib(s.device.memory)}"
    if memory is not None:
        sequences = (memory.num_pages - 1) / memory.per_sequence
        yield f"  room for {sequences:,.1f} sequences of {s.config.max_model_len:,} tokens" + (
            f" in each of {s.sizes.data} engines" if s.sizes.data > 1 else "")  # fmt: skip


def _gib(size: float) -> str:
    return f"{size / 2**30:>9,.2f} GiB"


def _what_would_fit(plan: Plan) -> Iterator[str]:
    yield ""
    yield f"It does not fit: {plan.why}"
    if not plan.advice:
        yield "  Nothing that was tried fits (more devices, smaller weights and caches, shorter sequences)."
        return
    yield "What would, each tried:"
    for one in plan.advice:
        yield f"  {one.flags:<60} room for {one.sequences:,.1f} sequences of max_model_len tokens"


def _compiled(plan: Plan) -> Iterator[str]:
    yield ""
    if plan.compiled is None:
        yield f"not compiled: {plan.not_compiled}; what is above is arithmetic."
        if devices_compiler.missing():
            yield f"  To have the step compiled for this device: {devices_compiler.install()}"
        return
    c = plan.compiled
    n, whole = plan.setting.sizes.tensor * plan.setting.sizes.pipeline, len(plan.setting.decoder.layers)
    some = f" with {' and '.join(map(str, c.layers))} layers, collectives extrapolated to {whole}"
    how = "" if c.layers == (whole,) else some
    yield f"compiled for {n} x {plan.setting.device.name}{how}, in {c.seconds:.0f} s: the cache is " + (
        "updated in place" if c.aliased == c.donated else f"COPIED ({c.donated - c.aliased:,} bytes)")  # fmt: skip
    for program, kinds in c.collectives.items():
        listed = ", ".join(f"{count} {kind} ({size / 1e6:,.1f} MB)" for kind, (count, size) in kinds.items())
        yield f"  {program}: {listed}"


def _step(step: Step, stages: int) -> Iterator[str]:
    devices = "on each device" if stages == 1 else f"on {stages} devices, a stage each"
    yield f"a step of {step.what}: {step.seconds * 1e3:.2f} ms, bound by {step.bound}"
    yield f"  {devices:<30}{'GFLOP':>12}{'MB':>12}{'MB sent':>10}{'ms':>10}  bound"
    for work, seconds, bound in step.lines:
        name = work.name + (f" ({work.messages})" if work.messages else "")
        yield f"  {name:<30}{work.flops / 1e9:>12,.1f}{work.bytes / 1e6:>12,.1f}{work.sent / 1e6:>10,.1f}" \
              f"{seconds * 1e3:>10.3f}  {bound}"  # fmt: skip
    works = [line.work for line in step.lines]
    flops, moved, sent = (sum(getattr(w, name) for w in works) for name in ("flops", "bytes", "sent"))
    yield f"  {'in all':<30}{flops / 1e9:>12,.1f}{moved / 1e6:>12,.1f}{sent / 1e6:>10,.1f}{step.seconds * 1e3:>10.3f}"


def _speeds(plan: Plan) -> Iterator[str]:
    s = plan.setting
    d, many = s.device, s.sizes.data > 1
    yield NOT_CHECKED.format(memory=d.memory_efficiency, compute=d.compute_efficiency, link=d.link_efficiency)
    yield f"No token comes sooner than {least_itl(s) * 1e3:.2f} ms after another: a step reads the weights that it takes."
    yield f"`batch` prompts come together{' to each engine' if many else ''}, then each gets its output:"
    yield f"  {'prompt':>8}{'batch':>7}{'TTFT first':>13}{'last':>12}  {'bound':<9}{'ITL':>10}  {'bound':<9}" \
          f"{'output tok/s':>13}{'prompt tok/s':>14}"  # fmt: skip
    for one in plan.speeds:
        yield _speed(one)


def _speed(one: Speed) -> str:
    ms = lambda seconds, width: f"{seconds * 1e3:>{width},.1f} ms"
    return (f"  {one.prompt:>8,}{one.batch:>7}{ms(one.ttft_first, 10)}{ms(one.ttft_last, 9)}  {one.prefill_bound:<9}"
            f"{one.itl * 1e3:>7.2f} ms  {one.decode_bound:<9}{one.tokens_per_s:>13,.0f}{one.prompt_tokens_per_s:>14,.0f}"
            f"{'' if one.has_room else '   (no room: the rest waits)'}")  # fmt: skip
