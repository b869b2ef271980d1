"""What a step says between eight H200s that are not here, and what it keeps on each: as XLA has compiled it."""

import dataclasses

import pytest
from plan_models import LLAMA_3_70B, QWEN3_30B_A3B

from benchmarks.pipeline import Case, idle
from jaxpaged import devices_compiler, plan_compile
from jaxpaged.config import EngineConfig
from jaxpaged.devices import DEVICES
from jaxpaged.plan_model import Setting, Source, fit, setting

compilers = pytest.mark.skipif(devices_compiler.missing() is not None, reason=devices_compiler.missing() or "")

QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94, "num_attention_heads": 64,
    "moe_intermediate_size": 1536,
}  # fmt: skip
MODELS = {
    "Llama-3-70B": (LLAMA_3_70B, {}),
    "Qwen3-235B-A22B": (QWEN3_235B_A22B, {"enable_expert_parallel": True}),
    "Qwen3-235B-A22B, sent": (
        QWEN3_235B_A22B, {"enable_expert_parallel": True, "all2all_backend": "ragged_all_to_all"}),
}  # fmt: skip
TOKENS, ROWS = 8192, 256


def whole(name: str) -> Setting:
    model, more = MODELS[name]
    config = EngineConfig(model=name, tensor_parallel_size=8, max_num_batched_tokens=TOKENS, max_num_seqs=ROWS,
                          max_model_len=8192, **more)  # fmt: skip
    return setting(Source(model), config, DEVICES["h200"])


@compilers
@pytest.mark.parametrize("name, layers, temporaries", [
    ("Llama-3-70B", 2, 0.3e9), ("Qwen3-235B-A22B", 2, 1.3e9), ("Qwen3-235B-A22B, sent", 2, 2e9),
    pytest.param("Llama-3-70B", 80, 0.3e9, marks=pytest.mark.slow),
])  # fmt: skip
def test_what_eight_devices_say_to_each_other(name, layers, temporaries):
    """Two sums a layer and one for the embedding. Each is of hidden states, and nothing else is sent: no weight and no cache is
    gathered. The cache is written in place, and temporaries do not grow with the layers."""
    found = whole(name)
    memory = fit(found)[1]
    found = dataclasses.replace(found, decoder=dataclasses.replace(found.decoder, layers=found.decoder.layers[:layers]))
    step, why = plan_compile.compiled(found, memory, all_layers=True, timeout=900)
    assert step is not None, why
    assert step.aliased == step.donated > 0 and step.temporaries < temporaries
    E, sums = found.decoder.embed_dim, 2 * layers + 1
    assert step.collectives[f"{ROWS} tokens"] == {"all-reduce": (sums, sums * E * ROWS * 2)}
    large = step.collectives[f"{TOKENS} tokens"]
    if name.endswith("sent"):
        assert {kind: count for kind, (count, _) in large.items()} == {
            "reduce-scatter": layers + 1,
            "all-gather": layers + 1 + layers,  # the layers' attention; how many go where
            "all-to-all": layers,
            "ragged-all-to-all": 2 * layers,
        }  # of which expert they are; there and back
        return
    assert large == {"reduce-scatter": (sums, sums * E * TOKENS // 8 * 2), "all-gather": (sums, sums * E * TOKENS * 2)}


def test_stages_of_a_pipeline_have_something_to_do():
    assert idle(Case(stages=4, running=16, prompt=256, output=64)) < 0.1
    assert idle(Case(stages=4, running=1, prompt=256, output=64)) > 0.6, "one request is on one stage at a time"


@pytest.mark.parametrize("name", MODELS)
def test_there_is_room_for_a_cache(name):
    found, memory = fit(whole(name))
    assert memory.limit is not None and memory.weights + memory.temporaries + memory.cache <= memory.limit
    assert memory.num_pages > 16 * memory.per_sequence, "16 sequences of 8,192 tokens"
