"""Tokenizers small enough to be made inside a test, GGUF files that hold them, and text that has something of
everything."""

import json
import unicodedata
from collections.abc import Sequence
from functools import cache

import gguf
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog does not mind; it's only a fox, they'll say.",
    "def f(x):\n    return [i ** 2 for i in range(10) if i % 2 == 0]\n\n\nclass A:\n\tpass\r\n",
    "Grüße aus Köln, naïve café, São Paulo, Ελληνικά, Русский язык, 中文字符, 日本語テキスト, 한국어, العربية, עברית",
    "emoji 👩‍👩‍👧 🏳️‍🌈 👍🏽 and numbers 1234567890 ٣٤٥ ½ ² Ⅷ, DON'T shout, I'LL go",
]
TRICKY = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n\r\n \n",
    "a  b   c    d",
    " leading",
    "trailing ",
    "\t\ttabs\t",
    "x\u00a0y\u2003z\u3000w\u2028v",
    "\x00\x01\x1f\x7f\x85",
    "12345 ١٢٣ ४५६ ½ Ⅷ ² 1,234.56",
    "don't DON'T I'll we'VE it's 'sx",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪",
    "e\u0301\u0323\u0300 Å Å",
    "\u202eרtl العربية mixed LTR",
    "camelCaseHTTPServer2 snake_case",
    "$+<=>^~|`@#%&*",
    "▁▁ ▁ literal blocks",
    "/* c */ #include <a.h>\n\n\n\n  if (x<=3) { y+=1; }  \n",
    "\ufeffbom \ufffd \U0010fffd \ue000",
    "ǅǈ ſ K Å ﬁ ﷺ",
    "<0x0A><s>",
    "日本語テキスト。「かぎ」、…——！？",
    "한국어 텍스트",
    "ไทยข้อความ",
    "\u200b\u200c\u200d\u2060",
]


@cache
def every_block(a_chunk: int = 5) -> tuple[str, ...]:
    """Texts of a few assigned characters of each 64 code points (finer than blocks), joined in several ways."""
    out = list(TRICKY)
    for start in range(0, 0x110000, 64):
        if 0xD800 <= start < 0xE000:
            continue
        assigned = [c for c in map(chr, range(start, start + 64)) if unicodedata.category(c) != "Cn"]
        if some := assigned[:: max(1, len(assigned) // a_chunk)]:
            out += ["".join(some), " ".join(some) + " 1", "a" + "a".join(some) + "\n\n", f" x{some[0]}{some[-1]}1'S{some[0]}. "]
    return tuple(out)


def byte_level(vocab_size: int = 600, **special: bool) -> Tokenizer:
    """GPT-2 style, trained on CORPUS; `special`: added tokens and whether they are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(t, special=s, normalized=False) for t, s in special.items()])
    return tokenizer


def metaspace() -> Tokenizer:
    """A tokenizer whose decoder is not a map of tokens to bytes: spaces come from a Metaspace decoder."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


# -------------------------------------------------------------------------------------------------- SentencePiece


def piece_model(tokens, scores, types, prefix: bool) -> sentencepiece_model_pb2.ModelProto:
    """A SentencePiece BPE model with the identity normaliser and byte fallback."""
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(tokens, scores, types):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = 6 in types
    spec = {t: i for i, t in enumerate(tokens)}
    for name, token in (("unk_id", "<unk>"), ("bos_id", "<s>"), ("eos_id", "</s>"), ("pad_id", "<pad>")):
        setattr(model.trainer_spec, name, spec.get(token, -1))
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return model


def oracle(model: sentencepiece_model_pb2.ModelProto) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


BASE = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
BASE_TYPES = [2, 3, 3, *[6] * 256]


def with_base(words: dict[str, float], user: Sequence[str] = ()):
    """(tokens, scores, types): unk, bos, eos, the bytes, user-defined tokens, then `words`."""
    words = {word: score for word, score in words.items() if word not in user}
    tokens = [*BASE, *user, *words]
    return tokens, [0.0] * (len(BASE) + len(user)) + list(words.values()), BASE_TYPES + [4] * len(user) + [1] * len(words)


@cache
def piece_words(size: int = 500) -> dict[str, float]:
    """Words and scores of a SentencePiece BPE trained (by `tokenizers`) on CORPUS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    vocab = tokenizer.get_vocab()
    words = sorted((w for w in vocab if len(w) > 1), key=vocab.__getitem__) + sorted(w for w in vocab if len(w) == 1)
    return {word: -float(i) for i, word in enumerate(words)}


# ------------------------------------------------------------------------------------------------------- GGUF files


def write_gguf(path, model: str, tokens, types, scores=None, merges=None, **keys):
    """A GGUF file without tensors; `keys` become tokenizer.ggml.<key> (chat_template: tokenizer.chat_template)."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
    if "chat_template" in keys:
        writer.add_chat_template(keys.pop("chat_template"))
    for key, value in keys.items():
        add = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32}[type(value)]
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def gguf_of(path, tokenizer: Tokenizer, control=(), **keys):
    """The GGUF file of a byte-level tokenizer."""
    state = json.loads(tokenizer.to_str())
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    added = {t["content"]: 3 if t["special"] else 4 for t in state["added_tokens"]}
    merges = [" ".join(m) for m in state["model"]["merges"]]
    return write_gguf(path, "gpt2", tokens, [added.get(t, 1) for t in tokens], None, merges, **keys)
