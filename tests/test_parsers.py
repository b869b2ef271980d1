"""Tool calls and reasoning out of text: equal however the text is cut, nothing lost, nothing held back for long."""

import itertools
import json
import re
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.request import RequestError, SamplingParams
from jaxpaged_server.parsers import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    ChatParser,
    Message,
    ToolCall,
    end_of_reasoning,
    needs_special_tokens,
    opening,
    parse,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "metric": {"type": "boolean"},
                    "limit": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                    "where": {"type": "object"},
                    "tags": {"type": ["array", "null"]},
                    "unit": {"enum": ["C", "F"]},
                    "place": {"$ref": "#/$defs/Place"},
                    "code": {"type": ["string", "integer"]},
                    "plain": {},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
PARIS = {"city": 'Zürich "\\ \n🏔️', "days": 2, "where": {"a": [1, {"b": None}], "c": "}]"}}
P = json.dumps(PARIS, ensure_ascii=False)
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n{city}\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "<parameter=where>\n{where}\n</parameter>\n</function>\n</tool_call>"
).format(city=PARIS["city"], where=json.dumps(PARIS["where"]))
PYTHON = f"weather(city={PARIS['city']!r}, days=2, where={PARIS['where']!r})"
BOTH = [("weather", PARIS), ("now", {})]

# (tool parser, text, content, calls): what models write when all is well
GOOD = [
    ("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {P}}}\n</tool_call>', None, BOTH[:1]),
    ("hermes", f'Sure!\n<tool_call>{{"arguments": {P}, "name": "weather"}}</tool_call>\n<tool_call>\n{{"name": "now"}}'
               '\n</tool_call>\n', "Sure!\n", BOTH),
    ("hermes", f'\n<tool_call>[{{"name": "weather", "parameters": {P}}},\n{{"name": "now", "arguments": null}}]</tool_call>'
               "\nDone. ", "\nDone. ", BOTH),
    ("hermes", '<tool_call>{"id": 7, "type": "function", "why": ["x"], "name": "now", "arguments": "{}"}</tool_call>', None,
     BOTH[1:]),
    ("hermes", "No <tool> here, 1 < 2: {}\n", "No <tool> here, 1 < 2: {}\n", []),
    ("llama3_json", f'{{"name": "weather", "parameters": {P}}}', None, BOTH[:1]),
    ("llama3_json", f' {{"type": "function", "name": "weather", "arguments": {P}}}; {{"name": "now", "parameters": {{}}}}\n',
     None, BOTH),
    ("llama4_json", f'[{{"name": "weather", "parameters": {P}}}, {{"name": "now", "parameters": {{}}}}]', None, BOTH),
    ("llama3_json", f'I call <|python_tag|>{{"name": "weather", "parameters": {P}}} {{"name": "now", "parameters": {{}}}}',
     "I call ", BOTH),
    ("llama3_json", '{"title": "x", "name": "y"}', '{"title": "x", "name": "y"}', []),
    ("llama3_json", '{"name": "Ann", "age": 7}', '{"name": "Ann", "age": 7}', []),
    ("llama3_json", '[1] see {"name": "f", "parameters": {}}', '[1] see {"name": "f", "parameters": {}}', []),
    ("mistral", f'[TOOL_CALLS] [{{"name": "weather", "arguments": {P}}}, {{"name": "now", "arguments": {{}}}}]', None, BOTH),
    ("mistral", f"Well.[TOOL_CALLS]weather[ARGS]{P}[TOOL_CALLS]now[ARGS]{{}}", "Well.", BOTH),
    ("mistral", f"[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{P}\n[TOOL_CALLS]now{{}}", None, BOTH),
    ("qwen3_coder", XML, None, BOTH[:1]),
    ("qwen3_xml", f"Let me see.\n{XML}\n<tool_call>\n<function=now>\n</function>\n</tool_call>", "Let me see.\n", BOTH),
    ("qwen3_coder", XML.removeprefix("<tool_call>\n") + "<function=now></function>", None, BOTH),
    ("qwen", f'{XML}<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>', None, BOTH),
    ("pythonic", f"[{PYTHON}, now()]", None, BOTH),
    ("llama4_pythonic", f"So: <|python_start|>[{PYTHON},now( )]<|python_end|> ", "So: ", BOTH),
    ("pythonic", '[a link](x), [f(1)] [g(x=open("f"))]', '[a link](x), [f(1)] [g(x=open("f"))]', []),
]  # fmt: skip

# (tool parser, text, content, [(name, arguments' text)]): what models write when it is not
BAD = [
    ("hermes", "<tool_call>\nnot json\n</tool_call>", "<tool_call>\nnot json\n</tool_call>", []),
    ("hermes", '\n<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "f", "arg', '<tool_call>{"name": "f", "arg', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {\'a\': 1}}</tool_call>',
     '<tool_call>{"name": "f", "arguments": {\'a\': 1}}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": 5}', '<tool_call>{"name": "f", "arguments": 5}', []),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}', '<tool_call>{"name": "", "arguments": {}}', []),
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}', '<tool_call>{"name": "\\ud800", "arguments": {}}', []),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    ("hermes", '<tool_call><tool_call>{"name": "f"}</tool_call>', "<tool_call>", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> Hm.', " Hm.", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call> Hm.', " Hm.", [("f", '{"a": 1')]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f" oops', " oops", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null oops', " oops", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1}}</tool_call>', "}}</tool_call>", [("f", '{"a": [1')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}}\n</tool_call>', "}\n</tool_call>", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}, {"no"}</tool_call>', ', {"no"}</tool_call>', [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}, "x" }</tool_call>', ', "x" }</tool_call>', [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny\t"}}</tool_call>', "", [("f", '{"a": "x\\ny\\t"}')]),
    ("llama3_json", '<|python_tag|>print(1)', "<|python_tag|>print(1)", []),
    ("llama3_json", '{"name": "f", "parameters": {}}; so it is', "; so it is", [("f", "{}")]),
    ("llama3_json", '{"name": "f"}', '{"name": "f"}', []),
    ("llama3_json", '<|python_tag|>{"name": "f"}', "", [("f", "{}")]),
    ("mistral", "[TOOL_CALLS] I will not.", "[TOOL_CALLS] I will not.", []),
    ("mistral", "[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}, oops]', ", oops]", [("f", "{}")]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": "b', "", [("f", '{"a": "b')]),
    ("qwen3_coder", "<tool_call>\n<function=f", "<tool_call>\n<function=f", []),
    ("qwen3_coder", "<tool_call> hello</tool_call>", "<tool_call> hello</tool_call>", []),
    ("qwen3_coder", "<function=f>\n<parameter=a>\nx\ny", "", [("f", '{"a": "x\\ny')]),
    ("qwen3_coder", "<function=weather><parameter=days>12", "", [("weather", '{"days": 12')]),
    ("qwen3_coder", "<function=f><parameter=a>1</parameter>oops</function>", "oops</function>", [("f", '{"a": "1"')]),
    ("qwen3_coder", "<function=f><parameter=a>1</parameter><parameter>", "<parameter>", [("f", '{"a": "1"')]),
    ("qwen3_coder", "<function=f><parameter=a>1</parameter><parameter=>", "<parameter=>", [("f", '{"a": "1"')]),
    ("qwen3_coder", "<tool_call><function=f></tool_call>", "", [("f", "{}")]),
    ("pythonic", "[f(a=1), g(b=", ", g(b=", [("f", '{"a": 1}')]),
    ("pythonic", "[f(a=1), g(1)] end", ", g(1)] end", [("f", '{"a": 1}')]),
    ("pythonic", "[f(a=__import__('os'))]", "[f(a=__import__('os'))]", []),
    ("pythonic", "[f(**{'a': 1})]", "[f(**{'a': 1})]", []),
    ("pythonic", "[f(a={1, 2})]", "[f(a={1, 2})]", []),
    ("pythonic", "[f(a=1e999)]", "[f(a=1e999)]", []),
    ("pythonic", "[f(a='open", "[f(a='open", []),
]  # fmt: skip
TEXTS = [(parser, text) for parser, text, *_ in GOOD + BAD]
BLANK = Message("", None, ())


def counting():
    return partial(lambda count: f"id{next(count)}", itertools.count())


def pieces_of(text, cuts):
    return [text[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), len(text)])]


def deltas(parser, pieces):
    for piece in pieces:
        yield parser.push(piece)
    yield parser.finish()


def stream(pieces, tool_parser=None, reasoning_parser=None, **options):
    """What a client that follows OpenAI's protocol puts together."""
    parser = ChatParser(tool_parser, reasoning_parser, new_id=counting(), **{"tools": TOOLS, **options})
    content = reasoning = ""
    calls = []
    for delta in deltas(parser, pieces):
        content, reasoning = content + delta.content, reasoning + delta.reasoning
        for index, id, name, arguments in delta.tool_calls:
            if index == len(calls):
                assert id and name
                calls.append(ToolCall(id, name, ""))
            else:
                assert index == len(calls) - 1 and id is name is None and arguments
            calls[index] = calls[index]._replace(arguments=calls[index].arguments + arguments)
        assert parser.num_tool_calls == len(calls)
    return Message(content or (None if reasoning or calls else ""), reasoning or None, tuple(calls))


def whole(text, tool_parser=None, reasoning_parser=None, **options):
    return parse(text, tool_parser, reasoning_parser, new_id=counting(), **{"tools": TOOLS, **options})


# -- what is found -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize(("tool_parser", "text", "content", "calls"), GOOD)
def test_calls_and_content_are_found(tool_parser, text, content, calls, think):
    message = whole(f"<think>\nHm, [f()] {{\n</think>{text}" if think else text, tool_parser, "qwen3" if think else None)
    assert message.content == content
    assert message.reasoning == ("\nHm, [f()] {\n" if think else None)
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == calls


@pytest.mark.parametrize(("tool_parser", "text", "content", "calls"), BAD)
def test_what_is_broken_is_content_or_a_call_as_far_as_it_came(tool_parser, text, content, calls):
    message = whole(text, tool_parser)
    assert (message.content or "") == content
    assert [(call.name, call.arguments) for call in message.tool_calls] == calls


@pytest.mark.parametrize(("tool_parser", "text"), TEXTS)
def test_an_answer_cut_off_anywhere_loses_nothing_and_begins_as_the_whole_one(tool_parser, text):
    full = whole(text, tool_parser)
    for end in range(len(text)):
        part = whole(text[:end], tool_parser)
        for call, same in zip(part.tool_calls, full.tool_calls):
            begun = re.sub(r"((\\n)?<[^<]*|\\n)$", "", call.arguments).rstrip("\n")  # less the beginning of </parameter>
            assert call.name == same.name and same.arguments.startswith(begun)
        if not part.tool_calls:
            assert part.content == text[:end]


# -- however it is cut ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tool_parser", "text"), TEXTS)
def test_streamed_is_parsed_at_once_for_every_cut_and_character_by_character(tool_parser, text):
    assert stream(text, tool_parser) == whole(text, tool_parser)
    text = f"<think> so\n</think>\n{text}"
    expected = whole(text, tool_parser, "qwen3")
    assert stream(text, tool_parser, "qwen3") == expected
    for cut in range(len(text) + 1):
        assert stream(pieces_of(text, [cut]), tool_parser, "qwen3") == expected


@pytest.mark.parametrize(
    ("tool_parser", "text"),
    [
        ("hermes", 'Ok <b\n<tool_call>\n{"name": "f", "arguments": {"a": "\\"}é"}}\n</tool_call>\n<tool_call>{"nam'),
        ("llama3_json", ' {"name": "f", "parameters": {"a": [1, "\\\\"]}}; {"name": "g", "parameters": {"\n": {} <'),
        ("mistral", 'Ok [TOOL_CALLS][{"name": "f", "arguments": {"a": "]"}}, {"na[TOOL_CALLS]g[ARGS]{"b": 1} x'),
        ("qwen", "<tool_call>\n<function=weather>\n<parameter=days>\n1\n</parameter>\n</function>\n</tool_call> <tool_call>{"),
        ("pythonic", '[f(a=\'\\\'\', b="""x"y"""), g(c=\'\'), h(d=[1, (2)])] and [i()'),
    ],
)
def test_streamed_is_parsed_at_once_for_every_pair_of_cuts(tool_parser, text):
    expected = whole(text, tool_parser)
    assert expected.tool_calls and expected.content
    for cuts in itertools.combinations(range(1, len(text)), 2):
        assert stream(pieces_of(text, cuts), tool_parser) == expected


def test_streamed_is_parsed_at_once_for_the_tokens_of_a_real_tokenizer(demo_gguf):
    from jaxpaged.tokenizer import Detokenizer, load_tokenizer

    tokenizer = load_tokenizer(demo_gguf)
    for tool_parser, text in TEXTS:
        text = f"<think>Zoë 🤔</think>\n{text}"
        ids = tokenizer.encode(text, add_special_tokens=False)
        detokenizer = Detokenizer(tokenizer, (), SamplingParams(max_tokens=None))
        pieces = [detokenizer.push([token]).text for token in ids] + [detokenizer.finish()]
        assert "".join(pieces) == text
        assert stream(pieces, tool_parser, "qwen3") == whole(text, tool_parser, "qwen3")


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<function=", "weather>", "<parameter=days>",
    "<parameter=x>", "</parameter>", "</function>", "<|python_start|>", "<think>", "</think>", "<|im_end|>", "</s>", "\n",
    " ", "{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ";", ":", "=", '"name"', '"arguments"', '"f"', "f", "f(", "a=1",
    '{"name": "f", ', '"arguments": {', '{"name": "g", "parameters": {"x": "', "12", "null", "true", "é", "🏔️", "\0", "\u2028",
]  # fmt: skip


@st.composite
def answers(draw):
    """(tool parser, text): calls as they should be, whole, cut and mixed with pieces of all formats."""
    tool_parser = draw(st.sampled_from(sorted(TOOL_PARSERS)))
    own = [text for parser, text in TEXTS if TOOL_PARSERS[parser] is TOOL_PARSERS[tool_parser]]
    text = st.sampled_from(own)
    cut = st.builds(lambda text, a, b: text[a : a + b], text, st.integers(0, 60), st.integers(0, 60))
    part = st.one_of(text, cut, st.sampled_from(FRAGMENTS), st.sampled_from(FRAGMENTS), st.text(max_size=3))
    return tool_parser, "".join(draw(st.lists(part, max_size=8)))


any_answer = given(
    answer=answers(),
    reasoning_parser=st.sampled_from([None, *REASONING_PARSERS]),
    prompt_end=st.sampled_from(["", "<think>\n", "<think></think>\n"]),
    parallel=st.booleans(),
    special=st.sampled_from([(), ("<|im_end|>", "</s>", "<tool_call>", "<|im_", "s><")]),
    data=st.data(),
)


def check_streamed_is_parsed_at_once(answer, reasoning_parser, prompt_end, parallel, special, data):
    tool_parser, text = answer
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    options = {"prompt_end": prompt_end, "parallel_tool_calls": parallel, "special": special}
    expected = whole(text, tool_parser, reasoning_parser, **options)
    assert stream(pieces_of(text, cuts), tool_parser, reasoning_parser, **options) == expected
    assert stream(text, tool_parser, reasoning_parser, **options) == expected
    if not (expected.tool_calls or reasoning_parser or special):
        assert expected.content == text


@settings(max_examples=200, deadline=None)
@any_answer
def test_streamed_is_parsed_at_once_whatever_the_text(**drawn):
    check_streamed_is_parsed_at_once(**drawn)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@any_answer
def test_streamed_is_parsed_at_once_whatever_the_text_for_longer(**drawn):
    check_streamed_is_parsed_at_once(**drawn)


# -- what is held back ---------------------------------------------------------------------------------------------------------


def test_content_waits_only_where_it_may_begin_a_marker():
    text = "A <t> <tool_ <<tool_cal> {x} [y]\n\n<thin"
    parser, shown = ChatParser("hermes", "qwen3"), ""
    for end, character in enumerate(text, 1):
        shown += parser.push(character).content
        held = next(n for n in range(12, -1, -1) if n <= end and "<tool_call>".startswith(text[end - n : end]))
        assert shown == text[: end - held]


def test_json_that_is_no_call_comes_as_soon_as_that_is_seen():
    parser = ChatParser("llama3_json")
    assert [parser.push(text).content for text in ('{"na', 'me": "Ann", "age"', ": 7, ", '"x')] == [
        "", "", '{"name": "Ann", "age": 7, ', '"x',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tool_parser", "head", "tail"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": ', "}\n</tool_call>"),
        ("llama3_json", '{"name": "f", "parameters": ', "}"),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": ', "}]"),
        ("mistral", "[TOOL_CALLS]f[ARGS]", ""),
    ],
)
def test_json_arguments_come_character_by_character(tool_parser, head, tail):
    parser = ChatParser(tool_parser)
    parser.push(head)
    pieces = [parser.push(character).tool_calls for character in P]
    assert pieces[0] == ()  # `{` may be anything
    (first,), *rest = pieces[1:]
    assert (first.name, first.arguments) == ("f", P[:2])
    assert [piece.arguments for (piece,) in rest] == list(P[2:])
    assert not any(parser.push(tail)) and not any(parser.finish())


def test_xml_strings_come_as_they_are_and_other_values_whole():
    parser = ChatParser("qwen3_coder", tools=TOOLS)
    shown = lambda text: "".join(piece.arguments for piece in parser.push(text).tool_calls)
    assert shown("<function=weather>") == "{"
    assert [shown(c) for c in "<parameter=city>\na\n<b"] == [*[""] * 15, '"city": ', '"', "a", "", "", "\\n<b"]
    assert shown("\n</parameter>\n") == '"'
    assert [shown(c) for c in "<parameter=days>12"] == [*[""] * 15, ', "days": ', "", ""]
    assert shown("</parameter></function>") == "12}"


@pytest.mark.parametrize(
    "head",
    ["", "<think>", "\n", "<tool_call>", '<tool_call>{"name": "', '<tool_call>{"arguments": {"a": "', '<tool_call>{"x": [',
     '<tool_call>{"name": "f", "arguments": {"a": "', "[", "[f(a='", "[f(", "<function=", "<function=f><parameter=a>",
     "<function=weather><parameter=days>", "[TOOL_CALLS]"],
)  # fmt: skip
@pytest.mark.parametrize("unit", ["a", " ", "<", "{", "[", "\\", "'", "</parameter", "</tool_call"])
def test_no_text_makes_a_push_slow(head, unit):
    """What waits inside is shorter than any marker, whatever has come: the cost of a push does not grow."""
    for tool_parser in sorted(TOOL_PARSERS):
        parser = ChatParser(tool_parser, "qwen3", tools=TOOLS, special=["<|im_end|>"])
        parser.push(head)
        for character in unit * 40:
            parser.push(character)
            assert len(parser._source.text) - parser._source.at < 20


# -- reasoning -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parser", "prompt_end", "text", "content", "reasoning"),
    [
        ("qwen3", "", "<think>\na < b\n</think>\n\nHi", "\n\nHi", "\na < b\n"),
        ("qwen3", "assistant\n<think>\n", "a</think>Hi", "Hi", "a"),
        ("qwen3", "<think>\n", "<think>a</think>Hi", "Hi", "a"),
        ("qwen3", "<think>\n\n</think>\n\n", "Hi", "Hi", None),
        ("qwen3", "say <think> aloud<|im_end|>\n", "Hi</think>", "Hi</think>", None),
        ("qwen3", "", " Hi <think>a</think>", " Hi <think>a</think>", None),
        ("qwen3", "", "\n<think>\n\n</think>\n\n", None, None),
        ("qwen3", "", " \n", " \n", None),
        ("qwen3", "", "<think>a</thi", None, "a</thi"),
        ("deepseek_r1", "", "a\n</think>\nHi", "\nHi", "a\n"),
        ("deepseek_r1", "", "\n<think>a</think>Hi</think>", "Hi</think>", "a"),
        ("deepseek_r1", "<think>\n", "\na", None, "\na"),
        ("deepseek_r1", "</think>", "Hi <think>", "Hi <think>", None),
        (None, "<think>", "<think>a</think>", "<think>a</think>", None),
    ],
)
def test_reasoning(parser, prompt_end, text, content, reasoning):
    message = whole(text, None, parser, prompt_end=prompt_end)
    assert (message.content or None, message.reasoning) == (content, reasoning)
    assert stream(text, None, parser, prompt_end=prompt_end) == message


# -- options -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [text for _, text, _, calls in GOOD if calls == BOTH])
def test_one_call_is_given_if_that_is_all_that_was_asked_for(text):
    tool_parser = next(parser for parser, same, *_ in GOOD if same == text)
    every = whole(text, tool_parser)
    assert whole(text, tool_parser, parallel_tool_calls=False) == every._replace(tool_calls=every.tool_calls[:1])
    assert stream(text, tool_parser, parallel_tool_calls=False) == every._replace(tool_calls=every.tool_calls[:1])


XML_REST, PYTHON_REST, JSON_REST = "<parameter=city>\nx\n</parameter>\n</function>", "city='x')]", '"city": "x"}}'
RESTS = {"qwen3_coder": XML_REST, "qwen3_xml": XML_REST, "pythonic": PYTHON_REST, "llama4_pythonic": PYTHON_REST}


@pytest.mark.parametrize("tool_parser", TOOL_PARSERS)
def test_a_forced_call_goes_on_where_its_opening_ends(tool_parser):
    prompt_end = "<think>\n" + end_of_reasoning("qwen3", "<think>\n")
    text = opening(tool_parser, "weather") + RESTS.get(tool_parser, JSON_REST)
    assert stream(text, tool_parser, "qwen3", prompt_end=prompt_end).tool_calls == (("id0", "weather", '{"city": "x"}'),)
    assert text.startswith(opening(tool_parser, None))


def test_reasoning_is_ended_only_where_it_has_begun():
    assert end_of_reasoning("qwen3", "user\n") == end_of_reasoning(None, "<think>") == ""
    assert end_of_reasoning("deepseek_r1", "user\n") == end_of_reasoning("qwen3", "<think>\n") == "</think>\n\n"
    assert end_of_reasoning("deepseek_r1", "<think></think>\n") == ""


def test_special_tokens_are_taken_out_and_markers_are_not():
    special = ["<|im_end|>", "<tool_call>", "</tool_call>", "<think>"]
    text = '<think>a<|im_end|>b</think>x<|im_<tool_call>{"name": "f", "arguments": {"a": "<|im_end|>"}}</tool_call><|im_end|>'
    expected = Message("x<|im_", "ab", (ToolCall("id0", "f", '{"a": ""}'),))
    assert whole(text, "hermes", "qwen3", special=special) == stream(text, "hermes", "qwen3", special=special) == expected
    assert whole("<think>a<|im_end|>", special=special).content == "a"
    assert whole("<|a<|b|>", special=["<|a<|b|>c", "<|b|>"]).content == "<|a"


def test_who_needs_special_tokens():
    assert needs_special_tokens("mistral", None) and needs_special_tokens(None, "qwen3")
    assert not needs_special_tokens(None, None)
    assert needs_special_tokens("llama3_json", None, ["<|eot_id|>", "<|python_tag|>"])
    assert not needs_special_tokens("hermes", "qwen3", ["<|im_end|>"])


def test_ids_are_new_and_as_the_format_wants_them():
    ids = {call.id for _ in range(50) for call in parse(GOOD[1][1], "hermes").tool_calls}
    assert len(ids) == 100 and all(id.startswith("call_") for id in ids)
    ids = {call.id for _ in range(50) for call in parse("[TOOL_CALLS]f{}[TOOL_CALLS]g{}", "mistral").tool_calls}
    assert len(ids) == 100 and all(len(id) == 9 and id.isascii() and id.isalnum() for id in ids)


@pytest.mark.parametrize(("param", "args"), [("tool_parser", ("hermse", None)), ("reasoning_parser", (None, "r1"))])
def test_an_unknown_parser_is_refused_with_those_there_are(param, args):
    known = "hermes, .*pythonic" if param == "tool_parser" else "deepseek_r1, qwen3"
    for refuse in (ChatParser, needs_special_tokens, partial(parse, "")):
        with pytest.raises(RequestError, match=f"{param} must be one of {known}.*got '(hermse|r1)'") as error:
            refuse(*args)
        assert error.value.param == param


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("city", "\n 12 \n\n", " 12 \n"), ("city", "", ""), ("days", "\n12\n", 12), ("days", "twelve", "twelve"),
        ("metric", "true", True), ("metric", "True", True), ("metric", "1", "1"), ("limit", "2", 2), ("limit", "null", None),
        ("limit", "None", None), ("limit", "1e999", "1e999"), ("limit", "NaN", "NaN"), ("where", '{"a": [1]}', {"a": [1]}),
        ("where", "{'a': None}", {"a": None}), ("where", "[" * 5000, "[" * 5000), ("tags", '["a"]', ["a"]),
        ("tags", "('a', true)", ["a", True]), ("unit", "5", "5"), ("place", '{"x": 1.5}', {"x": 1.5}), ("place", "red", "red"),
        ("place", '"red"', '"red"'), ("code", "7", 7), ("code", "x7", "x7"), ("plain", "7", "7"), ("unknown", "7", "7"),
        ("where", r'{"a": "\ud800"}', {"a": "\ud800"}), ("where", r"{'a': '\d'}", {"a": r"\d"}),
    ],
)  # fmt: skip
def test_xml_values_get_the_type_of_the_schema(key, text, value):
    (call,) = whole(f"<function=weather><parameter={key}>{text}</parameter></function>", "qwen3_coder").tool_calls
    given = json.loads(call.arguments.encode())[key]
    assert given == value and type(given) is type(value)


def test_python_arguments_are_literals_of_any_kind():
    text = r"""[a.b-c(s='it\'s', t="\d", u='''x'y''', n=-1.5, l=[1, (2,)], d={'k': None}, j=true, e="", z="ä" "b")]"""
    (call,) = whole(text, "pythonic").tool_calls
    assert call.name == "a.b-c"
    assert json.loads(call.arguments) == {
        "s": "it's", "t": r"\d", "u": "x'y", "n": -1.5, "l": [1, [2]], "d": {"k": None}, "j": True, "e": "", "z": "äb",
    }  # fmt: skip


@pytest.mark.parametrize("nested", ["(" * 50000, "-" * 50000 + "1", "1" + "+1" * 50000, "[" * 50000 + "]" * 50000])
def test_deep_python_is_content_and_no_crash(nested):
    assert whole(text := f"[f(a={nested})]", "pythonic").content == text
