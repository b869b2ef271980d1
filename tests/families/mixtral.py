from families import WINDOW, Row

EXPERTS = {"num_local_experts": 5}
ROWS = (
    Row("mixtral", "Mixtral", EXPERTS),
    Row("mixtral, sliding, three of five", "Mixtral", {"num_experts_per_tok": 3, "sliding_window": WINDOW, **EXPERTS}),
)
