"""Builds a `tokenizers.Tokenizer` where there is no tokenizer.json: from GGUF metadata, from a SentencePiece model,
from vocab.json + merges.txt.

Errors are ValueError: they are about a file, not about a request.

Two families:
- `gpt2`: byte-level BPE. The merges are in the file, the way text is cut before merging is only named ("llama-bpe",
  "qwen2", ...): `KINDS` spells out what each name stands for in the model's own tokenizer.
- `llama`: SentencePiece BPE. The file has scores instead of merges; `recover_merges` turns one into the other.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxpaged import gguf_file, hub

VERSION = 1  # of what is built here: part of the cache's key
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types, SentencePiece's numbers

# ------------------------------------------------------------------------------------------------ byte-level BPE

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_SYMBOLS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"]
_TEKKEN = "|".join([*_CASED, r"\p{N}", _SYMBOLS_SLASH])
_GPT4O = "|".join([*(f"{word}{_CONTRACTION}?" for word in _CASED), r"\p{N}{1,3}", _SYMBOLS_SLASH])
_HAN_HANGUL = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    + _SPACES
)
# DeepSeek-LLM lists the cased letters of its day range by range (hexadecimal code points, first-last).
_CASED_LETTERS = """
41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c 38e-3a1 3a3-3f5
3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15
1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3
1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139
213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d a680-a69b a722-a76f a771-a787
a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2
118a0-118df 1e900-1e943
"""


def _char_class(ranges: str) -> str:
    return "[" + "".join("-".join(chr(int(end, 16)) for end in r.split("-")) for r in ranges.split()) + "]"


@dataclass(frozen=True)
class Kind:
    """How one kind of byte-level tokenizer cuts text. `cuts`: regexes (each match is a piece of its own, later ones cut
    further), or "digits" (one by one). gpt2: GPT-2's own cut comes after them. nfc: text is NFC-normalised first.
    whole_words: a piece that is a word of the vocabulary is not built from merges (tiktoken). bos: added by default."""

    cuts: tuple[str, ...] = ()
    gpt2: bool = False
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps: list = [_cut(c) for c in self.cuts]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.gpt2)])


class _Falcon(Kind):
    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:  # cuts punctuation before, and digits after, GPT-2's cut
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation(behavior="contiguous"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                pre_tokenizers.Digits(individual_digits=False),
                _cut("[0-9][0-9][0-9]"),
            ]
        )


def _cut(rule: str) -> pre_tokenizers.PreTokenizer:
    if rule == "digits":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(rule), behavior="isolated")


_GPT2 = Kind(gpt2=True)
_GPT2_NFC = Kind(gpt2=True, nfc=True)
_DIGITS = Kind(("digits",), gpt2=True)
_LLAMA3_KIND = Kind((_LLAMA3,), whole_words=True, bos=True)
_QWEN2_KIND = Kind((_QWEN2,), nfc=True)
_GPT4O_KIND = Kind((_GPT4O,), whole_words=True)

KINDS: dict[str, Kind] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "jais", "trillion", "granite-docling"), _GPT2),
    **dict.fromkeys(("mpt", "olmo"), _GPT2_NFC),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS),
    "command-r": Kind(("digits",), gpt2=True, nfc=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA3_KIND),
    **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), Kind((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "kormo", "megrez"), _QWEN2_KIND),
    "qwen35": Kind((_QWEN35,), nfc=True),
    "tekken": Kind((_TEKKEN,), whole_words=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O_KIND),
    "deepseek-llm": Kind(
        (
            r"[\r\n]",
            rf"\s?{_char_class(_CASED_LETTERS)}+",
            r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _HAN_HANGUL,
            "digits",
        )
    ),
    "deepseek-coder": Kind((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, "digits")),
    "deepseek-v3": Kind((r"\p{N}{1,3}", r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3)),
    "falcon": _Falcon(),
}


def kind_of(name: str) -> Kind:
    if name not in KINDS:
        raise ValueError(
            f"tokenizer.ggml.pre is {name!r}, a way to cut text that is not known here. Known: "
            f"{', '.join(sorted(KINDS))}. Use the model's original tokenizer.json instead."
        )
    return KINDS[name]


@dataclass
class Vocabulary:
    """tokens[id]; types[id] (NORMAL ... BYTE); scores[id] or merges ("a b", best first), whichever the file has."""

    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] | None = None
    unknown: int | None = None

    def ids(self) -> dict[str, int]:
        """text -> id. A text that appears twice keeps its first id; the later ones get a name nobody can type."""
        out: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            out[token if token not in out else f"{token}\x00{i}"] = i
        return out

    def add_to(self, tokenizer: Tokenizer, normalized: bool) -> None:
        """Control tokens (special: never part of decoded text unless asked) and user-defined ones (plain text that is
        always one token)."""
        added = [
            AddedToken(t, special=k == CONTROL, normalized=normalized and k != CONTROL)
            for t, k in zip(self.tokens, self.types)
            if k in (CONTROL, USER_DEFINED) and t
        ]
        tokenizer.add_tokens(added)


def byte_level(vocabulary: Vocabulary, kind: Kind) -> Tokenizer:
    """A byte-level BPE tokenizer. Merges are "left right" in the byte alphabet of GPT-2."""
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary.merges or ()]
    tokenizer = Tokenizer(models.BPE(vocabulary.ids(), merges, ignore_merges=kind.whole_words))  # type: ignore[arg-type]
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = kind.pre_tokenizer()  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    vocabulary.add_to(tokenizer, normalized=False)
    return tokenizer


# ------------------------------------------------------------------------------------------------- SentencePiece


def sentencepiece(vocabulary: Vocabulary, space_prefix: bool) -> Tokenizer:
    """A SentencePiece BPE tokenizer with byte fallback. space_prefix: text begins with a space (Llama, not Gemma)."""
    if not space_prefix:  # then user-defined tokens match after " " became the block: spell them so
        spelled = [t.replace(" ", "▁") if k == USER_DEFINED else t for t, k in zip(vocabulary.tokens, vocabulary.types)]
        vocabulary = Vocabulary(spelled, vocabulary.types, vocabulary.scores, vocabulary.merges, vocabulary.unknown)
    ids, unknown = vocabulary.ids(), vocabulary.unknown
    if vocabulary.merges is None:
        merges = recover_merges(vocabulary)
    else:
        merges = [tuple(merge.split(" ", 1)) for merge in vocabulary.merges]
    fallback = all(f"<0x{byte:02X}>" in ids for byte in range(256))
    unk = vocabulary.tokens[unknown] if unknown is not None else None
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unk, fuse_unk=True, byte_fallback=fallback))  # type: ignore[arg-type]
    blocks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blocks]) if space_prefix else blocks  # type: ignore
    parts: list = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * space_prefix)  # type: ignore[assignment]
    vocabulary.add_to(tokenizer, normalized=not space_prefix)
    return tokenizer


def recover_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges that make a rank-ordered BPE equal to SentencePiece's score-ordered one, best first.

    SentencePiece joins any two neighbours whose concatenation is a word, best score first, leftmost first among equals.
    So every way to cut a word in two is a candidate. But one word is only ever reached by one of them: within its span
    the joins happen as if the word stood alone. Keeping that one alone halves the table, and settles ties between
    cuts of the same word, which by rank would not be resolved leftmost first.
    """
    scores = {t: s for t, s, k in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types) if k in (NORMAL, UNUSED)}
    merges = []
    for word, score in scores.items():
        cuts = [k for k in range(1, len(word)) if word[:k] in scores and word[k:] in scores]
        cut = cuts[0] if len(cuts) == 1 else _last_join(word, scores) if cuts else None
        if cut is not None:
            merges.append((-score, word[:cut], word[cut:]))
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def _last_join(word: str, scores: dict[str, float]) -> int | None:
    """Where the last two parts of `word` meet when it is built join by join; None if it never becomes one part."""
    parts = list(word)
    while len(parts) > 2:
        joins = [scores.get(a + b, -float("inf")) for a, b in zip(parts, parts[1:])]
        best = max(joins)
        if best == -float("inf"):
            return None
        at = joins.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return len(parts[0])


# --------------------------------------------------------------------------------------------------- from a file


def from_metadata(meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes (without BOS and EOS, see `set_ends`)."""
    model = meta.get("tokenizer.ggml.model")
    tokens = meta.get("tokenizer.ggml.tokens")
    if tokens is None or model not in ("gpt2", "llama", "gemma4"):
        raise ValueError(
            f"tokenizer.ggml.model is {model!r}; known are 'gpt2' (byte-level BPE) and 'llama' "
            f"(SentencePiece BPE). Use the model's original tokenizer.json instead."
        )
    types = _numbers(meta, "token_type") or [NORMAL] * len(tokens)
    unknown = meta.get("tokenizer.ggml.unknown_token_id", types.index(UNKNOWN) if UNKNOWN in types else None)
    scores, merges = _numbers(meta, "scores"), meta.get("tokenizer.ggml.merges")
    if len(types) != len(tokens) or (model == "llama" and len(scores) != len(tokens)):
        raise ValueError(f"{len(tokens)} tokens, but {len(types)} types and {len(scores)} scores in the GGUF file.")
    vocabulary = Vocabulary(tokens, types, scores, merges, unknown)
    if model == "gpt2":
        if merges is None:
            raise ValueError("The GGUF file has no tokenizer.ggml.merges; convert the model again.")
        return byte_level(vocabulary, kind_of(meta.get("tokenizer.ggml.pre", "default")))
    return sentencepiece(vocabulary, space_prefix=meta.get("tokenizer.ggml.add_space_prefix", model == "llama"))


def _numbers(meta: dict[str, Any], key: str) -> list:
    return np.asarray(meta.get(f"tokenizer.ggml.{key}", ())).tolist()


def from_gguf(path: Path, cache_dir: Path | None = None) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a GGUF file, and the file's metadata. Merges recovered from scores are kept in `cache_dir` (None:
    the user's cache folder), under the hash of what they were recovered from: recovering takes seconds."""
    meta = gguf_file.read_header(path).metadata
    if "tokenizer.ggml.merges" in meta or meta.get("tokenizer.ggml.model") != "llama":
        return from_metadata(meta), meta
    cached = (cache_dir or hub.cache_dir() / "tokenizers") / f"{_hash(meta)}-{VERSION}.json"
    try:
        return Tokenizer.from_file(str(cached)), meta
    except Exception:  # absent, or damaged: tokenizers raises bare Exception
        tokenizer = from_metadata(meta)
    _write(cached, tokenizer.to_str())
    return tokenizer, meta


def _hash(meta: dict[str, Any]) -> str:
    """Of every tokenizer key, whatever it says."""
    digest = hashlib.sha256()
    for key in sorted(key for key in meta if key.startswith("tokenizer.")):
        value = meta[key]
        digest.update(f"{key}\0{value.tolist() if isinstance(value, np.ndarray) else value!r}\0".encode())
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    """Atomically; a cache that cannot be written is no error."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True) if part.parent.is_dir() else None


def set_ends(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes `encode(add_special_tokens=True)` put these tokens, and no others, before and after the text."""
    ends = [t for t in (bos, eos) if t is not None]
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    pairs = [(t, tokenizer.token_to_id(t)) for t in dict.fromkeys(ends)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=pairs)  # type: ignore


# ------------------------------------------------------------------------------------------ older kinds of folder


def _fields(data: Any):
    """(number, value) of each field of a protobuf message: int, 4 or 8 raw bytes, or the bytes of a sub-message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            at += size
            yield key >> 3, data[at - size : at]


def from_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece BPE model file without text normalisation (Llama, Gemma, Mistral ...)."""
    convert = (
        "Convert it once with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder) "
        "writes the tokenizer.json that is read here."
    )
    pieces, trainer, normalizer = [], {}, {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                pieces.append(dict(_fields(value)))
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(_fields(value))
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a SentencePiece model ({error}).") from error
    if trainer.get(3, 1) != 2 or normalizer.get(2):  # model_type BPE = 2; precompiled_charsmap
        raise ValueError(
            f"{path} is a SentencePiece model of a kind that is not read here (unigram, or with text normalisation). {convert}"
        )
    tokens, types = [p.get(1, b"").decode() for p in pieces], [p.get(3, NORMAL) for p in pieces]
    scores = [struct.unpack("<f", p.get(2, b"\0\0\0\0"))[0] for p in pieces]
    vocabulary = Vocabulary(tokens, types, scores, None, types.index(UNKNOWN) if UNKNOWN in types else None)
    return sentencepiece(vocabulary, space_prefix=bool(normalizer.get(3, 1)))


CLASS_KINDS = {"GPT2": "gpt-2", "CodeGen": "gpt-2", "Qwen2": "qwen2", "Cohere": "command-r", "GPTNeoX": "olmo"}


def from_vocab_and_merges(vocab: dict[str, int], merges: list[str], tokenizer_class: str | None) -> Tokenizer:
    """A GPT-2 style tokenizer from vocab.json and the lines of merges.txt."""
    name = (tokenizer_class or "GPT2Tokenizer").removesuffix("Fast").removesuffix("Tokenizer")
    if name not in CLASS_KINDS:
        raise ValueError(
            f"vocab.json and merges.txt do not say how {tokenizer_class} cuts text. Load it once with "
            f"transformers and save_pretrained it: that writes the tokenizer.json read here."
        )
    tokens = [""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        tokens[i] = token
    lines = [line for line in merges if line and not line.startswith("#version")]
    return byte_level(Vocabulary(tokens, [NORMAL] * len(tokens), merges=lines), kind_of(CLASS_KINDS[name]))
