"""LangChain: a chain of a prompt, the served model and a parser; one question, a stream, and several at once.

jaxpaged serve demo                          # in another terminal
pip install langchain-openai
python examples/langchain_chat.py [URL]      # default: $JAXPAGED_URL, or http://localhost:8000
"""

import json
import os
import sys
import urllib.request

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("JAXPAGED_URL", "http://localhost:8000")
KEY = os.environ.get("JAXPAGED_API_KEY", "none")


def served_model() -> str:
    request = urllib.request.Request(f"{URL}/v1/models", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["data"][0]["id"]


model = ChatOpenAI(base_url=f"{URL}/v1", api_key=KEY, model=served_model(), temperature=0, max_tokens=60)
prompt = ChatPromptTemplate.from_messages(
    [("system", "Answer in one sentence."), ("user", "What is the capital of {country}?")]
)
chain = prompt | model | StrOutputParser()

print("one:", chain.invoke({"country": "France"}))

print("as it comes: ", end="")
for text in chain.stream({"country": "Italy"}):
    print(text, end="", flush=True)
print()

# Sent together, computed together: the server batches what runs at the same time.
countries = ["Spain", "Japan", "Egypt"]
for country, answer in zip(countries, chain.batch([{"country": country} for country in countries])):
    print(f"{country}: {answer}")
