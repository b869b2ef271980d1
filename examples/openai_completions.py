"""Completions with OpenAI's client: several prompts in one request, samples, log probabilities, and parameters of vLLM's.

jaxpaged serve demo                          # in another terminal
pip install openai
python examples/openai_completions.py [URL]  # default: $JAXPAGED_URL, or http://localhost:8000
"""

import os
import sys

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("JAXPAGED_URL", "http://localhost:8000")
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("JAXPAGED_API_KEY", "none"))
model = client.models.list().data[0].id

# Two prompts, two samples of each, all computed together. A seed makes them the same in every run.
prompts = ["The capital of France is", "The opposite of hot is"]
answer = client.completions.create(model=model, prompt=prompts, n=2, max_tokens=12, temperature=0.8, seed=1)
for choice in answer.choices:  # numbered prompt by prompt
    print(f"[{choice.index}] {prompts[choice.index // 2]}|{choice.text!r} ({choice.finish_reason})")

# How sure is the model? The three likeliest tokens at each place.
answer = client.completions.create(model=model, prompt=prompts[0], max_tokens=3, temperature=0, logprobs=3)
scores = answer.choices[0].logprobs
for token, logprob, top in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs):
    print(f"{token!r} {logprob:.2f}   likeliest: {', '.join(f'{t!r} {p:.2f}' for t, p in top.items())}")

# How likely is a given text? echo with max_tokens=0 scores the prompt and generates nothing.
answer = client.completions.create(model=model, prompt=prompts[0] + " Paris", echo=True, max_tokens=0, logprobs=0)
print(f"log P(prompt) = {sum(answer.choices[0].logprobs.token_logprobs[1:]):.2f}")  # the first token has no probability

# What OpenAI does not have goes into extra_body, by vLLM's names.
answer = client.completions.create(model=model, prompt=prompts[0], max_tokens=8, extra_body={"top_k": 1, "min_tokens": 4,
                                   "bad_words": [" Paris"], "return_token_ids": True})  # fmt: skip
print(f"without Paris: {answer.choices[0].text!r}, token ids {answer.choices[0].token_ids}")
