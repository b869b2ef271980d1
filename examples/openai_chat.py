"""A chat with OpenAI's client: the answer appears as the model writes it, then a second question goes on from there.

jaxpaged serve demo                          # in another terminal
pip install openai
python examples/openai_chat.py [URL]         # default: $JAXPAGED_URL, or http://localhost:8000
"""

import os
import sys

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("JAXPAGED_URL", "http://localhost:8000")
QUESTIONS = ["What is the capital of France?", "And what is it famous for? Answer in one sentence."]

# The client insists on a key; a server that was started without --api-key takes any.
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("JAXPAGED_API_KEY", "none"))
model = client.models.list().data[0].id

messages = [{"role": "system", "content": "You are a helpful assistant. Be brief."}]
for question in QUESTIONS:
    print(f"> {question}")
    messages.append({"role": "user", "content": question})
    options = {"temperature": 0, "max_completion_tokens": 100, "stream_options": {"include_usage": True}}
    stream = client.chat.completions.create(model=model, messages=messages, stream=True, **options)
    answer = ""
    for chunk in stream:
        if chunk.choices:
            text = chunk.choices[0].delta.content or ""
            print(text, end="", flush=True)
            answer += text
        else:  # the last chunk has no choices: it says what all this has cost
            print(f"\n[{chunk.usage.prompt_tokens} prompt tokens, {chunk.usage.completion_tokens} generated]\n")
    # The server keeps no conversation. Its prefix cache does keep what it has computed: the next prompt begins with the same
    # tokens, and only what is new is computed.
    messages.append({"role": "assistant", "content": answer})
