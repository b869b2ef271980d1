"""What a step costs each device: its work, and the time that a roofline gives it.

A step is a list of `Work`: everything that is done alike, over all layers of a pipeline stage. Each takes as long as its
multiplications or its memory traffic take, whichever is longer; then what goes over the link, and the gaps between kernels.
Nothing overlaps. Configs are those of one device (`sharding.Sharding.local`).

Dims: T tokens in the step, R rows, E embed, H query heads, G KV heads, D head dim, F ffn, X experts, V vocab, N devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from jaxpaged.cost_weights import BYTES, Matrix, cached_bytes, held, matrices, matrix_bytes
from jaxpaged.devices import Device
from jaxpaged.models.quantized import NO_FORMS, Form, Forms
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, MLASpec, MoESpec
from jaxpaged.programs import SEQUENCE_TOKENS
from jaxpaged.reach import Reach
from jaxpaged.sharding import Sharding, stages

# -- work --------------------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What is done alike, over all layers of a stage, on one device. sent: bytes that a device sends, in `messages`
    collectives whose operands have `payload` bytes."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0
    payload: float = 0.0
    messages: int = 0
    kernels: int = 0

    def plus(self, other: Work) -> Work:
        return Work(self.name, self.flops + other.flops, self.bytes + other.bytes, self.sent + other.sent,
                    self.payload + other.payload, self.messages + other.messages, self.kernels + other.kernels)  # fmt: skip


class Times(NamedTuple):
    """Seconds, by what they are spent on."""

    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    gaps: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.memory + self.network + self.gaps

    @property
    def bound(self) -> str:
        return max(zip(self, self._fields))[1]

    def plus(self, other: Times) -> Times:
        return Times(*(a + b for a, b in zip(self, other)))


def times(work: Work, device: Device, dtype: str) -> Times:
    """The roofline: a piece of work takes as long as its slower half."""
    compute, memory = work.flops / device.flops(dtype), work.bytes / device.stream
    network = work.sent / device.send + work.messages * device.link_latency
    gaps = work.kernels * device.kernel_seconds
    return Times(compute, 0.0, network, gaps) if compute > memory else Times(0.0, memory, network, gaps)


def total(works: Iterable[Work], device: Device, dtype: str) -> Times:
    found = Times()
    for work in works:
        found = found.plus(times(work, device, dtype))
    return found


def touched(num_experts: float, choices: float, top_k: int, tokens: int) -> float:
    """Of `num_experts` experts, how many some token takes, where each takes `top_k` of `choices` alike."""
    return num_experts * (1 - (1 - top_k / choices) ** tokens)


class Rows(NamedTuple):
    """The rows of a step: where each begins in its sequence, and its tokens, numpy int [n]; decodes (one token) first."""

    start: np.ndarray
    count: np.ndarray


def _triangle(x: np.ndarray, reach: Reach) -> np.ndarray:
    """How many keys the tokens at positions below x see together."""
    if reach.window is not None:
        short = np.minimum(x, reach.window)
        return short * (short + 1) / 2 + (x - short) * float(reach.window)
    if reach.chunk is not None:
        rest = x % reach.chunk
        return (x // reach.chunk) * (reach.chunk * (reach.chunk + 1) / 2) + rest * (rest + 1) / 2
    return x * (x + 1.0) / 2


@dataclass(frozen=True)
class StageCost:
    """The part of a step that one device does: some layers of a local config.

    size: devices that share each layer. first, last: it has the embedding, the head. cache_dtype: of keys and values."""

    config: DecoderConfig
    layers: range
    dtype: str
    cache_dtype: str
    size: int = 1
    forms: Forms = field(default_factory=dict)

    @property
    def first(self) -> bool:
        return self.layers.start == 0

    @property
    def last(self) -> bool:
        return self.layers.stop == len(self.config.layers)

    @cached_property
    def _products(self) -> Counter[tuple[Matrix, Form | None, MoESpec | None]]:
        """Products that are alike, and how many layers have them."""
        found: Counter[tuple[Matrix, Form | None, MoESpec | None]] = Counter()
        for i in self.layers:
            spec = self.config.layers[i]
            for m in matrices(self.config, spec):
                experts = spec.mlp if m.path in ("mlp.gate_up", "mlp.down") and isinstance(spec.mlp, MoESpec) else None
                found[m, self.forms.get(f"layers.{i}.{m.path}"), experts] += 1
        return found

    @cached_property
    def _attentions(self) -> Counter[tuple[AttentionSpec | MLASpec, Reach]]:
        specs = [self.config.layers[i] for i in self.layers]
        return Counter((spec.attention, Reach(spec.window, spec.chunk)) for spec in specs)

    # -- of tokens ---------------------------------------------------------------------------------------------------------

    def dense(self, tokens: int, rows: int) -> list[Work]:
        """What depends on the step's bucket alone: T tokens, R rows, padding included."""
        embedding = [self._embedding(tokens)] if self.first else []
        rest = [self._elementwise(tokens), *embedding, *self.head(rows), *self.collectives(tokens, rows)]
        return [*self.products(tokens), *rest]

    def products(self, tokens: int) -> list[Work]:
        return [self._product(tokens, *key, count) for key, count in self._products.items()]

    def _product(self, T: int, m: Matrix, form: Form | None, experts: MoESpec | None, layers: int) -> Work:
        size, rows = BYTES[self.dtype], T
        weights, name = float(matrix_bytes(m, form, size)), m.path
        if experts is not None:
            rows, name = T * experts.top_k * held(experts) / experts.num_experts, name.replace("mlp", "experts")
            weights = self._expert_bytes(m, form, experts, T)
        elif form is not None and (form.kind == "mxfp4" or (form.kind == "fp8" and form.group)):
            weights += 2.0 * m.numbers * size  # made into floats first: written, and read again
        moved = weights + rows * (m.n_in + m.n_out) * size
        return Work(name, 2.0 * rows * m.n_out * m.n_in * layers, moved * layers, kernels=layers)

    def _expert_bytes(self, m: Matrix, form: Form | None, experts: MoESpec, T: int) -> float:
        """Weights that are read: of the experts that some token takes; small numbers are made into floats first, all of
        them, or those of each row where there are fewer rows than experts."""
        whole, size = matrix_bytes(m, form, BYTES[self.dtype]), BYTES[self.dtype]
        if form is None:
            return whole * touched(1.0, experts.num_experts, experts.top_k, T)
        return (whole + 2.0 * m.numbers * size) * min(1.0, T * experts.top_k / experts.num_experts)

    def _elementwise(self, T: int) -> Work:
        """Norms, sums, rotations, activations: what each reads and writes, about. Kernels: of a layer, ten beside products."""
        numbers = 0.0
        for i in self.layers:
            spec = self.config.layers[i]
            s, mlp = spec.attention, spec.mlp
            heads, key, value = s.cached
            wide = s.num_heads * (key + (value or key)) + heads * (key + value)
            if isinstance(mlp, MoESpec):
                inner = mlp.top_k * held(mlp) / mlp.num_experts * (3 * mlp.ffn_dim + 4 * self.config.embed_dim)
                inner += 3 * mlp.shared.ffn_dim if mlp.shared else 0
            else:
                inner = 3 * mlp.ffn_dim
            numbers += 10 * self.config.embed_dim / (self.size if self.sequence(T) else 1) + 2 * wide + inner
        return Work("norms, rotations, activations", 0.0, T * numbers * BYTES[self.dtype], kernels=10 * len(self.layers))

    def _embedding(self, T: int) -> Work:
        return Work("embedding", 0.0, 2.0 * T * self.config.embed_dim * BYTES[self.dtype], kernels=1)

    def head(self, R: int) -> list[Work]:
        """On the last stage. The sampler reads the logits four times, about: NaN checks, top-k, top-p, the draw."""
        if not self.last:
            return []
        E, V, size = self.config.embed_dim, self.config.vocab_size, BYTES[self.dtype]
        logits = R * V * 4.0
        return [Work("head", 2.0 * R * V * E, V * E * size + R * E * size + logits, kernels=1),
                Work("sampler", 0.0, 4 * logits, kernels=10)]  # fmt: skip

    def sequence(self, tokens: int) -> bool:
        """Between layers each device has some of the tokens only."""
        return self.size > 1 and tokens >= SEQUENCE_TOKENS and tokens % self.size == 0

    def collectives(self, T: int, R: int) -> list[Work]:
        """What a layer's halves give is summed over devices; where they share out tokens between them, to each its own, and
        brought together again before the next half. Then each device gets all words of its rows. A ring sends (N - 1) / N of
        what is shared out or brought together; a sum is both."""
        if self.size == 1:
            return []
        N, payload, L = self.size, float(T * self.config.embed_dim * BYTES[self.dtype]), len(self.layers)
        sums = (1 if self.config.block.startswith("parallel") else 2) * L + self.first
        gathers = (1 if self.config.block == "parallel" else 2) * L + self.last
        of = lambda name, count, times: Work(name, sent=times * count * payload * (N - 1) / N, payload=count * payload,
                                             messages=count)  # fmt: skip
        if self.sequence(T):
            found = [of("reduce-scatter", sums, 1), of("all-gather", gathers, 1)]
        else:
            found = [of("all-reduce", sums, 2)]
        if self.last:
            logits = R * self.config.vocab_size * 4.0
            found.append(Work("all-to-all of logits", sent=logits * (N - 1) / N, payload=logits, messages=2))
        return found

    def handover(self, T: int) -> Work:
        """Of hidden states, to the next stage."""
        payload = float(T * self.config.embed_dim * BYTES[self.dtype]) / (self.size if self.sequence(T) else 1)
        return Work("handover", sent=payload, payload=payload, messages=1)

    # -- of rows -----------------------------------------------------------------------------------------------------------

    def attention(self, rows: Rows) -> list[Work]:
        """Decodes and chunks are a kernel each: of scores and of what they weigh, 2 (D_key + D_value) FLOPs a pair and head."""
        decodes = int(np.count_nonzero(rows.count == 1))
        parts = {"decode": Rows(rows.start[:decodes], rows.count[:decodes]),
                 "prefill": Rows(rows.start[decodes:], rows.count[decodes:])}  # fmt: skip
        return [self._attend(name, part, spec, reach, layers) for (spec, reach), layers in self._attentions.items()
                for name, part in parts.items() if len(part.start)]  # fmt: skip

    def _attend(self, name: str, rows: Rows, spec: AttentionSpec | MLASpec, reach: Reach, layers: int) -> Work:
        end = rows.start + rows.count
        pairs = float((_triangle(end, reach) - _triangle(rows.start, reach)).sum())
        tokens, seen = int(rows.count.sum()), float((end - reach.first_seen(rows.start)).sum())
        _, key, value = spec.cached
        numbers = spec.num_heads * (key + (value or spec.kv_rank if isinstance(spec, MLASpec) else value))
        moved = (seen + tokens) * cached_bytes(spec, self.cache_dtype) + 2.0 * tokens * numbers * BYTES[self.dtype]
        return Work(f"attention, {name}", 2.0 * pairs * numbers * layers, moved * layers, kernels=2 * layers)

    def works(self, bucket: tuple[int, int], rows: Rows) -> list[Work]:
        """All of a step."""
        return [*self.dense(*bucket), *self.attention(rows)]


# -- a whole step ------------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """How many devices, and what they share: see `EngineConfig`."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    experts: bool = False

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.data


def make_stages(config: DecoderConfig, sizes: Sizes, dtype: str, cache_dtype: str, forms: Forms = NO_FORMS) -> list[StageCost]:
    """config: the whole model's."""
    local = Sharding(config, sizes.tensor, sizes.experts).local
    return [StageCost(local, layers, dtype, cache_dtype, sizes.tensor, forms) for layers in
            stages(len(config.layers), sizes.pipeline)]  # fmt: skip


class StepCost:
    """Seconds of steps, quickly: what depends on the bucket alone is worked out once."""

    def __init__(self, stages: list[StageCost], device: Device):
        self.stages, self.device = stages, device
        self.dtype = stages[0].dtype
        self._dense = lru_cache(maxsize=None)(self._dense_times)

    def _dense_times(self, stage: int, tokens: int, rows: int) -> Times:
        works = self.stages[stage].dense(tokens, rows)
        if stage + 1 < len(self.stages):
            works = [*works, self.stages[stage].handover(tokens)]
        return total(works, self.device, self.dtype)

    def of_stages(self, bucket: tuple[int, int], rows: Rows) -> list[Times]:
        """Of each pipeline stage."""
        attention = [total(stage.attention(rows), self.device, self.dtype) for stage in self.stages]
        return [self._dense(i, *bucket).plus(attended) for i, attended in enumerate(attention)]

    def step(self, bucket: tuple[int, int], rows: Rows) -> Times:
        """From the first stage's beginning to the last one's end."""
        found = Times()
        for one in self.of_stages(bucket, rows):
            found = found.plus(one)
        return found


def repeated(context: int, count: int) -> Rows:
    """`count` decodes, each after `context` tokens."""
    return Rows(np.full(count, context, np.int64), np.ones(count, np.int64))


def chunk(start: int, count: int) -> Rows:
    return Rows(np.array([start], np.int64), np.array([count], np.int64))


def split_sums(works: Iterable[Work]) -> Iterator[tuple[str, Work]]:
    """Works of one name together, in order."""
    found: dict[str, Work] = {}
    for work in works:
        old = found.get(work.name)
        found[work.name] = work if old is None else old.plus(work)
    yield from found.items()


def host_seconds(rows: int) -> float:
    """What the host takes for a step, while the device computes another one: scheduling, building the batch, tokens out.
    Measured on a CPU (docs/performance.md): 769 us with 256 rows, of which 250 are the scheduler's (169 with 16)."""
    return 300e-6 + 2e-6 * rows
