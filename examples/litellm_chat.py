"""LiteLLM: the server as one of many providers behind one function.

jaxpaged serve demo                          # in another terminal
pip install litellm
python examples/litellm_chat.py [URL]        # default: $JAXPAGED_URL, or http://localhost:8000
"""

import os
import sys

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download of a price list when it is imported
import litellm

URL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("JAXPAGED_URL", "http://localhost:8000")
KEY = os.environ.get("JAXPAGED_API_KEY", "none")

# "hosted_vllm/" is LiteLLM's name for servers with vLLM's API; what follows is the model's name there.
names = litellm.get_valid_models(
    check_provider_endpoint=True, custom_llm_provider="hosted_vllm", api_key=KEY, api_base=f"{URL}/v1"
)
call = {"model": f"hosted_vllm/{names[0]}", "api_base": f"{URL}/v1", "api_key": KEY, "temperature": 0, "max_tokens": 60}
messages = [{"role": "user", "content": "What is the capital of France?"}]

answer = litellm.completion(messages=messages, **call)
print(f"whole: {answer.choices[0].message.content} [{answer.usage.completion_tokens} tokens]")

print("as it comes: ", end="")
for chunk in litellm.completion(messages=messages, stream=True, **call):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

# Errors come as LiteLLM's own exceptions, which its retries and fallbacks know.
litellm.suppress_debug_info = True
try:
    litellm.completion(messages=[{"role": "user", "content": "word " * 100_000}], **call)
except litellm.ContextWindowExceededError:
    print("too long: LiteLLM knows that the prompt does not fit")
