"""Token ids to text as they come: equal to decoding everything at once, whatever the chunks; stop strings."""

import random

import pytest
import tiny_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged import gguf_tokenizer
from jaxpaged.detokenizer import Detokenizer, StopStrings
from jaxpaged.gguf_tokenizer import Vocabulary
from jaxpaged.request import SamplingParams
from jaxpaged.tokenizer import Tokenizer, load_tokenizer


def sentencepiece(prefix: bool) -> Tokenizer:
    tokens, scores, types = tiny.with_base(tiny.piece_words(), [] if prefix else ["\n", "▁▁"])
    return Tokenizer(gguf_tokenizer.sentencepiece(Vocabulary(tokens, types, scores, unknown=0), space_prefix=prefix))


TOKENIZERS = {
    "byte-level": Tokenizer(tiny.byte_level(**{"<|end|>": True, "<think>": False, "né ": False})),
    "llama": sentencepiece(prefix=True),
    "gemma": sentencepiece(prefix=False),
    "metaspace": Tokenizer(tiny.metaspace()),
    "word-piece": Tokenizer(tiny.word_piece()),
}
EXACT = ["byte-level", "llama", "gemma"]


def stream(tokenizer, ids, prompt=(), sizes=(1,), **params) -> tuple[str, str | None]:
    """The text of the deltas joined, pushed in chunks of `sizes` in turn; and the stop string."""
    detokenizer, out, at, n = Detokenizer(tokenizer, prompt, SamplingParams(**params)), [], 0, 0
    while at < len(ids):
        size = sizes[n % len(sizes)]
        out.append(detokenizer.push(ids[at : at + size]).text)
        assert detokenizer.text == "".join(out)
        at, n = at + size, n + 1
    out.append(detokenizer.finish())
    assert detokenizer.text == "".join(out)
    return "".join(out), detokenizer.stop


def ids_of(name: str):
    """Random ids, bytes that make no UTF-8 and special tokens among them; and real text, cut anywhere."""
    tokenizer = TOKENIZERS[name]
    real = [i for text in tiny.CORPUS + tiny.TRICKY for i in tokenizer.encode(text, add_special_tokens=False)]
    junk = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=25)
    bytewise = st.lists(st.integers(0, 262), max_size=25)  # SentencePiece: control and byte tokens; else some bytes
    cut = st.tuples(st.integers(0, len(real)), st.integers(0, 40)).map(lambda c: real[c[0] : c[0] + c[1]])
    return st.lists(st.one_of(junk, bytewise, cut), max_size=3).map(lambda parts: sum(parts, []))


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_deltas_joined_are_the_text_decoded_at_once(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(ids_of(name))
    skip = data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    text, _ = stream(tokenizer, ids, sizes=sizes, skip_special_tokens=skip)
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_prompt_is_context(name, data):
    """prompt's text + output's text = text of both, where the prompt ends between characters."""
    tokenizer = TOKENIZERS[name]
    prompt = tokenizer.encode(data.draw(st.sampled_from(["", "the", "x é", "👍", " fox\n"])))
    ids = data.draw(ids_of(name))
    text, _ = stream(tokenizer, ids, prompt)
    assert tokenizer.decode(prompt) + text == tokenizer.decode(prompt + ids)


@pytest.mark.parametrize("name", ["metaspace", "word-piece"])
def test_other_decoders_stream_real_text(name):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.pieces is None
    for text in tiny.CORPUS:
        ids = tokenizer.encode(text)
        for prompt in ([], ids[:1], ids[:9]):
            rest = ids[len(prompt) :]
            expected = tokenizer.decode(ids)[len(tokenizer.decode(prompt)) :]
            assert stream(tokenizer, rest, prompt)[0] == expected
            assert stream(tokenizer, rest, prompt, sizes=(3, 1))[0] == expected


def test_other_decoders_move_on_when_nothing_makes_sense():
    """Endless U+FFFD must not pile up: 2,000 undecodable tokens come out as they go."""
    backend = tiny.byte_level()
    tokenizer = Tokenizer(backend)
    junk = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xff")
    tokenizer.pieces = None  # as if its decoder were unknown
    detokenizer = Detokenizer(tokenizer, [], SamplingParams())
    shown = sum(len(detokenizer.push([junk]).text) for _ in range(2000))
    assert 1900 < shown <= 2000 and len(detokenizer._text.window) < 50


def emoji_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token a byte."""
    of = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size)) if len(tokenizer.token_bytes(i)) == 1}
    return [of[bytes([b])] for b in text.encode()]


@pytest.mark.parametrize("name", EXACT)
def test_a_character_is_shown_with_its_last_byte(name):
    tokenizer = TOKENIZERS[name]
    detokenizer = Detokenizer(tokenizer, [], SamplingParams())
    deltas = [detokenizer.push([i]).text for i in emoji_ids(tokenizer, "é👍€")]
    assert deltas == ["", "é", "", "", "", "👍", "", "", "€"]
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("name", EXACT)
def test_an_unfinished_character_becomes_a_replacement_at_the_end(name):
    tokenizer = TOKENIZERS[name]
    ids = emoji_ids(tokenizer, "a👍")[:-1]
    detokenizer = Detokenizer(tokenizer, [], SamplingParams())
    assert detokenizer.push(ids).text == "a"
    assert set(detokenizer.finish()) == {"\ufffd"} and detokenizer.text == tokenizer.decode(ids)


@pytest.mark.parametrize("name", EXACT)
def test_a_character_begun_by_the_prompt_is_the_outputs(name):
    tokenizer = TOKENIZERS[name]
    ids = emoji_ids(tokenizer, "xyz👍!")
    for cut in (4, 5, 6):
        assert stream(tokenizer, ids[cut:], ids[:cut])[0] == "👍!"
    assert stream(tokenizer, ids[7:], ids[:7])[0] == "!"


def test_the_leading_space_goes_only_at_the_very_beginning():
    tokenizer = TOKENIZERS["llama"]
    the = tokenizer.encode(" the")[-1]
    assert tokenizer.token(the) == " the"
    assert stream(tokenizer, [the, the])[0] == "the the"
    assert stream(tokenizer, [the], prompt=[1])[0] == "the"  # after BOS, which is skipped
    assert stream(tokenizer, [the], prompt=[1, the])[0] == " the"
    assert stream(tokenizer, [1, the], skip_special_tokens=False)[0] == "<s> the"


def test_special_tokens_are_skipped_or_shown_and_do_not_break_characters():
    tokenizer = TOKENIZERS["byte-level"]
    end = tokenizer.backend.token_to_id("<|end|>")
    ids = emoji_ids(tokenizer, "👍")
    assert stream(tokenizer, [*ids[:2], end, *ids[2:], end])[0] == "👍"
    assert stream(tokenizer, [*ids, end], skip_special_tokens=False)[0] == "👍<|end|>"
    think = tokenizer.backend.token_to_id("<think>")
    assert stream(tokenizer, [think])[0] == "<think>"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_without_a_token_have_no_text(name):
    """Models pad their vocabulary: such an id may be sampled."""
    tokenizer = TOKENIZERS[name]
    assert stream(tokenizer, [tokenizer.vocab_size + 5])[0] == ""


def test_byte_fallback_replaces_bytes_one_by_one_as_sentencepiece():
    tokens, scores, types = tiny.with_base(tiny.piece_words())
    sp, tokenizer, r = tiny.oracle(tiny.piece_model(tokens, scores, types, True)), TOKENIZERS["llama"], random.Random(0)
    for _ in range(500):
        ids = [
            r.choice([r.randrange(3, 259), r.randrange(259, len(tokens)), 3 + 0xE2, 3 + 0x82, 3 + 0xAC])
            for _ in range(r.randrange(12))
        ]
        assert tokenizer.decode(ids) == sp.decode(ids), ids


def test_nothing_is_detokenized_when_not_asked():
    detokenizer = Detokenizer(TOKENIZERS["llama"], [], SamplingParams(detokenize=False))
    assert detokenizer.push([300, 301]) == ("", None) and detokenizer.finish() == "" == detokenizer.text


# ------------------------------------------------------------------------------------------------------ stop strings


def expected_stop(pieces: list[str], stops: list[str], include: bool, min_tokens: int) -> tuple[str, str | None]:
    """Character by character: the first stop string to be complete, completed after the first `min_tokens` pieces."""
    text = ""
    for n, piece in enumerate(pieces, 1):
        for c in piece:
            text += c
            for stop in stops:
                if n > min_tokens and text.endswith(stop):
                    return (text if include else text[: -len(stop)]), stop
    return text, None


small = st.text(st.sampled_from("ab\n"), max_size=4)


@settings(max_examples=500, deadline=None)
@given(st.lists(small, max_size=14), st.lists(small.filter(bool), min_size=1, max_size=3), st.booleans(), st.integers(0, 6))
def test_stop_strings_equal_a_search_character_by_character(pieces, stops, include, min_tokens):
    machine, out, stop = StopStrings(stops, include), "", None
    for n, piece in enumerate(pieces, 1):
        text, stop = machine.push(piece, n > min_tokens)
        out += text
        if stop:
            break
        so_far = "".join(pieces[:n])
        assert so_far.startswith(out)
        if not include:  # what is held back begins a stop string, and as much as possible is shown
            held = so_far[len(out) :]
            possible = [
                so_far[k:] for k in range(len(so_far)) if any(s.startswith(so_far[k:]) and s != so_far[k:] for s in stops)
            ]
            assert held == max(possible, key=len, default="")
    out += "" if stop else machine.flush()
    assert (out, stop) == expected_stop(pieces, stops, include, min_tokens)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_stop_string_across_tokens_cuts_the_text(name, include):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("the lazy dog and the dog")
    text, stop = stream(tokenizer, ids, stop=["zy dog", "cat"], include_stop_str_in_output=include)
    assert stop == "zy dog" and text == ("the lazy dog" if include else "the la")


def test_the_possible_beginning_of_a_stop_string_is_held_back_then_shown():
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = Detokenizer(tokenizer, [], SamplingParams(stop=["\n\nQ:"]))
    shown = [detokenizer.push([i]).text for i in emoji_ids(tokenizer, "a\n\nQu")]
    assert shown == ["a", "", "", "", "\n\nQu"]
    detokenizer.push(emoji_ids(tokenizer, "\n\n"))
    assert detokenizer.text == "a\n\nQu" and detokenizer.finish() == "\n\n" and detokenizer.text == "a\n\nQu\n\n"


def test_after_a_stop_string_nothing_comes():
    tokenizer = TOKENIZERS["byte-level"]
    detokenizer = Detokenizer(tokenizer, [], SamplingParams(stop="."))
    assert detokenizer.push(emoji_ids(tokenizer, "a.b.c")) == ("a", ".")
    assert detokenizer.push(emoji_ids(tokenizer, "d")) == ("", ".")
    assert detokenizer.finish() == "" and detokenizer.text == "a"


def test_a_stop_string_of_replaced_bytes_is_found_at_the_end():
    tokenizer = TOKENIZERS["byte-level"]
    assert stream(tokenizer, emoji_ids(tokenizer, "a👍")[:-1], stop=["\ufffd"]) == ("a", "\ufffd")


def test_min_tokens_counts_tokens_of_the_output():
    tokenizer = TOKENIZERS["byte-level"]
    ids = emoji_ids(tokenizer, "a.b.c")
    assert stream(tokenizer, ids, stop=".", min_tokens=1) == ("a", ".")
    assert stream(tokenizer, ids, stop=".", min_tokens=2) == ("a.b", ".")
    assert stream(tokenizer, ids, sizes=(5,), stop=".", min_tokens=2) == ("a.b", ".")
    assert stream(tokenizer, ids, stop=".b", min_tokens=2) == ("a", ".b")  # begins early, ends late: counts


# --------------------------------------------------------------------------------------------------- the demo models


@pytest.mark.parametrize("fixture", ["demo_gguf", "gemma_gguf"])
def test_real_models_stream_exactly(fixture, request):
    tokenizer, r = load_tokenizer(request.getfixturevalue(fixture)), random.Random(0)
    for text in tiny.every_block(1):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert stream(tokenizer, ids)[0] == tokenizer.decode(ids) == text.replace("▁", " " if "gemma" in fixture else "▁")
    for _ in range(200):
        ids = [r.randrange(tokenizer.vocab_size) for _ in range(40)]
        assert stream(tokenizer, ids, sizes=(1, 3))[0] == tokenizer.decode(ids)
        plain = [i for i in ids if not tokenizer.token(i).startswith("\ufffd")]
        assert tokenizer.decode(plain) == tokenizer.backend.decode(plain)
