"""A tool call and back: the model asks for a function, this script runs it, the model answers with what came out.

    jaxpaged serve demo --tool-call-parser hermes        # in another terminal
    pip install openai
    python examples/openai_tools.py [URL]                # default: $JAXPAGED_URL, or http://localhost:8000

The parser has to be the one for the model's way to write calls: `jaxpaged serve --help` lists them. The demo model is tiny and
was never taught to call anything: the call is forced here, and what it asks for may be nonsense. Larger models do better with
tool_choice="auto".
"""

import json
import os
import sys

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("JAXPAGED_URL", "http://localhost:8000")


def weather(city: str) -> str:
    """Stands for a real service."""
    return f"In {city} it is raining, 12 degrees."


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def run(call) -> str:
    """The tool's output. The model chose the name and the arguments: neither is to be trusted."""
    if call.function.name != "weather":
        return f"error: there is no tool {call.function.name!r}"
    try:
        return weather(**json.loads(call.function.arguments))
    except (ValueError, TypeError) as error:
        return f"error: these arguments cannot be used: {error}"


client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("JAXPAGED_API_KEY", "none"))
model = client.models.list().data[0].id
messages = [{"role": "user", "content": "What is the weather like in Paris?"}]
options = {"model": model, "tools": [TOOL], "temperature": 0, "max_completion_tokens": 100}

forced = {"type": "function", "function": {"name": "weather"}}
message = client.chat.completions.create(messages=messages, tool_choice=forced, **options).choices[0].message
if not message.tool_calls:
    sys.exit(f"The model wrote no call that can be read: {message.content!r}")

messages.append({"role": "assistant", "content": message.content or "", "tool_calls": []})
for call in message.tool_calls:
    print(f"the model calls {call.function.name}({call.function.arguments})")
    output = run(call)
    print(f"the tool says: {output}")
    # Arguments that are no JSON cannot stand in a conversation: the server would refuse them. The output says what was wrong.
    arguments = call.function.arguments if not output.startswith("error") else "{}"
    function = {"name": call.function.name, "arguments": arguments}
    messages[-1]["tool_calls"].append({"id": call.id, "type": "function", "function": function})
    messages.append({"role": "tool", "tool_call_id": call.id, "content": output})

answer = client.chat.completions.create(messages=messages, tool_choice="none", **options)
print(f"the model says: {answer.choices[0].message.content}")
