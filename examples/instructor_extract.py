"""Structured output with Instructor: a Pydantic object out of a text, by a forced tool call that is checked.

    jaxpaged serve demo --tool-call-parser hermes        # in another terminal
    pip install instructor
    python examples/instructor_extract.py [URL]          # default: $JAXPAGED_URL, or http://localhost:8000

The server does not hold the model to the schema while it writes: what comes back is checked here, and a wrong answer is sent
back with what is wrong, up to RETRIES times. Models of a few billion parameters manage; the tiny demo model rarely does.
"""

import os
import sys

import instructor
from instructor.core import InstructorError
from openai import OpenAI
from pydantic import BaseModel, Field

URL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("JAXPAGED_URL", "http://localhost:8000")
RETRIES = 2
TEXT = "Ada Lovelace was 27 when she published her notes on the Analytical Engine."


class Person(BaseModel):
    """A person in the text."""

    name: str
    age: int = Field(ge=0, le=150)


openai = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("JAXPAGED_API_KEY", "none"))
client = instructor.from_openai(openai, mode=instructor.Mode.TOOLS)
try:
    person = client.chat.completions.create(
        model=openai.models.list().data[0].id,
        response_model=Person,
        max_retries=RETRIES,
        messages=[{"role": "user", "content": f"Extract the person: {TEXT}"}],
        temperature=0,
        max_tokens=100,
    )
except InstructorError as error:  # wrong in every attempt, or cut off at max_tokens
    print(f"The model did not manage; a larger one will. The problem: {error}")
else:
    print(f"{person.name} is {person.age} years old")
