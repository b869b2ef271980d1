"""A stage for Ray Data: rows come with prompts and leave with what a model says to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpaged.config import EngineConfig
from jaxpaged.ray.needed import need
from jaxpaged.ray.sizes import at_least
from jaxpaged.request import RequestError, RequestOutput, SamplingParams

Params = SamplingParams | Mapping[str, Any] | None
COLUMNS = ("generated_text", "generated_token_ids", "finish_reason", "num_prompt_tokens", "error")  # what the stage adds


class Generate:
    """For `dataset.map_batches(Generate, batch_format="pyarrow", fn_constructor_args=(config, params), ...)`, which
    `generate_stage` writes for you: an engine in each actor of a pool.

    config: EngineConfig's fields. params: of every prompt. prompt: the column of prompts: texts, or lists of token ids.
    chat: a prompt is a user's message, or a list of messages (the model's chat template is used).
    Adds COLUMNS, which must not be there yet. A row that cannot be served has finish_reason "error" and says why in `error`,
      which is "" for the others.
    """

    def __init__(self, config: EngineConfig | Mapping[str, Any], params: Params = None, prompt: str = "prompt",
                 chat: bool = False):  # fmt: skip
        from jaxpaged.llm import LLM

        self.llm = LLM(**(vars(config) if isinstance(config, EngineConfig) else config), use_tqdm=False)
        self.params = sampling(params) or self.llm.get_default_sampling_params()
        self.prompt, self.chat = prompt, chat

    def __call__(self, batch: Any) -> Any:
        """A table of pyarrow, with more columns."""
        names = getattr(batch, "column_names", None)
        if names is None:
            raise RequestError(
                f'this stage takes tables: map_batches(..., batch_format="pyarrow"); got {type(batch).__name__}.'
            )
        check_columns(names, self.prompt)
        outputs = served([_plain(value) for value in batch[self.prompt].to_pylist()], self._run)
        return with_columns(batch, outputs)

    def _run(self, prompts: Sequence[Any]) -> list[RequestOutput]:
        for one in prompts:
            if not isinstance(one, (str, list, dict)):  # numbers in a row would be taken for one prompt of token ids
                raise RequestError(f"the column {self.prompt!r} must have a text or a list in each row, got {one!r}.", "prompt")
        if not self.chat:
            given = [{"prompt_token_ids": one} if isinstance(one, list) else one for one in prompts]
            return self.llm.generate(given, self.params, use_tqdm=False)
        talks = [one if isinstance(one, list) else [{"role": "user", "content": one}] for one in prompts]
        return self.llm.chat(talks, self.params, use_tqdm=False)


def generate_stage(config: EngineConfig | Mapping[str, Any], params: Params = None, *, prompt: str = "prompt",
                   chat: bool = False, batch_size: int = 256, concurrency: int | tuple[int, int] = 1,
                   num_cpus: float | None = None, num_gpus: float | None = None) -> Callable[[Any], Any]:  # fmt: skip
    """A function that adds the stage to a dataset: `generate_stage({"model": "demo"}, concurrency=4)(dataset)`.

    batch_size: rows that are generated together; let it be several times max_num_seqs. concurrency: actors, or (least, most).
    num_cpus, num_gpus: of each. RequestError for what cannot be.
    """
    if isinstance(config, Mapping):
        EngineConfig(**config)  # a mistake is said here, not in an actor
    sampling(params)
    at_least(1, "batch_size", batch_size, whole=True)
    for name, number in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
        if number is not None:
            at_least(0, name, number)
    least, most = _actors(concurrency)

    def add(dataset: Any) -> Any:
        pool = need("ray.data").ActorPoolStrategy(min_size=least, max_size=most)
        return dataset.map_batches(
            Generate, fn_constructor_args=(config, params), fn_constructor_kwargs={"prompt": prompt, "chat": chat},
            batch_format="pyarrow", batch_size=batch_size, compute=pool, num_cpus=num_cpus, num_gpus=num_gpus,
        )  # fmt: skip

    return add


def _actors(concurrency: int | tuple[int, int]) -> tuple[int, int]:
    pair = concurrency if isinstance(concurrency, tuple) else (concurrency, concurrency)
    if len(pair) != 2:
        raise RequestError(f"concurrency must be an integer, or (least, most), got {pair}.", "concurrency")
    least, most = pair
    at_least(1, "concurrency", least, whole=True)
    at_least(least, "concurrency", most, whole=True)
    return least, most


def check_columns(names: Sequence[str], prompt: str) -> None:
    """RequestError unless rows with these columns have prompts and no columns of the stage."""
    if prompt not in names:
        raise RequestError(f"there is no column {prompt!r}; the rows have {', '.join(names)}.", "prompt")
    taken = [name for name in COLUMNS if name in names]
    if taken:
        raise RequestError(f"the rows have {', '.join(taken)} already, which would be added to them; drop or rename these "
                           f"first: dataset.drop_columns({taken}).")  # fmt: skip


def sampling(params: Params) -> SamplingParams | None:
    """RequestError for what a column cannot hold."""
    made = SamplingParams(**params) if isinstance(params, Mapping) else params
    if made is not None and made.n != 1:
        raise RequestError(f"n must be 1 for a stage, got {made.n}: a row has one output; repeat the rows instead.", "n")
    return made


def served(prompts: Sequence[Any], run: Callable[[Sequence[Any]], list[RequestOutput]]) -> list[RequestOutput | str]:
    """Outputs, or why there is none. `run` refuses all of its prompts if one of them cannot be served, before any is run:
    halves are then tried, until the bad ones are alone."""
    if not prompts:
        return []
    try:
        return list(run(prompts))
    except RequestError as error:
        if len(prompts) == 1:
            return [str(error)]
        half = len(prompts) // 2
        return served(prompts[:half], run) + served(prompts[half:], run)


def with_columns(table: Any, outputs: Sequence[RequestOutput | str]) -> Any:
    pa = need("pyarrow")
    types = (pa.string(), pa.list_(pa.int64()), pa.string(), pa.int64(), pa.string())
    rows = [_row(output) for output in outputs]
    for i, (name, kind) in enumerate(zip(COLUMNS, types)):
        table = table.append_column(name, pa.array([row[i] for row in rows], kind))
    return table


def _row(output: RequestOutput | str) -> tuple[str, list[int], str, int, str]:
    if isinstance(output, str):
        return "", [], "error", 0, output
    first = output.outputs[0]
    return first.text, list(first.token_ids), str(first.finish_reason or ""), len(output.prompt_token_ids), output.error or ""


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
