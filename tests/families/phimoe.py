from hub_form import published

from families import LENGTH, WINDOW, Row

FACTORS, OTHERS = [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0, 4.0], [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0]
WIDE = 0.2  # the threshold is twice this: some experts are within it and some are not
EXPERTS = {"num_local_experts": 6, "router_jitter_noise": WIDE}
BIASES = {"attention_bias": True, "lm_head_bias": True}
SHORT = LENGTH + 32  # as long as the engine's longest sequence


def longrope(trained: int, short: list[float], long: list[float]) -> dict:
    return {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long, "short_mscale": 0.9,
            "long_mscale": 1.05, "original_max_position_embeddings": trained}  # fmt: skip


def on_the_hub(trained: int, short: list[float], long: list[float]) -> dict:
    """Phi-3.5-MoE's config says it so."""
    scaling = {**longrope(trained, short, long), "type": "longrope", "rope_type": None, "rope_theta": None}
    return {"rope_parameters": None, "rope_theta": 10000.0, "original_max_position_embeddings": trained,
            "rope_scaling": {key: value for key, value in scaling.items() if value is not None},
            "auto_map": {"AutoConfig": "configuration_phimoe.PhiMoEConfig"}, "hidden_dropout": 0.0}  # fmt: skip


# transformers takes the short factors for every length (the code on the Hub does not), though with the long ones' scale: so
# it gets the long ones twice.
ROWS = (
    Row("phimoe", "Phimoe", EXPERTS),
    Row("phimoe with biases, sliding", "Phimoe", {**EXPERTS, **BIASES, "sliding_window": WINDOW, "router_jitter_noise": 0.01}),
    Row("phimoe, longrope, short", "Phimoe", {
        **EXPERTS, **BIASES, "max_position_embeddings": SHORT, "rope_parameters": longrope(SHORT, FACTORS, OTHERS)}),
    Row("phimoe as on the Hub, longrope, long", "Phimoe", {
        **EXPERTS, **BIASES, "rope_parameters": longrope(128, OTHERS, OTHERS)},
        convert=published({}, on_the_hub(128, FACTORS, OTHERS))),
)  # fmt: skip
