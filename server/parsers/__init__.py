"""From the text of a chat's answer to OpenAI's deltas: content, reasoning, tool calls; one parser, streamed or not.

    parser = ChatParser("hermes", "qwen3", tools=tools, prompt_end=prompt[-100:])
    for text in texts:
        delta = parser.push(text)
    delta = parser.finish()

Pure text: nothing here knows HTTP, tokens or the engine. A format is a grammar, written as a generator that reads characters
and waits for more (source.py); how the text was cut cannot change what it reads, so `parse` of the whole text and the
deltas of any pieces of it, joined, are the same message.

Rules, the same for all formats:

- Reasoning comes first, then content and calls. A marker inside reasoning is reasoning.
- No text raises, and none is lost. A call *begins for good* when its name and the beginning of its arguments are there
  (JSON: `{"` or `{}`; XML: the name; pythonic: the whole call). What breaks off or ends before is content, verbatim, its
  markers included. What breaks off or ends after stays a call, with the arguments as far as they came, as OpenAI has it when
  an answer reaches its length: their text then is not JSON, so nobody can take them for whole. The first character that does
  not fit, and what follows, is content (or a further call).
- Arguments go out as they come: in JSON character by character, in XML strings likewise and other values one at a time,
  pythonic calls one at a time. JSON is passed on as the model spelled it; XML and Python become JSON.
- Any name is a call's name: whether there is such a tool is the caller's to see.
- parallel_tool_calls=False gives the first call; those after it are read and dropped; content goes on.
- Whitespace alone, between markers or between one and an end of the text, is dropped. Other text is verbatim.
"""

from __future__ import annotations

from jaxpaged_server.parsers.chat import ChatParser, end_of_reasoning, needs_special_tokens, opening, parse
from jaxpaged_server.parsers.formats import TOOL_PARSERS
from jaxpaged_server.parsers.output import Delta, Message, ToolCall, ToolCallDelta, join
from jaxpaged_server.parsers.reasoning import REASONING_PARSERS

__all__ = [
    "REASONING_PARSERS",
    "TOOL_PARSERS",
    "ChatParser",
    "Delta",
    "Message",
    "ToolCall",
    "ToolCallDelta",
    "end_of_reasoning",
    "join",
    "needs_special_tokens",
    "opening",
    "parse",
]
