"""Which replica gets a request: the one that has most likely seen the beginning of its prompt, unless it is much busier.

Rendezvous hashing (Thaler and Ravishankar, 1998): every front end ranks the replicas for a key by a hash of both, so all agree
without talking to each other, and a replica that goes or comes moves its own keys only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
CHARACTERS_A_TOKEN = 4  # about: how much of a prompt of token ids is looked at


class Prompted(msgspec.Struct):
    """What of a body says how its prompt begins, whatever the API. Everything else is skipped."""

    model: Any = None
    prompt: Any = None  # completions, /tokenize
    messages: Any = None  # chat, Anthropic
    system: Any = None  # Anthropic
    input: Any = None  # responses, embeddings
    instructions: Any = None  # responses
    prompt_token_ids: Any = None
    token_ids: Any = None
    cache_salt: Any = None
    prompt_cache_key: Any = None


_decode = msgspec.json.Decoder(Prompted).decode


def prompt_key(body: bytes, length: int) -> str:
    """A key that requests share whose prompts begin alike; "" if the body has no prompt (or is none: the engine says so).

    A conversation's key is of what precedes its second turn, so that all its turns have the same; of a text it is the first
    `length` characters. `prompt_cache_key`, which OpenAI has for this, takes the place of the prompt.
    """
    try:
        given = _decode(body)
    except msgspec.MsgspecError:
        return ""
    begin = given.prompt_cache_key if isinstance(given.prompt_cache_key, str) else _beginning(given, length)
    if not begin:
        return ""
    named = f"{given.model}\0{given.cache_salt}\0{begin}"
    return hashlib.blake2b(named.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _beginning(given: Prompted, length: int) -> str:
    turns = given.messages if isinstance(given.messages, list) else given.input if isinstance(given.input, list) else None
    ids = next((x for x in (given.prompt, given.prompt_token_ids, given.token_ids, given.input) if _is_ids(x)), None)
    if ids is not None:
        return " ".join(map(str, (ids[0] if isinstance(ids[0], list) else ids)[: length // CHARACTERS_A_TOKEN]))
    first = _first_turns(turns) if turns else (given.prompt or given.input)
    return "\0".join(_text(part) for part in (given.system, given.instructions, first) if part)[:length]


def _is_ids(value: Any) -> bool:
    """Token ids, or a list of prompts of token ids."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    return isinstance(value, list) and bool(value) and isinstance(value[0], int)


def _first_turns(turns: list[Any]) -> list[Any]:
    """Messages up to the first of the user; of texts the first one."""
    if not isinstance(turns[0], dict):
        return turns[:1]
    users = (i for i, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user")
    return turns[: next(users, len(turns) - 1) + 1]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\0".join(map(_text, value))
    if isinstance(value, dict):
        return _text(value.get("text") or value.get("content") or "")
    return value if isinstance(value, str) else ""


def ranked(key: str, names: Sequence[str]) -> list[str]:
    """Replicas by how much they are the key's, the first most."""
    weigh = lambda name: hashlib.blake2b(name.encode(), key=key.encode()[:64], digest_size=8).digest()
    return sorted(names, key=weigh, reverse=True)


def choose(key: str, loads: Mapping[T, int], spill: int, name: Callable[[T], str],
           two: Callable[[Sequence[T]], Sequence[T]]) -> list[list[T]]:  # fmt: skip
    """Whom to ask, in groups: the less busy one of the first group that takes the request gets it.

    key: "" for a request without a prompt. loads: requests that each replica has. spill: so many more than the least busy one
    may the key's replica have; if it has more, or there is no key, two at random are compared (the power of two choices).
    """
    if not loads:
        return []
    everyone = list(loads)
    by_name = {name(one): one for one in everyone}
    order = [by_name[one] for one in ranked(key, list(by_name))] if key else []
    if not order or loads[order[0]] > min(loads.values()) + spill:
        return [list(two(everyone)), everyone]
    return [order[:1], order[1:2], everyone]
