"""A model's config.json at the doors of the families: what is refused and how, what an absent key means, overrides."""

import json
import re

import pytest
import transformers

from jaxpaged import LLM
from jaxpaged.hf_config import HFConfig
from jaxpaged.models import door

CONFIG = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
MORE = {
    "llama": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "attention_bias": True},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 24, "final_logit_softcapping": 3.0},
}
STRANGE = {
    "quantization_config": {"quant_method": "awq"}, "partial_rotary_factor": 0.5, "use_bidirectional_attention": True,
    "num_local_experts": 8, "logit_scale": 0.5, "residual_multiplier": 2.0, "auto_map": {"AutoModel": "modeling.Own"},
    "no_rope_layers": [1, 0], "attention_sinks": True,
}  # fmt: skip


def decoder_config(config: dict, overrides: dict | None = None):
    hf = HFConfig(config, overrides)
    made = door(hf["model_type"]).decoder_config(hf)
    hf.finish()
    return made


def small(family: str, **changes) -> dict:
    return {"model_type": family, **CONFIG, **MORE[family], **changes}


@pytest.fixture(params=MORE)
def family(request):
    return request.param


@pytest.mark.parametrize("key", STRANGE)
def test_a_key_that_may_change_the_model_is_refused_by_name(family, key):
    with pytest.raises(ValueError, match=rf"the family '{family}' does not know here: {key}=.*hf_overrides={{'{key}': None}}"):
        decoder_config(small(family, **{key: STRANGE[key]}))


@pytest.mark.parametrize("nothing", [None, False, "", [], {}], ids=repr)
def test_a_key_that_says_nothing_is_harmless(family, nothing):
    assert decoder_config(small(family, **dict.fromkeys(STRANGE, nothing))) == decoder_config(small(family))


def test_all_strange_keys_are_told_at_once_and_briefly(family):
    with pytest.raises(ValueError) as error:
        decoder_config(small(family, **STRANGE, table=list(range(1000))))
    text = str(error.value)
    assert all(f"{key}=" in text for key in STRANGE) and "table=[0, 1, 2, 3" in text and len(text) < 1500


def test_asking_is_reading_and_listing_is_not():
    hf = HFConfig({"a": 1, "b": 2})
    assert list(hf) == ["a", "b"] and len(hf) == 2
    assert hf.unknown() == {"a": 1, "b": 2}
    assert "a" in hf and "c" not in hf
    assert hf.unknown() == {"b": 2}


SAYS_WRONG = [
    ("llama", {"pretraining_tp": 2}, "pretraining_tp=2"),
    ("llama", {"hidden_act": "sigmoid"}, "hidden_act 'sigmoid' is not supported; supported: silu, swish, gelu"),
    ("llama", {"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope_scaling kind 'mrope' is not supported"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "lacks the key 'factor'"),
    ("qwen2", {"layer_types": ["full_attention"] * 6}, "layer_types: 6 entries for 7 layers"),
    ("qwen3", {"layer_types": ["full_attention"] * 6 + ["linear_attention"]}, r"unknown \['linear_attention'\]"),
    ("gemma3_text", {"hidden_activation": "mish"}, "hidden_act 'mish' is not supported"),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "lacks the key"),
]


@pytest.mark.parametrize("family, changes, message", SAYS_WRONG, ids=[w[2] for w in SAYS_WRONG])
def test_what_we_cannot_compute_is_refused(family, changes, message):
    with pytest.raises(ValueError, match=message):
        decoder_config(small(family, **changes))


def test_a_size_that_is_written_as_a_float_is_that_size(family):
    assert decoder_config(small(family, num_hidden_layers=7.0, head_dim=16.0)) == decoder_config(small(family))


WRONG_KINDS = [
    ({"hidden_size": "256"}, "hidden_size must be a positive integer, got '256'"),
    ({"hidden_size": -256}, "hidden_size must be a positive integer, got -256"),
    ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
    ({"num_hidden_layers": 4.5}, "num_hidden_layers must be a positive integer, got 4.5"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, got True"),
    ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
    ({"vocab_size": float("inf")}, "vocab_size must be a positive integer, got inf"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads must be a positive integer, got '2'"),
    ({"head_dim": -16}, "head_dim must be a positive integer, got -16"),
    ({"rope_scaling": "yarn"}, "rope_scaling must be an object, got 'yarn'"),
    ({"rope_parameters": [1]}, r"rope_parameters must be an object, got \[1\]"),
]


@pytest.mark.parametrize("changes, message", WRONG_KINDS, ids=[w[1] for w in WRONG_KINDS])
def test_a_value_of_the_wrong_kind_is_refused_by_its_key(family, changes, message):
    with pytest.raises(ValueError, match=f"the config: {message}"):
        decoder_config(small(family, **changes))


def test_a_model_type_and_a_quantisation_have_their_kinds_too():
    with pytest.raises(ValueError, match="model_type must be a text, got 5"):
        decoder_config({**CONFIG, "model_type": 5})
    with pytest.raises(ValueError, match=r"quantization_config must be an object, got \[1\]"):
        LLM(small("llama", quantization_config=[1]), load_format="dummy", skip_tokenizer_init=True, use_tqdm=False)


# -- absent keys -------------------------------------------------------------------------------------------------------

SIZES = {"num_key_value_heads", "head_dim"}  # families differ; a wrong guess does not fit the weights, which is told


def as_transformers_writes(family: str, now: bool) -> dict:
    """A full config.json of transformers 5, or of a version before: without layer_types, rope_parameters in old keys."""
    config = json.loads(transformers.AutoConfig.for_model(**small(family)).to_json_string(use_diff=True))
    if now:
        return config
    rope = config.pop("rope_parameters")
    if family == "gemma3_text":
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    config |= {"rope_theta": rope.get("full_attention", rope)["rope_theta"], "rope_scaling": None}
    return {key: value for key, value in config.items() if key != "layer_types"}


def completed(config: dict) -> dict:
    """With transformers' own defaults for what is not said."""
    return transformers.AutoConfig.for_model(**json.loads(json.dumps(config))).to_dict()


@pytest.mark.parametrize("now", [True, False], ids=["transformers 5", "before"])
def test_an_absent_key_is_refused_or_means_what_it_means_to_transformers(family, now):
    config = as_transformers_writes(family, now)
    assert decoder_config(config) == decoder_config(completed(config))
    refused = set()
    for key in config.keys() - SIZES - {"model_type", "_sliding_window_pattern"}:
        reduced = {k: v for k, v in config.items() if k not in (key, "_sliding_window_pattern")}
        try:
            found = decoder_config(reduced)
        except ValueError as error:
            assert f"lacks the key {key!r}; give it with hf_overrides" in str(error)
            refused.add(key)
        else:
            assert found == decoder_config(completed(reduced)), key
    needed = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    assert needed <= refused <= needed | {"max_position_embeddings", "sliding_window"}


def test_head_dim_and_rotation_agree_when_the_size_is_not_said(family):
    made = decoder_config({key: value for key, value in small(family).items() if key not in SIZES})
    heads = {layer.attention for layer in made.layers}
    assert {2 * len(layer.rope.frequencies) for layer in made.layers} == {spec.head_dim for spec in heads}
    assert {(spec.head_dim, spec.num_kv_heads) for spec in heads} == {(256 if family == "gemma3_text" else 8, 4)}


# -- overrides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("now", [True, False], ids=["transformers 5", "before"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_a_rope_scaling_given_by_the_user_counts(family, now, key):
    """Also for files that have rope_parameters. In Gemma 3 it is for the full layers."""
    config = as_transformers_writes(family, now)
    plain, made = decoder_config(config), decoder_config(config, {"rope_scaling": {key: "linear", "factor": 4.0}})
    assert decoder_config(config, {"rope_scaling": None}) == plain
    for before, after in zip(plain.layers, made.layers):
        factor = 1.0 if family == "gemma3_text" and before.window else 4.0
        assert after.rope.frequencies == pytest.approx([f / factor for f in before.rope.frequencies])


def test_overrides_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small("qwen3", **STRANGE)))
    settings = {"load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": True, "use_tqdm": False}
    off, folder = dict.fromkeys(STRANGE), re.escape(str(tmp_path))
    with LLM(str(tmp_path), hf_overrides={**off, "max_position_embeddings": 300}, **settings) as llm:
        assert llm.config.max_model_len == 300
    with pytest.raises(ValueError, match=rf"{folder} lacks the key 'hidden_size'; give it with hf_overrides"):
        LLM(str(tmp_path), hf_overrides={**off, "hidden_size": None}, **settings)
    with pytest.raises(ValueError, match=rf"{folder} has keys .*logit_scale=0.5"):
        LLM(str(tmp_path), hf_overrides={**off, "logit_scale": 0.5}, **settings)
