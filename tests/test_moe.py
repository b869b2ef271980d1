"""Mixtures of experts, against an oracle in float64 that takes one token after the other and one expert after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from jaxpaged.hf_config import HFConfig
from jaxpaged.models import door
from jaxpaged.models.decoder import WholeSequence
from jaxpaged.models.moe import MoE
from jaxpaged.models.spec import DecoderConfig, Groups, MLPSpec, MoESpec

E, F, X, T = 16, 12, 8, 70  # embed, ffn, experts, tokens
WHOLE = WholeSequence(DecoderConfig(vocab_size=1, embed_dim=E, layers=(), max_positions=1))
BASE = MoESpec(num_experts=X, top_k=3, ffn_dim=F)
SPARSEMIXER = MoESpec(num_experts=X, top_k=2, ffn_dim=F, router="sparsemixer", jitter=0.2)
SIGMOID = dataclasses.replace(BASE, router="sigmoid", correction=True)
SHARED = MLPSpec(ffn_dim=20)
SPECS = {
    "softmax": BASE,
    "softmax, one of them": dataclasses.replace(BASE, top_k=1),
    "softmax, all of them": dataclasses.replace(BASE, top_k=X),
    "softmax, normalised": dataclasses.replace(BASE, normalise=True, scale=2.5),
    "softmax, groups by the best": dataclasses.replace(BASE, groups=Groups(4, 2)),
    "softmax_top": dataclasses.replace(BASE, router="softmax_top"),
    "softmax_top, biases": dataclasses.replace(BASE, router="softmax_top", router_bias=True, bias=True),
    "sigmoid": dataclasses.replace(BASE, router="sigmoid"),
    "sigmoid, correction": SIGMOID,
    "sigmoid, correction, groups": dataclasses.replace(SIGMOID, groups=Groups(4, 2, by_two=True), normalise=True, scale=1.8),
    "sparsemixer": SPARSEMIXER,
    "sparsemixer, only the best is near": dataclasses.replace(SPARSEMIXER, jitter=0.0),
    "weigh_input": dataclasses.replace(BASE, router="sigmoid", top_k=1, weigh_input=True, shared=SHARED),
    "weigh_input, two": dataclasses.replace(BASE, top_k=2, weigh_input=True, bias=True),
    "shared": dataclasses.replace(BASE, shared=SHARED),
    "shared, gated": dataclasses.replace(BASE, shared=SHARED, shared_gate=True),
    "clamped swiglu": dataclasses.replace(BASE, activation="clamped_swiglu", bias=True),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


class Engine(WholeSequence):
    """The products that the engine takes on a CPU."""

    def grouped_matmul(self, x, w, group_sizes):
        return pallas_kernels.grouped_matmul(x, w, group_sizes, implementation="reference")


ENGINE = Engine(WHOLE.config)
each_step = pytest.mark.parametrize("step", [WHOLE, ENGINE], ids=["whole sequences", "engine"])


def random_moe(spec: MoESpec, dtype=jnp.float32, seed: int = 0) -> MoE:
    """Biases and corrections are not 0, and no expert is much like another."""
    moe, rng = MoE(E, spec, jnp.dtype(dtype), nnx.Rngs(seed)), np.random.default_rng(seed)
    state = nnx.state(moe, nnx.Param)
    noise = lambda x: jnp.asarray(rng.standard_normal(x.shape) * (0.3 if x.ndim < 2 else x.shape[-1] ** -0.5), x.dtype)
    nnx.update(moe, jax.tree.map(noise, state))
    return moe


def tokens(num: int = T, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((E, num)).astype(np.float32)


def run(moe: MoE, x, step=ENGINE) -> np.ndarray:
    graph, state = nnx.split(moe)
    return np.asarray(jax.jit(lambda state, x: nnx.merge(graph, state)(x, step))(state, jnp.asarray(x)))


# -- the oracle --------------------------------------------------------------------------------------------------------


def softmax(logits) -> np.ndarray:
    p = np.exp(logits - np.max(logits))
    return p / p.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def sparsemixed(logits: np.ndarray, spec: MoESpec) -> list[tuple[int, float]]:
    found, left = [], list(range(len(logits)))
    for _ in range(2):
        best = max(left, key=lambda e: logits[e])
        near = [e for e in left if (logits[best] - logits[e]) / max(abs(logits[e]), logits[best]) <= 2 * spec.jitter]
        found.append((best, softmax(logits[near])[near.index(best)]))
        left.remove(best)
    return found


def allowed(wanted: np.ndarray, groups: Groups | None) -> list[int]:
    """The experts of the best groups."""
    if groups is None:
        return list(range(len(wanted)))
    members = np.arange(len(wanted)).reshape(groups.num, -1).tolist()
    value = lambda group: sum(sorted(wanted[group])[-2:]) if groups.by_two else max(wanted[group])
    return sum(sorted(members, key=value)[-groups.top :], [])


def choices(logits: np.ndarray, spec: MoESpec, correction: np.ndarray | None) -> list[tuple[int, float]]:
    """(expert, weight) of one token."""
    if spec.router == "sparsemixer":
        found = sparsemixed(logits, spec)
    else:
        scores = sigmoid(logits) if spec.router == "sigmoid" else softmax(logits)
        wanted = scores if correction is None else scores + correction
        experts = sorted(allowed(wanted, spec.groups), key=lambda e: -wanted[e])[: spec.top_k]
        weights = softmax(logits[experts]) if spec.router == "softmax_top" else scores[experts]
        found = list(zip(experts, weights))
    total = sum(weight for _, weight in found) if spec.normalise else 1.0
    return [(expert, weight / total * spec.scale) for expert, weight in found]


def gated(x: np.ndarray, activation: str) -> np.ndarray:
    gate, up = np.split(x, 2)
    if activation == "silu":
        return gate * sigmoid(gate) * up
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return (up + 1) * gate * sigmoid(1.702 * gate)


def oracle(moe: MoE, x: np.ndarray) -> np.ndarray:
    """x [E, T] -> [E, T]."""
    spec, x = moe.spec, x.astype(np.float64)
    value = lambda leaf: None if leaf is None else np.asarray(leaf[...]).astype(np.float64)
    plus = lambda y, leaf, *at: y if leaf is None else y + value(leaf)[at]
    gate_up, down, router, correction = (value(w) for w in (
        moe.gate_up.weight, moe.down.weight, moe.router.weight, moe.correction))  # fmt: skip
    out = np.zeros_like(x)
    for t, token in enumerate(x.T):
        logits = plus(router @ token, moe.router.bias)
        for e, weight in choices(logits, spec, correction):
            before, after = (weight, 1.0) if spec.weigh_input else (1.0, weight)
            h = gated(plus(gate_up[e] @ (before * token), moe.gate_up.bias, e), spec.activation)
            out[:, t] += after * plus(down[e] @ h, moe.down.bias, e)
        if moe.shared is not None:
            h = gated(value(moe.shared.gate_up.weight) @ token, spec.shared.activation)
            share = 1.0 if moe.shared_gate is None else sigmoid(value(moe.shared_gate.weight) @ token)
            out[:, t] += share * (value(moe.shared.down.weight) @ h)
    return out


def check(found: np.ndarray, wanted: np.ndarray) -> None:
    """Each token's vector, to 1e-5 of its length."""
    assert (np.linalg.norm(found - wanted, axis=0) <= 1e-5 * np.linalg.norm(wanted, axis=0)).all()


# -- what it computes --------------------------------------------------------------------------------------------------


@each_step
@each_spec
def test_each_token_gets_what_its_experts_say(spec, step):
    moe, x = random_moe(spec), tokens()
    check(run(moe, x, step), oracle(moe, x))


@each_step
@pytest.mark.parametrize("num", [1, 2, 33])
def test_any_number_of_tokens(num, step):
    moe, x = random_moe(BASE), tokens(num)
    check(run(moe, x, step), oracle(moe, x))


@each_step
@pytest.mark.parametrize("favourite", [0, 5, X - 1])
def test_no_token_is_dropped_if_all_want_one_expert(favourite, step):
    moe = random_moe(dataclasses.replace(BASE, top_k=1, router_bias=True))
    moe.router.bias[...] = moe.router.bias[...].at[favourite].set(100.0)
    x = tokens()
    assert {expert for expert, *_ in np.asarray(moe.route(jnp.asarray(x))[1]).tolist()} == {favourite}
    check(run(moe, x, step), oracle(moe, x))


def test_the_correction_chooses_but_does_not_weigh():
    moe, x = random_moe(SIGMOID), tokens()
    moe.correction[...] = jnp.zeros(X).at[6].set(100.0)
    weights, experts = moe.route(jnp.asarray(x))
    assert (np.asarray(experts)[:, 0] == 6).all()
    logits = np.asarray(moe.router.weight[...])[6].astype(np.float64) @ x
    np.testing.assert_allclose(np.asarray(weights)[:, 0], sigmoid(logits), rtol=1e-5)


def test_the_router_decides_in_float32():
    """With weights and tokens in bfloat16 it finds what their exact products say: logits in bfloat16 would often tie."""
    moe, x = random_moe(BASE, jnp.bfloat16), jnp.asarray(tokens(500), jnp.bfloat16)
    weights, experts = moe.route(x)
    assert weights.dtype == jnp.float32
    logits = np.asarray(moe.router.weight[...]).astype(np.float64) @ np.asarray(x).astype(np.float64)
    wanted = [choices(column, BASE, None) for column in logits.T]
    assert np.asarray(experts).tolist() == [[expert for expert, _ in row] for row in wanted]
    np.testing.assert_allclose(np.asarray(weights), [[weight for _, weight in row] for row in wanted], rtol=1e-5)


def moved(state, path, by):
    """The parameter at `path`, and no other, plus `by`."""
    return jax.tree.map_with_path(lambda at, leaf: leaf + by if at == path else leaf, state)


@each_step
def test_gradients_are_the_slopes(step):
    """Of every parameter, the router's too: along one direction in float32."""
    moe, x = random_moe(dataclasses.replace(BASE, router_bias=True, bias=True, shared=SHARED, shared_gate=True)), tokens(9)
    graph, state = nnx.split(moe)
    loss = jax.jit(lambda state: jnp.sum(jnp.sin(nnx.merge(graph, state)(jnp.asarray(x), step))))
    rng, grad = np.random.default_rng(3), jax.grad(loss)(state)
    for path, slope in jax.tree.leaves_with_path(grad):
        direction = jnp.asarray(rng.standard_normal(slope.shape), jnp.float32)
        measured = (loss(moved(state, path, 1e-3 * direction)) - loss(moved(state, path, -1e-3 * direction))) / 2e-3
        assert abs(measured - jnp.vdot(slope, direction)) < 0.01 * abs(measured) + 0.01, path


# -- what it does not depend on ----------------------------------------------------------------------------------------

ALONE = ("softmax_top, biases", "sigmoid, correction, groups", "sparsemixer", "shared, gated")
each_alone = pytest.mark.parametrize("spec", [SPECS[name] for name in ALONE], ids=ALONE)


@each_alone
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_does_not_depend_on_its_neighbours(spec, dtype):
    """To the bit: others in their place (some not even numbers), and all in another order."""
    moe, x, others = random_moe(spec, dtype), jnp.asarray(tokens(), dtype), jnp.asarray(tokens(seed=2), dtype)
    alone, mine = run(moe, x), np.arange(0, T, 3)
    others = others.at[:, ::2].set(jnp.nan).at[:, mine].set(x[:, mine])
    assert np.array_equal(run(moe, others)[:, mine], alone[:, mine])
    order = np.random.default_rng(4).permutation(T)
    assert np.array_equal(run(moe, x[:, order]), alone[:, order])


@each_alone
def test_a_token_does_not_depend_on_padding(spec):
    moe, x = random_moe(spec), tokens()
    padded = np.concatenate([x, np.zeros((E, 58), np.float32)], axis=1)
    assert np.array_equal(run(moe, padded)[:, :T], run(moe, x))


@each_step
@pytest.mark.parametrize(
    "spec", [SPECS["softmax_top, biases"], SIGMOID, SPARSEMIXER], ids=["softmax", "sigmoid", "sparsemixer"]
)
def test_the_order_of_the_experts_in_memory_does_not_matter(spec, step):
    moe, x, order = random_moe(spec), tokens(), np.random.default_rng(5).permutation(X)
    before = run(moe, x, step)
    by_expert = [moe.router.weight, moe.router.bias, moe.correction,
                 *(leaf for experts in (moe.gate_up, moe.down) for leaf in (experts.weight, experts.bias))]  # fmt: skip
    for leaf in by_expert:
        if leaf is not None:
            leaf[...] = leaf[...][order]
    check(run(moe, x, step), before)


# -- what doors refuse -------------------------------------------------------------------------------------------------

GRANITE = {"model_type": "granitemoehybrid", "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64,
           "intermediate_size": 24, "num_local_experts": 4, "vocab_size": 10, "max_position_embeddings": 64}  # fmt: skip
PHIMOE = {**GRANITE, "model_type": "phimoe"}
ERNIE = {**GRANITE, "model_type": "ernie4_5_moe", "moe_intermediate_size": 24, "moe_num_experts": 4, "moe_k": 2}
REFUSED = [
    ({**GRANITE, "layer_types": ["mamba", "attention", "attention", "mamba"]},
     r"mamba layers are not supported, and 2 of 4 layers are such: 0 \(mamba\), 3 \(mamba\)\. Supported: Granite 4"),
    ({**GRANITE, "layer_types": ["attention"] * 3 + ["linear_attention"]}, r"1 of 4 layers are such: 3 \(linear_attention\)"),
    (GRANITE, "4 of 4 layers are such"),  # what transformers takes a config for that does not say
    ({**GRANITE, "layer_types": ["attention"] * 3}, "3 entries for 4 layers"),
    ({**GRANITE, "layer_types": ["attention"] * 4, "position_embedding_type": "learned"}, "'learned'; supported: .* 'nope'"),
    ({**PHIMOE, "num_experts_per_tok": 3}, "num_experts_per_tok=3 is not supported; supported: 2"),
    ({**ERNIE, "moe_gate": "sinkhorn"}, "moe_gate='sinkhorn' is not supported; supported: 'topk'"),
]  # fmt: skip


@pytest.mark.parametrize("config, message", REFUSED)
def test_what_a_door_cannot_do_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        door(config["model_type"]).decoder_config(HFConfig(config))


def test_granite_without_mamba_layers_is_taken():
    config = door("granitemoehybrid").decoder_config(HFConfig({**GRANITE, "layer_types": ["attention"] * 4}))
    assert [layer.rope for layer in config.layers] == [None] * 4  # it says nothing of positions
