# ruff: noqa: E501  (the models' patterns are long)
"""Tokenizers built from GGUF metadata and from SentencePiece models: token for token equal to the original's."""

from pathlib import Path

import pytest
import regex
import tiny_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from jaxpaged import gguf_tokenizer
from jaxpaged.gguf_tokenizer import KINDS, Vocabulary, from_gguf, from_metadata, from_sentencepiece
from jaxpaged.tokenizer import load_tokenizer

SPM_KEYS = dict(bos_token_id=1, eos_token_id=2, unknown_token_id=0)


# ---------------------------------------------------------------------------------------------------------- oracles

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# As the models' tokenizer.json files have them; written out here on purpose, not taken from the code under test.
PATTERNS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen35": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "tekken": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "gpt-4o": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    ],
}
NFC = {"qwen2", "qwen35"}


def cut(text: str, patterns: list[str]) -> list[str]:
    """Each pattern cuts what the ones before it left: matches, and what is between them."""
    pieces = [text]
    for pattern in patterns:
        pieces = [part for piece in pieces for part in _cut(pattern, piece)]
    return pieces


def _cut(pattern: str, text: str):
    at = 0
    for match in regex.finditer(pattern, text):
        if match.start() > at:
            yield text[at : match.start()]
        yield match.group()
        at = match.end()
    if at < len(text):
        yield text[at:]


def byte_alphabet() -> dict[int, str]:
    keep = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = iter(range(256, 512))
    return {b: chr(b) if b in keep else chr(next(rest)) for b in range(256)}


class SlowBPE:
    """Byte-level BPE by the book: the best-ranked pair, everywhere, until there is none."""

    def __init__(self, tokens, merges, patterns):
        self.ids, self.patterns, self.bytes = {t: i for i, t in enumerate(tokens)}, patterns, byte_alphabet()
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(merges)}

    def encode(self, text: str) -> list[int]:
        return [self.ids[part] for piece in cut(text, self.patterns) for part in self.merge(piece)]

    def merge(self, piece: str) -> list[str]:
        parts = [self.bytes[b] for b in piece.encode()]
        while True:
            pairs = [(self.ranks.get(p, 1 << 60), i) for i, p in enumerate(zip(parts, parts[1:]))]
            rank, at = min(pairs, default=(1 << 60, 0))
            if rank == 1 << 60:
                return parts
            parts[at : at + 2] = [parts[at] + parts[at + 1]]


# --------------------------------------------------------------------------------------------------- the demo models


def test_smollm_equals_a_slow_oracle_on_every_block(demo_gguf):
    tokenizer, meta = from_gguf(demo_gguf)
    slow = SlowBPE(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.merges"], PATTERNS["smollm"])
    for text in tiny.every_block() + tuple(tiny.CORPUS):
        assert tokenizer.encode(text).ids == slow.encode(text), ascii(text)


def test_gemma_equals_sentencepiece_on_every_block(gemma_gguf, tmp_path):
    tokenizer, meta = from_gguf(gemma_gguf, tmp_path)
    types = meta["tokenizer.ggml.token_type"]
    spelled = [t.replace(" ", "▁") if k == 4 else t for t, k in zip(meta["tokenizer.ggml.tokens"], types)]
    types[spelled.index("<unk>")] = 2
    sp = tiny.oracle(tiny.piece_model(spelled, meta["tokenizer.ggml.scores"], types, prefix=False))
    words = [t.replace("▁", " ") for t, k in zip(spelled, types) if k in (1, 4)]
    mixed = ["".join(words[i * 7919 % len(words)] for i in range(n, n + 9)) for n in range(0, 20000, 9)]
    runs = [c * n for c in ("a", "ab", " ", "\n", "\t", "=", "ha", "0", ". ", "é", "的") for n in (3, 17, 64)]
    source = [Path(gguf_tokenizer.__file__).read_text(encoding="utf-8")]
    for text in [*tiny.every_block(), *tiny.CORPUS, *mixed, *runs, *source]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == sp.encode(text), ascii(text)


def test_gemma_adds_bos_and_knows_its_ends(gemma_gguf):
    tokenizer = load_tokenizer(gemma_gguf)
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 2
    assert tokenizer.eos_token_ids == {1, 106}  # <eos>, <end_of_turn>
    assert tokenizer.encode("<end_of_turn>\n", add_special_tokens=False) == [106, 107]


# ----------------------------------------------------------------------------------------------- reading the metadata


@pytest.fixture
def small(tmp_path):
    tokens, scores, types = tiny.with_base({"a": -2.0, "b": -3.0, "ab": -1.0, "▁": -4.0})
    return tiny.write_gguf(tmp_path / "small.gguf", "llama", tokens, types, scores, **SPM_KEYS)


def test_a_truncated_file_is_a_value_error_that_names_it(small, tmp_path):
    data = small.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut.gguf is cut short"):
        load_tokenizer(tmp_path / "cut.gguf")


def test_unknown_models_and_kinds_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'bert'.*'gpt2'.*'llama'"):
        from_metadata({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]})
    with pytest.raises(ValueError, match="'brand-new'.*llama-bpe.*qwen2"):
        from_metadata(
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.tokens": ["a"],
                "tokenizer.ggml.merges": [],
                "tokenizer.ggml.pre": "brand-new",
            }
        )
    with pytest.raises(ValueError, match="no tokenizer.ggml.merges"):
        from_metadata({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"]})
    with pytest.raises(ValueError, match="2 tokens, but 2 types and 1 scores"):
        from_metadata(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": ["a", "b"],
                "tokenizer.ggml.scores": [0.0],
                "tokenizer.ggml.token_type": [1, 1],
            }
        )


# --------------------------------------------------------------------------------------------------- byte-level kinds


@pytest.mark.parametrize("kind", PATTERNS)
def test_text_is_cut_as_the_model_cuts_it(kind):
    alphabet, splitter = byte_alphabet(), KINDS[kind].pre_tokenizer()
    for text in tiny.every_block(3) + tuple(tiny.CORPUS):
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(text)]
        expected = ["".join(alphabet[b] for b in part.encode()) for part in cut(text, PATTERNS[kind])]
        assert pieces == expected, ascii(text)
    assert KINDS[kind].nfc == (kind in NFC)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_every_byte(kind):
    alphabet, splitter = byte_alphabet(), KINDS[kind].pre_tokenizer()
    for text in tiny.TRICKY + tiny.CORPUS:
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(text)]
        assert "".join(pieces) == "".join(alphabet[b] for b in text.encode())


def test_falcon_cuts_numbers_by_three_and_punctuation_apart():
    pieces = [p for p, _ in KINDS["falcon"].pre_tokenizer().pre_tokenize_str("x 12345!?y")]
    assert pieces == ["x", "Ġ", "123", "45", "!?", "y"]


def test_deepseek_llm_knows_cased_letters_and_their_neighbours():
    def split(text):
        return [p for p, _ in KINDS["deepseek-llm"].pre_tokenizer().pre_tokenize_str(text)]

    assert split("Ab cd") == ["Ab", "Ġcd"]
    assert len(split("éσЖ")) == 1 and len(split("é\u01bbé")) == 3  # U+01BB is a letter without case
    assert split("12") == ["1", "2"]


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "smollm"])
def test_a_byte_level_gguf_is_the_tokenizer_it_was_made_from(kind, tmp_path):
    original = tiny.byte_level(**{"<|end|>": True, "<think>": False})
    path = tiny.gguf_of(tmp_path / "t.gguf", original, pre=kind, eos_token_id=original.token_to_id("<|end|>"))
    tokenizer, _ = from_gguf(path)
    original.pre_tokenizer = KINDS[kind].pre_tokenizer()
    original.model = models.BPE(*_vocab_and_merges(original), ignore_merges=KINDS[kind].whole_words)
    for text in tiny.every_block(2) + ("a<|end|>b<think> c", "<|end|", " <think>"):
        assert tokenizer.encode(text).ids == original.encode(text).ids
    ids = tokenizer.encode("a<|end|>b<think> c").ids
    assert tokenizer.decode(ids) == "ab<think> c" == original.decode(ids)


def _vocab_and_merges(tokenizer: Tokenizer):
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]


def test_llama3_adds_bos_unless_the_file_says_no(tmp_path):
    original = tiny.byte_level(**{"<|begin|>": True})
    bos = original.token_to_id("<|begin|>")
    for n, (keys, expected) in enumerate(
        [
            ({}, True),
            ({"add_bos_token": False}, False),
            ({"pre": "gpt-2"}, False),
            ({"pre": "gpt-2", "add_bos_token": True}, True),
        ]
    ):
        path = tiny.gguf_of(tmp_path / f"{n}.gguf", original, bos_token_id=bos, **{"pre": "llama-bpe", **keys})
        ids = load_tokenizer(path).encode("hi")
        assert (ids[0] == bos) is expected, keys


# ------------------------------------------------------------------------------------------------------ SentencePiece

alphabet = st.sampled_from("ab▁")
words = st.text(alphabet, min_size=2, max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.lists(words, unique=True, max_size=25), st.randoms(), st.lists(st.text(alphabet, max_size=30), max_size=8))
def test_merges_recovered_from_any_scores_equal_sentencepiece(vocabulary, random, texts):
    """Scores in any order, not only the order a trainer makes."""
    order = list(range(len(vocabulary)))
    random.shuffle(order)
    tokens, scores, types = tiny.with_base(dict(zip(vocabulary, (-float(i) for i in order))) | dict.fromkeys("ab▁", -99.0))
    sp = tiny.oracle(tiny.piece_model(tokens, scores, types, prefix=False))
    tokenizer = gguf_tokenizer.sentencepiece(Vocabulary(tokens, types, scores, unknown=0), space_prefix=False)
    for text in [*texts, *vocabulary, "ab" * 12, "a" * 17, "aab" * 9]:
        assert tokenizer.encode(text).ids == sp.encode(text)


@pytest.mark.parametrize("prefix", [False, True])
def test_a_sentencepiece_gguf_equals_sentencepiece(prefix, tmp_path):
    user = [] if prefix else ["\n", "\n\n", "▁▁", "▁▁▁", "<b>", "\t"]
    tokens, scores, types = tiny.with_base(tiny.piece_words(), user)
    sp = tiny.oracle(tiny.piece_model(tokens, scores, types, prefix))
    stored = [t.replace("▁", " ") if k == 4 else t for t, k in zip(tokens, types)]  # converters write them so
    path = tiny.write_gguf(tmp_path / "t.gguf", "llama", stored, types, scores, add_space_prefix=prefix, **SPM_KEYS)
    tokenizer, _ = from_gguf(path, tmp_path)
    for text in tiny.every_block() + tuple(tiny.CORPUS):
        if "<s>" not in text:  # a control token's name: SentencePiece has no such thing in text
            assert tokenizer.encode(text, add_special_tokens=False).ids == sp.encode(text), ascii(text)


def test_a_sentencepiece_gguf_adds_bos_by_default_and_splits_at_control_tokens(tmp_path):
    tokens, scores, types = tiny.with_base(tiny.piece_words())
    path = tiny.write_gguf(tmp_path / "t.gguf", "llama", tokens, types, scores, add_space_prefix=False, **SPM_KEYS)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("the") == [1, *tokenizer.encode("the", add_special_tokens=False)]
    ids = tokenizer.encode("the</s>the", add_special_tokens=False)
    assert ids.count(2) == 1 and tokenizer.decode(ids) == "thethe"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the</s>the"


def test_bytes_and_control_words_are_not_built_by_merges():
    """'<0x41>' in a text is six characters, never the byte token of that name."""
    words = {c: -10.0 for c in "<0x41>s/"} | {"<0": -1.0, "<0x": -2.0, "41": -3.0, "41>": -4.0}
    tokens, scores, types = tiny.with_base(words)
    tokenizer = gguf_tokenizer.sentencepiece(Vocabulary(tokens, types, scores, unknown=0), space_prefix=False)
    assert tokenizer.encode("<0x41>").tokens == ["<0x", "41>"]


def test_words_that_appear_twice_keep_their_first_id_and_every_id_has_a_token():
    vocabulary = Vocabulary(["a", "b", "ab", "ab"], [1, 1, 1, 1], [0.0, 0.0, -1.0, -2.0])
    tokenizer = gguf_tokenizer.sentencepiece(vocabulary, space_prefix=False)
    assert tokenizer.encode("ab").ids == [2] and tokenizer.get_vocab_size() == 4


# --------------------------------------------------------------------------------------------------------- the cache


def test_recovered_merges_are_kept_and_found_again(small, tmp_path, monkeypatch):
    first, _ = from_gguf(small, tmp_path / "cache")
    monkeypatch.setattr(gguf_tokenizer, "recover_merges", lambda *_: pytest.fail("recovered again"))
    second, meta = from_gguf(small, tmp_path / "cache")
    assert second.to_str() == first.to_str() and meta["tokenizer.ggml.bos_token_id"] == 1
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".json"]


def test_a_damaged_cache_is_rebuilt_and_an_impossible_one_ignored(small, tmp_path):
    first, _ = from_gguf(small, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(file.read_text()[:100])
    assert from_gguf(small, tmp_path / "cache")[0].to_str() == first.to_str()
    assert Tokenizer.from_file(str(file)).to_str() == first.to_str()
    (tmp_path / "file").write_text("not a folder")
    assert from_gguf(small, tmp_path / "file" / "cache")[0].to_str() == first.to_str()


def test_another_vocabulary_is_another_cache_entry(small, tmp_path):
    from_gguf(small, tmp_path / "cache")
    tokens, scores, types = tiny.with_base({"a": -2.0, "b": -3.0, "ba": -1.0, "▁": -4.0})
    other = tiny.write_gguf(tmp_path / "other.gguf", "llama", tokens, types, scores, **SPM_KEYS)
    assert from_gguf(other, tmp_path / "cache")[0].encode("aba").tokens == ["▁", "a", "ba"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


# -------------------------------------------------------------------------------------------------- tokenizer.model


@pytest.mark.parametrize("prefix", [False, True])
def test_a_sentencepiece_model_file_equals_sentencepiece(prefix, tmp_path):
    tokens, scores, types = tiny.with_base(tiny.piece_words())
    model = tiny.piece_model(tokens, scores, types, prefix)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    tokenizer, sp = from_sentencepiece(tmp_path / "tokenizer.model"), tiny.oracle(model)
    for text in tiny.every_block(3) + tuple(tiny.CORPUS):
        if "<s>" not in text:
            assert tokenizer.encode(text).ids == sp.encode(text), ascii(text)


def test_sentencepiece_models_of_another_kind_are_refused_with_the_way_out(tmp_path):
    model = tiny.piece_model(*tiny.with_base({"a": -1.0}), prefix=True)
    model.trainer_spec.model_type = 1
    (tmp_path / "unigram.model").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="unigram.*save_pretrained"):
        from_sentencepiece(tmp_path / "unigram.model")
    model.trainer_spec.model_type = 2
    model.normalizer_spec.precompiled_charsmap = b"\x01\x02"
    (tmp_path / "nmt.model").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="normalisation"):
        from_sentencepiece(tmp_path / "nmt.model")
    (tmp_path / "junk.model").write_bytes(b"\xff\xfe\xfd" * 5)
    with pytest.raises(ValueError, match="junk.model"):
        from_sentencepiece(tmp_path / "junk.model")
