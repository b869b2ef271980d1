"""Argument values: JSON text, Python literals, and text that a tool's JSON schema gives a type."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

Schemas = Mapping[str, Mapping[str, Any]]  # tool -> parameter -> its JSON schema

NOT_A_VALUE = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)  # what json and ast raise on bad text
ANY: frozenset[str] = frozenset()
STRING = frozenset(["string"])
KINDS: dict[type, set[str]] = {
    bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, type(None): {"null"}, dict: {"object"},
    list: {"array"}, tuple: {"array"},
}  # fmt: skip
JSON_NAMES = {"true": True, "false": False, "null": None}


def schemas_of(tools: Sequence[Mapping]) -> Schemas:
    """The parameters of OpenAI tool definitions."""
    functions = [_mapping(tool.get("function", tool)) for tool in tools]
    return {f.get("name", ""): _mapping(_mapping(f.get("parameters")).get("properties")) for f in functions}


def _mapping(x: Any) -> Mapping:
    return x if isinstance(x, Mapping) else {}


def _list(x: Any) -> list:
    return x if isinstance(x, list) else [x]


def types_of(schema: Any) -> frozenset[str]:
    """The JSON types a schema allows; ANY if it does not say here. A schema that says nothing is taken for a string."""
    schema = _mapping(schema)
    if given := schema.get("type"):
        return frozenset(map(str, _list(given)))
    for key in ("anyOf", "oneOf", "allOf"):
        if choices := _list(schema.get(key, [])):
            found = [types_of(choice) for choice in choices]
            return ANY if ANY in found else frozenset().union(*found)
    if values := _list(schema.get("enum", [])) or ([schema["const"]] if "const" in schema else []):
        return frozenset().union(*(KINDS.get(type(value), STRING) for value in values))
    return ANY if "$ref" in schema else STRING


def typed_json(text: str, types: frozenset[str]) -> str:
    """JSON text of a value written as bare text: of one of the types if it can be read so, else a string."""
    try:
        value = _read(text.strip())
        if not isinstance(value, str) and (types == ANY or types & KINDS.get(type(value), ANY)):
            return to_json(value)
    except NOT_A_VALUE:
        pass
    return to_json(text)


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return read_literal(text)


def read_literal(text: str) -> Any:
    """A Python literal, in which JSON's true, false and null are known too. Raises one of NOT_A_VALUE."""
    return _literal(_parse(text))


def read_keywords(text: str) -> dict[str, Any]:
    """The arguments of a Python call, "(a=1, b='x')": keywords with literal values. Raises one of NOT_A_VALUE."""
    call = _parse(f"f{text}")
    if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
        raise ValueError("not a call with keyword arguments")
    return {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}


def _parse(text: str) -> ast.expr:
    with warnings.catch_warnings():  # "\d" in a string is a warning of the compiler's, and what the model meant
        warnings.simplefilter("ignore")
        return ast.parse(text, mode="eval").body


class _JsonNames(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(JSON_NAMES[node.id]) if node.id in JSON_NAMES else node


def _literal(node: ast.expr) -> Any:
    return ast.literal_eval(_JsonNames().visit(node))


def to_json(value: Any) -> str:
    """JSON text, valid and free of lone surrogates. Raises one of NOT_A_VALUE for what JSON does not have."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text
