"""The parity matrix: every family equals transformers on tiny random models, by the rows of `families/`.

Doors are found by listing the folder: one without rows fails here.
"""

import json
import pkgutil

import jax
import numpy as np
import pytest
from families import rows
from models_table import FILE, table
from safetensors.numpy import load_file, save_file
from tiny_hf import TOLERANCE, errors, forward, logits_of, make, opened, prompts

import jaxpaged.models
from jaxpaged import LLM, SamplingParams, weights
from jaxpaged.models import doors
from jaxpaged.stage import abstract_decoder

DOORS = rows()
ROWS = [row for door_rows in DOORS.values() for row in door_rows]
KINDS = [(row, heads, tie) for row in ROWS for heads in row.heads or (None,) for tie in row.ties]
FAST = {(row.name, row.heads[0] if row.heads else None, row.ties[0]) for row in ROWS}
CASES = [
    pytest.param(row, heads, tie, id=f"{row.name}-{heads}-{'tied' if tie else 'untied'}",
                 marks=() if (row.name, heads, tie) in FAST else pytest.mark.slow)
    for row, heads, tie in KINDS
]  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
firsts = {row.config: row for row in reversed(ROWS)}.values()


def test_every_door_has_rows():
    modules = {info.name for info in pkgutil.iter_modules(jaxpaged.models.__path__)}
    found = {module.__name__.rpartition(".")[2] for module in doors().values()}
    assert found <= modules and found == set(DOORS)
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_every_model_type_has_a_row():
    assert {row.model_type() for row in ROWS} == set(doors())


def test_the_list_of_models_is_up_to_date():
    assert FILE.read_text() == table(), "python tests/models_table.py"


@pytest.mark.parametrize("row, heads, tie", CASES)
def test_logits(tmp_path, row, heads, tie):
    """Of whole sequences."""
    model = make(tmp_path, row, heads, tie)
    tokens = prompts(2, row.length)
    assert errors(forward(tmp_path, tokens), logits_of(model, tokens)).max() < TOLERANCE["float32"]


def scores(entries: list, first: int) -> list[tuple[int, int, float]]:
    """(position, token, logprob) of all that is reported from `first` on."""
    return [(i, t, lp.logprob) for i, e in enumerate(entries) if i >= first for t, lp in e.items()]


def check_output(output, model, scored_from: int) -> None:
    """Tokens, their logprobs and the prompt's logprobs from a position on, all equal to those of a full forward pass.
    (Each token is the argmax after those before it: so they are what a greedy loop would find.)"""
    prompt, completion = output.prompt_token_ids, output.outputs[0]
    tokens = completion.token_ids
    logprobs = jax.nn.log_softmax(logits_of(model, [prompt + tokens])[0])
    assert tokens == logprobs[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert [entry is None for entry in output.prompt_logprobs] == [i < scored_from for i in range(len(prompt))]
    found = scores(output.prompt_logprobs + completion.logprobs, scored_from)
    assert len(found) >= 3 * (len(prompt) + len(tokens) - scored_from)  # three alternatives each, and the token itself
    at, ids, values = map(np.array, zip(*found))
    assert errors(values, np.asarray(logprobs)[at - 1, ids]) < TOLERANCE["float32"]


@each_row
def test_engine(tmp_path, row):
    """Prompts in chunks of 32 that straddle pages and window; the second and third begin with pages of the first."""
    model = make(tmp_path, row)
    tokens = prompts(3, row.length)
    tokens[1:, :100] = tokens[0, :100]
    first, second, third = tokens[0].tolist(), tokens[1, :-7].tolist(), tokens[2, :-40].tolist()
    params = GREEDY.clone(logprobs=3, prompt_logprobs=3)
    settings = {"block_size": 16, "max_num_batched_tokens": 32, "max_num_seqs": 2, "max_model_len": row.length + 32,
                "num_gpu_blocks_override": 200}  # fmt: skip  # nothing that is cached has to make room
    with LLM(str(tmp_path), skip_tokenizer_init=True, enforce_eager=True, use_tqdm=False, **settings) as llm:
        (alone,) = llm.generate([first], params, use_tqdm=False)
        both = llm.generate([second, third], params.clone(skip_reading_prefix_cache=False), use_tqdm=False)
    assert alone.num_cached_tokens == 0
    assert len({tuple(output.outputs[0].token_ids) for output in (alone, *both)}) == 3
    check_output(alone, model, scored_from=1)
    for output in both:
        assert output.num_cached_tokens == 96  # six whole pages of the 100 tokens they share
        check_output(output, model, scored_from=97)


# -- mutations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", firsts, ids=lambda row: row.config)
def test_what_is_not_known_is_refused_by_name(tmp_path, row):
    make(tmp_path, row)
    file, tensors = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "wobble_factor": 3}))
    with pytest.raises(ValueError, match="does not know here: wobble_factor=3"):
        opened(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({**tensors, "model.wobble.weight": np.ones(3, np.float32)}, file)
    with pytest.raises(ValueError, match="1 extra: model.wobble.weight"):
        plan(tmp_path)
    for name in (list(tensors)[0], list(tensors)[len(tensors) // 2], list(tensors)[-1]):
        save_file({other: tensor for other, tensor in tensors.items() if other != name}, file)
        with pytest.raises(ValueError, match=f"missing: .*{name}"):
            plan(tmp_path)
        save_file({**tensors, name: np.ones((2, *tensors[name].shape), np.float32)}, file)
        with pytest.raises(ValueError, match=f"of another shape: .*{name}"):
            plan(tmp_path)


def plan(folder) -> None:
    checkpoint, config, names, ignore = opened(folder)
    weights.plan(checkpoint, abstract_decoder(config, "float32")[2], names, ignore)
