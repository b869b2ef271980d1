"""An engine without a model that says what a test wants: its tokens spell a scripted reply.

    engine = scripted_engine("Hello!")                                            # to every prompt
    engine = scripted_engine(lambda prompt: "4" if "2+2" in prompt else "what?")
    engine = scripted_engine(echo)                                                # whatever it is asked to say
    with serve(scripted_service(echo, tool_call_parser="hermes")) as live: ...     # live_server.py

Everything but the model is real: scheduler, pages, detokenizer, stop strings, aborts, the chat template. A reply ends with the
EOS token. A reply that raises is a step that fails.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import tiny_tokenizers

from jaxpaged.async_engine import AsyncEngine
from jaxpaged.batch import Batch, Sampled, TokenLogprobs, ladder
from jaxpaged.engine import Engine
from jaxpaged.scheduler import Limits
from jaxpaged.tokenizer import Tokenizer
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.service import Service

Reply = Callable[[str], str] | str  # of the prompt's text, special tokens included

START, END = "<|im_start|>", "<|im_end|>"
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # tokens of their own, not special: as in Qwen's tokenizers
NUM_ALTERNATIVES = 20
ASKED = re.compile(r"<\|im_start\|>(?:user|tool)[^\n]*\n(.*?)<\|im_end\|>", re.DOTALL)

# ChatML as Qwen has it: tools in the system message, calls and reasoning in the assistant's, enable_thinking.
TEMPLATE = r"""
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}{{ raise_exception('The system message must come first.') }}{% endif %}
{%- if message.role != 'system' %}<|im_start|>{{ message.role }}{% if message.name %} ({{ message.name }}){% endif %}

{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] -%}
{{ '\n<tool_call>\n' ~ (call.function | tojson) ~ '\n</tool_call>' }}
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}
{%- endif %}"""


@cache
def chat_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """A byte-level tokenizer of some 600 tokens, with ChatML's special ones. template None: it has no chat template."""
    backend = tiny_tokenizers.byte_level(**{START: True, END: True}, **dict.fromkeys(MARKERS, False))
    return Tokenizer(backend, {"eos_token": END}, chat_templates={} if template is None else {"default": template})


def echo(prompt: str) -> str:
    """A reply: what the last message of the user, or of a tool, says. One server then serves any number of tests."""
    return ASKED.findall(prompt)[-1]


class ScriptedRunner:
    """A `Runner` whose token at a position is the reply's, so it says the same whatever the schedule. seconds: of a step."""

    embed_dim = 1

    def __init__(self, tokenizer: Tokenizer, reply: Reply, seconds: float = 0.0):
        self.tokenizer, self.seconds = tokenizer, seconds
        self.reply = reply if callable(reply) else lambda prompt: reply
        self.engine: Engine  # set by `scripted_engine`: its state knows the prompts
        self.script = lru_cache(maxsize=256)(self._script)

    def _script(self, request_id: str, prompt: tuple[int, ...]) -> list[int]:
        """The tokens of the reply, which is asked for once a request."""
        text = self.reply(self.tokenizer.decode(prompt, skip_special_tokens=False))
        return self.tokenizer.encode(text, add_special_tokens=False)

    def dispatch(self, batch: Batch) -> Sampled:
        time.sleep(self.seconds)
        tokens = np.zeros(len(batch.slots), np.int32)
        requests = self.engine.state.requests.read()
        for row in range(int(batch.counts[1])):
            request = requests[batch.slots[row]]
            script = self.script(request.id, request.prompt)
            tokens[row] = self._token(script, int(batch.kv_lens[row]) - len(request.prompt))
        logprobs = self._logprobs(tokens) if batch.num_logprobs >= 0 else None
        prompt_logprobs = self._logprobs(batch.targets) if batch.prompt_logprobs else None
        return Sampled(tokens, np.ones(len(tokens), bool), logprobs, prompt_logprobs)

    def _token(self, script: list[int], at: int) -> int:
        """What follows `at` tokens of the answer; below 0 (within the prompt) nobody looks at it."""
        return script[at] if 0 <= at < len(script) else self.tokenizer.eos_token_id or 0

    def _logprobs(self, tokens: np.ndarray) -> TokenLogprobs:
        """The token itself has -0.5, its i-th neighbour in the vocabulary -0.5 - i."""
        steps = np.arange(NUM_ALTERNATIVES)
        ids = (tokens[:, None] + steps) % self.tokenizer.vocab_size
        top = np.broadcast_to(-0.5 - steps, ids.shape).astype(np.float32)
        return TokenLogprobs(top[:, 0], np.ones(len(tokens), np.int32), ids.astype(np.int32), top)

    def collect(self, handle: Sampled) -> Sampled:
        return handle

    def recover(self) -> bool:
        return False

    def close(self) -> None:
        pass


def scripted_engine(reply: Reply, *, template: str | None = TEMPLATE, seconds: float = 0.0, **limits: Any) -> Engine:
    """reply: what is said, or a function of the prompt's text. seconds: that a step takes. limits: fields of Limits."""
    tokenizer = chat_tokenizer(template)
    base = dict(max_num_seqs=8, max_num_batched_tokens=256, page_size=16, num_pages=1024, max_model_len=2048)
    sizes = Limits(**{"vocab_size": tokenizer.vocab_size, **base, **limits})
    runner = ScriptedRunner(tokenizer, reply, seconds)
    buckets = ladder(sizes.max_num_batched_tokens, sizes.max_num_seqs)
    runner.engine = Engine(sizes, runner, buckets, tokenizer, tokenizer.eos_token_ids)
    return runner.engine


def scripted_service(reply: Reply, *, template: str | None = TEMPLATE, seconds: float = 0.0, **options: Any) -> Service:
    """A service, whose model is called "scripted", around `scripted_engine`. options: fields of ServerOptions."""
    engine = scripted_engine(reply, template=template, seconds=seconds)
    return Service(AsyncEngine(engine), ServerOptions(**options), ["scripted"])
