"""Text to token ids and back: the tokenizer of a model folder or GGUF file, and its chat template.

    tokenizer = load_tokenizer(Path("models/llama"))      # or a .gguf file
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])

Tokens come from `tokenizers`, templates from a sandboxed Jinja. What a request can get wrong is a RequestError, what is
wrong with the files a ValueError that names the file. The incremental half, `Detokenizer`, lives in detokenizer.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from jaxpaged import gguf_tokenizer
from jaxpaged.chat_template import read_messages, render, wants_parts
from jaxpaged.detokenizer import BYTEWISE, Delta, Detokenizer, Pieces
from jaxpaged.request import RequestError

__all__ = ["Delta", "Detokenizer", "Tokenizer", "load_tokenizer"]

LONG_TEXT = 4096  # characters: a text that may take so long that others should not wait for it
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Control tokens that end an answer, whichever of them a GGUF file calls its EOS (llama.cpp has such a list too).
END_NAMES = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<EOT>",
        "<|return|>",
        "<|call|>",
        "<|end_of_text|>",
        "<|END_OF_TURN_TOKEN|>",
        "<｜end▁of▁sentence｜>",
    )
)


class Tokenizer:
    """One model's tokenizer.

    vocab_size: ids are in [0, vocab_size). bos_token_id, eos_token_id: None where the model has none. eos_token_ids:
    every id that ends a sequence. special_ids: the ids `skip_special_tokens` skips. chat_template: the default one.
    pieces: the bytes of each token, None for the few kinds of tokenizer where a token alone has no bytes.
    """

    def __init__(
        self,
        backend: Backend,
        named: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
    ):
        self.backend, self.named, self.chat_templates = backend, dict(named or {}), dict(chat_templates or {})
        added = backend.get_added_tokens_decoder()
        self.vocab_size = max([backend.get_vocab_size(), *(i + 1 for i in added)])
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_token_id, self.eos_token_id = self._named_id("bos_token"), self._named_id("eos_token")
        own = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids = frozenset((*own, *eos_token_ids))
        self.chat_template = self.chat_templates.get("default")
        self.pieces = _pieces(backend)

    def _named_id(self, name: str) -> int | None:
        token = self.named.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def all_special_ids(self) -> list[int]:
        return sorted(self.special_ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; with the BOS and EOS that the model's tokenizer adds, unless add_special_tokens=False."""
        if not isinstance(text, str):
            raise RequestError(f"The text to tokenise must be a string, got {type(text).__name__}.", "prompt")
        try:
            if len(text) > LONG_TEXT:  # of a single text the library holds the interpreter until it is done
                return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # a str, but not one that has UTF-8
            at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            raise RequestError(
                f"The text has a lone surrogate (half a UTF-16 pair) at character {at}; send valid Unicode.", "prompt"
            ) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD."""
        self._check(ids)
        if self.pieces is None:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return self.pieces.join(ids, self.special_ids if skip_special_tokens else frozenset())

    def _check(self, ids: Iterable[int]) -> None:
        for i in ids:
            if not isinstance(i, int) and not hasattr(i, "__index__"):
                raise RequestError(f"Token ids must be integers, got {i!r}.", "prompt")
            if not 0 <= i < self.vocab_size:
                raise RequestError(f"Token id {i} is out of range: this model's ids are 0..{self.vocab_size - 1}.", "prompt")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token: a piece of a character is a piece of its UTF-8. Empty for ids without a token."""
        if self.pieces is not None:
            return self.pieces[token]
        text = self.backend.id_to_token(token) if token < self.vocab_size else None
        return (text or "").encode()

    def token(self, token: int) -> str:
        """The text of one token, with its leading space; special tokens by name."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping] | None = None,
        chat_template: str | None = None,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> str | list[int]:
        """The prompt of a conversation: ids, or text with tokenize=False.

        messages: dicts with "role" and "content" (a string, or a list of {"type": "text", "text": ...}).
        continue_final_message: the model goes on with the last message; needs add_generation_prompt=False.
        chat_template: a Jinja template, or the name of one of the model's. kwargs: further variables of the template.
        BOS is what the template writes: none is added to it.
        """
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: the model either "
                "goes on with the last message or begins a new one.",
                "continue_final_message",
            )
        template = self._template(chat_template, tools)
        values = {
            **self.named,
            "add_generation_prompt": add_generation_prompt,
            "tools": list(tools) if tools else None,
            **kwargs,
        }
        text = render(template, read_messages(messages, wants_parts(template)), values, continue_final_message)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _template(self, given: str | None, tools: Sequence | None) -> str:
        names = [given] if given is not None else ["tool_use"] * bool(tools) + ["default"]
        for name in names:
            if name in self.chat_templates:
                return self.chat_templates[name]
        if given is not None:
            return given
        raise RequestError(
            "This model has no chat template, so messages cannot become a prompt. Give one "
            "(chat_template, or --chat-template when serving), or complete a plain prompt instead.",
            "messages",
        )


# ------------------------------------------------------------------------------------------------- bytes of a token


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 characters stand for themselves, the other 68 bytes are U+0100 and on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _pieces(backend: Backend) -> Pieces | None:
    """The bytes of each token, if the decoder is one of the two kinds that have them: byte-level, SentencePiece."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        alphabet = _byte_alphabet()

        def byte_level(token: int) -> bytes:
            text = _token_text(backend, token)
            data = [alphabet.get(c) for c in text]
            return text.encode() if None in data else bytes(data)  # type: ignore[arg-type]

        return Pieces(byte_level)
    blocks = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = kinds[3:] == ["Strip"] and (steps[3]["content"], steps[3]["start"], steps[3]["stop"]) == (" ", 1, 0)
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == blocks and (strip or not kinds[3:]):
        return Pieces(lambda token: _fallback_bytes(_token_text(backend, token)), BYTEWISE, strip)
    return None


def _token_text(backend: Backend, token: int) -> str:
    return (backend.id_to_token(token) or "") if token >= 0 else ""


def _fallback_bytes(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return text.replace("▁", " ").encode()


# --------------------------------------------------------------------------------------------------------- loading


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder, or of a .gguf file.

    A folder has tokenizer.json (or vocab.json and merges.txt, or a SentencePiece tokenizer.model), and may have
    tokenizer_config.json, special_tokens_map.json, generation_config.json, chat_template.jinja.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"No model folder or .gguf file at {path}.")
    if path.name == "tokenizer.json":
        return _load_folder(path.parent)
    return _load_gguf(path)


def _load_gguf(path: Path) -> Tokenizer:
    backend, meta = gguf_tokenizer.from_gguf(path)
    tokens, types = meta["tokenizer.ggml.tokens"], meta.get("tokenizer.ggml.token_type", ())
    ids = {k: meta.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    for key, i in ids.items():
        if i is not None and not 0 <= i < len(tokens):
            raise ValueError(f"{path}: tokenizer.ggml.{key}_token_id is {i}, but there are {len(tokens)} tokens.")
    rename = {"unknown": "unk_token", "padding": "pad_token"}
    named = {rename.get(k, f"{k}_token"): tokens[i] for k, i in ids.items() if i is not None}
    spm, kind = meta["tokenizer.ggml.model"] == "llama", meta.get("tokenizer.ggml.pre", "default")
    bos = meta.get("tokenizer.ggml.add_bos_token", spm or gguf_tokenizer.kind_of(kind).bos)
    eos = meta.get("tokenizer.ggml.add_eos_token", False)
    gguf_tokenizer.set_ends(backend, named.get("bos_token") if bos else None, named.get("eos_token") if eos else None)
    ends = {i for k in ("eos", "eot", "eom") if (i := ids[k]) is not None}
    ends |= {i for i, k in enumerate(types) if k == gguf_tokenizer.CONTROL and tokens[i] in END_NAMES}
    prefix = "tokenizer.chat_template"
    templates = {
        "default" if k == prefix else k[len(prefix) + 1 :]: v
        for k, v in meta.items()
        if (k == prefix or k.startswith(prefix + ".")) and isinstance(v, str)
    }
    return Tokenizer(backend, named, ends, templates)


def _load_folder(folder: Path) -> Tokenizer:
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    backend = _backend(folder, config)
    named = {name: text for name in NAMED if (text := _content(config.get(name)))}
    _add_tokens(backend, folder, config, named)
    ends = [named.get(f"{end}_token") if config.get(f"add_{end}_token") else None for end in ("bos", "eos")]
    if any(ends) and not backend.num_special_tokens_to_add(False):  # else tokenizer.json says what is added
        gguf_tokenizer.set_ends(backend, *ends)
    eos = _read_json(folder / "generation_config.json").get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return Tokenizer(backend, named, ids, _templates(folder, config))


def _backend(folder: Path, config: dict) -> Backend:
    if (file := folder / "tokenizer.json").is_file():
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{file} cannot be read: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        return backend
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        return gguf_tokenizer.from_vocab_and_merges(_read_json(folder / "vocab.json"), merges, config.get("tokenizer_class"))
    if (file := folder / "tokenizer.model").is_file():
        return gguf_tokenizer.from_sentencepiece(file)
    raise ValueError(
        f"{folder} has no tokenizer.json (nor vocab.json and merges.txt, nor tokenizer.model). Download "
        f"the model's tokenizer files, or make tokenizer.json with transformers: "
        f"AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
    )


def _add_tokens(backend: Backend, folder: Path, config: dict, named: dict[str, str]) -> None:
    """Tokens that the configuration adds to those of tokenizer.json; named ones are special."""
    wanted = {int(i): v for i, v in config.get("added_tokens_decoder", {}).items()}
    wanted |= {i: t for t, i in _read_json(folder / "added_tokens.json").items() if i not in wanted}
    have = {token.content for token in backend.get_added_tokens_decoder().values()}
    for i, token in sorted(wanted.items()):
        options = dict(token) if isinstance(token, dict) else {"content": token}
        options.pop("__type", None)
        if options["content"] in have:
            continue
        backend.add_tokens([AddedToken(**options)])
        if (got := backend.token_to_id(options["content"])) != i:
            raise ValueError(f"{folder}: added token {options['content']!r} should have id {i} but gets {got}.")
    extra = [*config.get("additional_special_tokens", ()), *_values(config.get("extra_special_tokens", ()))]
    special = [text for token in [*named.values(), *extra] if (text := _content(token))]
    marked = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    backend.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t in special
            if t not in marked and backend.token_to_id(t) is not None
        ]
    )


def _values(x: Any) -> list:
    return list(x.values()) if isinstance(x, dict) else list(x or ())


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _templates(folder: Path, config: dict) -> dict[str, str]:
    """Name -> template. chat_template.jinja wins over tokenizer_config.json."""
    given = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template") or {}
    if isinstance(given, list):
        given = {entry["name"]: entry["template"] for entry in given}
    out = {"default": given} if isinstance(given, str) else dict(given)
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        out[file.stem] = file.read_text(encoding="utf-8")
    if (file := folder / "chat_template.jinja").is_file():
        out["default"] = file.read_text(encoding="utf-8")
    return out


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not a JSON object.")
    return value
