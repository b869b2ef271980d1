"""Every example runs, against a server with a real model, and says what it should."""

import subprocess
import sys
from pathlib import Path

import pytest
from live_server import serve
from scripted import scripted_service
from server_process import environment

from jaxpaged_server.app import ENDPOINTS

pytest_plugins = ["demo_server"]

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".sh")}
# What each one prints, with the demo model at temperature 0.
PRINTS = {
    "anthropic_messages.py": ("the prompt has", "Paris", "generated]"),
    "curl.sh": tuple(f"== {method} {path}" for method, path, _ in ENDPOINTS if "{" not in path) + ("data: [DONE]",),
    "instructor_extract.py": (),  # it may manage or not
    "langchain_chat.py": ("one: The capital of France is Paris", "as it comes: ", "Spain: ", "Japan: ", "Egypt: "),
    "litellm_chat.py": ("whole: The capital of France is Paris", "as it comes: ", "too long: LiteLLM knows"),
    "openai_chat.py": ("> What is the capital of France?\nThe capital of France is Paris", "prompt tokens"),
    "openai_completions.py": (
        "[3] The opposite of hot is|",
        "' Paris' -0.26   likeliest: ' Paris' -0.26",
        "log P(prompt) = -15.0",
    ),
    "openai_tools.py": ("the model calls weather(", "the tool says: ", "the model says: "),
    "python_engine.py": ("q0: 'The capital of France is Paris", "q2: ", "cut: ", "steps"),
}


def run(name: str, url: str) -> str:
    """What an example prints; it must end well."""
    command = [str(FOLDER / name)] if name.endswith(".sh") else [sys.executable, str(FOLDER / name)]
    done = subprocess.run(command, capture_output=True, text=True, env={**environment(), "JAXPAGED_URL": url}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_none_is_forgotten():
    assert EXAMPLES == PRINTS.keys()
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert not [name for name in EXAMPLES if f"[{name}]({name})" not in table]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PRINTS))
def test_it_runs_with_a_real_model(name, demo_url):
    printed = run(name, demo_url)
    assert not [text for text in PRINTS[name] if text not in printed], printed


@pytest.mark.slow
def test_a_call_is_answered():
    def model(prompt: str) -> str:
        return "It rains." if "it is raining" in prompt else '"city": "Paris"}}\n</tool_call>'

    with serve(scripted_service(model, tool_call_parser="hermes")) as live:
        printed = run("openai_tools.py", live.base_url)
    called, told, said = printed.splitlines()
    assert (
        called == 'the model calls weather({"city": "Paris"})' and told == "the tool says: In Paris it is raining, 12 degrees."
    )
    assert said == "the model says: It rains."


@pytest.mark.slow
@pytest.mark.parametrize(("says", "printed"), [
    ('"name": "Ada Lovelace", "age": 27}}\n</tool_call>', "Ada Lovelace is 27 years old"),
    ('"name": "Ada Lovelace", "age": "young"}}\n</tool_call>', "The model did not manage"),
    ('"name": "Ada', "The model did not manage"),
])  # fmt: skip
def test_what_is_extracted_is_checked(says, printed):
    asked: list[str] = []

    def model(prompt: str) -> str:
        asked.append(prompt)
        return says if len(asked) > 1 else '"name": "Ada Lovelace", "age": -1}}\n</tool_call>'

    with serve(scripted_service(model, tool_call_parser="hermes")) as live:
        assert run("instructor_extract.py", live.base_url).startswith(printed)
    assert "greater than or equal to 0" in asked[1]  # the second time it hears what was wrong
