"""The same server through Anthropic's client: the answer as it comes, and how long a prompt is.

jaxpaged serve demo                          # in another terminal
pip install anthropic
python examples/anthropic_messages.py [URL]  # default: $JAXPAGED_URL, or http://localhost:8000
"""

import os
import sys

from anthropic import Anthropic

URL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("JAXPAGED_URL", "http://localhost:8000")
client = Anthropic(base_url=URL, api_key=os.environ.get("JAXPAGED_API_KEY", "none"))
model = client.models.list().data[0].id
prompt = {"model": model, "system": "Be brief.", "messages": [{"role": "user", "content": "What is the capital of France?"}]}

print(f"the prompt has {client.messages.count_tokens(**prompt).input_tokens} tokens")
# The client has no word for what Anthropic's newest models do not take; the server takes it all the same.
with client.messages.stream(**prompt, max_tokens=100, extra_body={"temperature": 0}) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
    answer = stream.get_final_message()
print(f"\n[{answer.stop_reason}, {answer.usage.input_tokens} prompt tokens, {answer.usage.output_tokens} generated]")
