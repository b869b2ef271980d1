# ruff: noqa: E501
"""Model folders, chat templates, and what goes wrong with them."""

import json
import threading
import time
import warnings

import pytest
import tiny_tokenizers as tiny
from tokenizers import processors

from jaxpaged.request import RequestError
from jaxpaged.tokenizer import LONG_TEXT, Tokenizer, load_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import AutoTokenizer
    from transformers.utils.chat_template_utils import render_jinja_template

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start|>' + message['role'] + "
    "'<|endh|>\n\n' + message['content'] | trim + '<|eot|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|endh|>\n\n' }}{% endif %}"
)
GEMMA = """{{ bos_token }}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {{ '<start_of_turn>' + message['role'] + '\n' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
TOOLS = """{%- if tools %}
tools: {% for tool in tools %}{{ tool | tojson }}
{% endfor %}{%- endif %}
{%- for message in messages %}
    {%- if message.role == "skip" %}{% continue %}{% endif %}
    {%- generation %}
{{ message.role }}: {{ message.content }}
    {%- endgeneration %}
    {%- if message.tool_calls %}{% for call in message.tool_calls %} {{ call.function.name }}({{ call.function.arguments | tojson(indent=2) }}){% endfor %}{% endif %}
{%- endfor %}
{{ eos_token }}{{ custom }}"""
TALK = [{"role": "user", "content": ' Grüß <Gott> & "co"\n'}, {"role": "assistant", "content": "Hi there "}]


def make(tmp_path, backend=None, template=None, **files):
    """A model folder: tokenizer.json and whatever JSON files are given by name."""
    backend = backend or tiny.byte_level(**{"<s>": True, "</s>": True, "<|im_end|>": True})
    backend.save(str(tmp_path / "tokenizer.json"))
    files.setdefault(
        "tokenizer_config", {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    )
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    return load_tokenizer(tmp_path)


def with_template(template: str | None, **named: str) -> Tokenizer:
    named = {"bos_token": "<s>", "eos_token": "</s>", **named}
    backend = tiny.byte_level(**{"<s>": True, "</s>": True})
    return Tokenizer(backend, named, (), {} if template is None else {"default": template})


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_read_as_transformers_reads_it(tmp_path):
    ours = make(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id) == (len(theirs), theirs.bos_token_id, theirs.eos_token_id)
    assert set(ours.all_special_ids) == {i for i, t in theirs.added_tokens_decoder.items() if t.special}
    for text in [*tiny.CORPUS, *tiny.TRICKY, "a<s>b</s>"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}]
)
@pytest.mark.parametrize("in_json", [True, False])
def test_bos_and_eos_are_added_as_tokenizer_json_says_or_else_the_configuration(tmp_path, flags, in_json):
    backend = tiny.byte_level(**{"<s>": True, "</s>": True})
    if in_json:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    ours = make(tmp_path, backend, tokenizer_config={**config, **flags})
    expected = ours.encode("hi", add_special_tokens=False)
    if in_json or flags.get("add_bos_token"):
        expected = [ours.bos_token_id, *expected]
    if not in_json and flags.get("add_eos_token"):
        expected = [*expected, ours.eos_token_id]
    assert ours.encode("hi") == expected
    if in_json:
        assert AutoTokenizer.from_pretrained(tmp_path).encode("hi") == expected


@pytest.mark.parametrize("given, more", [(None, set()), (7, {7}), ([7, 9], {7, 9})])
def test_eos_ids_are_those_of_the_generation_config_too(tmp_path, given, more):
    tokenizer = make(tmp_path, generation_config={"eos_token_id": given})
    assert tokenizer.eos_token_ids == {tokenizer.eos_token_id} | more


def test_special_tokens_come_from_every_file_that_may_name_them(tmp_path):
    backend = tiny.byte_level(**{"<a>": False, "<b>": False, "<c>": False})
    ids = {t: backend.token_to_id(t) for t in ("<a>", "<b>", "<c>")}
    n = backend.get_vocab_size()
    config = {
        "eos_token": "<b>",
        "additional_special_tokens": ["<c>"],
        "added_tokens_decoder": {str(n): {"content": "<new>", "special": True, "normalized": False}},
    }
    tokenizer = make(tmp_path, backend, tokenizer_config=config, special_tokens_map={"bos_token": "<a>", "eos_token": "<a>"})
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ids["<a>"], ids["<b>"])  # tokenizer_config wins
    assert tokenizer.encode("<new>") == [n] and tokenizer.vocab_size == n + 1
    assert tokenizer.special_ids == {*ids.values(), n}
    assert tokenizer.decode([n, ids["<c>"]]) == "" and tokenizer.decode([n], skip_special_tokens=False) == "<new>"


def test_added_tokens_must_get_the_ids_they_say(tmp_path):
    with pytest.raises(ValueError, match="'<new>' should have id 9999 but gets"):
        make(tmp_path, tokenizer_config={"added_tokens_decoder": {"9999": {"content": "<new>"}}})


def test_truncation_and_padding_of_tokenizer_json_are_switched_off(tmp_path):
    backend = tiny.byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    assert 3 < len(make(tmp_path, backend).encode("a b c d e f g h")) < 50


def test_a_gpt2_folder_without_tokenizer_json(tmp_path):
    backend = tiny.byte_level()
    backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "GPT2Tokenizer",
                "eos_token": "<|endoftext|>",
                "added_tokens_decoder": {str(backend.get_vocab_size()): {"content": "<|endoftext|>", "special": True}},
            }
        )
    )
    tokenizer = load_tokenizer(tmp_path)
    for text in [*tiny.CORPUS, *tiny.TRICKY]:
        assert tokenizer.encode(text) == backend.encode(text).ids
    assert tokenizer.eos_token_id == backend.get_vocab_size()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "StrangeTokenizer"}')
    with pytest.raises(ValueError, match="StrangeTokenizer.*save_pretrained"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_folder_without_tokenizer_json(tmp_path):
    model = tiny.piece_model(*tiny.with_base(tiny.piece_words()), prefix=True)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer, sp = load_tokenizer(tmp_path), tiny.oracle(model)
    assert tokenizer.encode("the quick fox") == [1, *sp.encode("the quick fox")]
    assert tokenizer.decode(tokenizer.encode("the quick fox")) == "the quick fox" and tokenizer.eos_token_ids == {2}


def test_folders_and_files_that_are_wrong_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no tokenizer.json.*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        load_tokenizer(tmp_path)
    make(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{'a': 1}")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------- text and tokens


@pytest.mark.parametrize("special", [True, False])
def test_long_texts_have_the_ids_of_short_ones_and_let_others_go_on(demo_gguf, special):
    tokenizer = load_tokenizer(demo_gguf)
    text = "The fox and the dog. " * (2 * LONG_TEXT // 21 + 1)
    assert len(text) > LONG_TEXT
    assert tokenizer.encode(text, special) == tokenizer.backend.encode(text, add_special_tokens=special).ids
    with pytest.raises(RequestError, match="lone surrogate"):
        tokenizer.encode(text + "\ud83d")
    gaps, stop = [], threading.Event()

    def watch():
        last = time.monotonic()
        while not stop.is_set():
            time.sleep(0.001)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    tokenizer.encode(text * 500, special)
    took = time.monotonic() - began
    stop.set()
    thread.join()
    assert max(gaps) < took / 2


def test_bad_text_and_bad_ids_are_request_errors():
    tokenizer = with_template(None)
    with pytest.raises(RequestError, match="lone surrogate.*character 2"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(RequestError, match="must be a string, got list"):
        tokenizer.encode(["a"])
    for bad in (-1, tokenizer.vocab_size, 1 << 40):
        with pytest.raises(RequestError, match=f"{bad} is out of range.*0..{tokenizer.vocab_size - 1}"):
            tokenizer.decode([5, bad])
    with pytest.raises(RequestError, match="integers, got 'a'"):
        tokenizer.decode(["a"])


def test_the_text_of_a_token_keeps_its_space_and_its_bytes():
    tokenizer = with_template(None)
    ids = tokenizer.encode(" the dog 👍</s>")
    assert "".join(tokenizer.token(i) for i in ids[:2]) == " the dog" and tokenizer.token(ids[-1]) == "</s>"
    assert b"".join(map(tokenizer.token_bytes, ids[:-1])).decode() == " the dog 👍"
    assert tokenizer.token(tokenizer.vocab_size + 3) == ""
    assert {tokenizer.token(i) for i in tokenizer.encode("👍")} >= {"\ufffd"}


# --------------------------------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, TOOLS])
@pytest.mark.parametrize("length", [1, 2])
def test_prompts_equal_transformers(template, length):
    tokenizer = with_template(template)
    tools = [{"type": "function", "function": {"name": "wetter", "description": "Grüße <b>"}}]
    for generate in (True, False):
        values = dict(add_generation_prompt=generate, tools=tools, custom="!")
        (expected,), _ = render_jinja_template(
            [TALK[:length]], chat_template=template, bos_token="<s>", eos_token="</s>", **values
        )
        assert tokenizer.apply_chat_template(TALK[:length], tokenize=False, **values) == expected
        ids = tokenizer.apply_chat_template(TALK[:length], **values)
        assert ids == tokenizer.encode(expected, add_special_tokens=False)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA])
def test_going_on_with_the_last_message_equals_transformers(template):
    (expected,), _ = render_jinja_template(
        [TALK], chat_template=template, continue_final_message=True, add_generation_prompt=False, bos_token="<s>"
    )
    tokenizer = with_template(template)
    go_on = dict(add_generation_prompt=False, continue_final_message=True, tokenize=False)
    assert tokenizer.apply_chat_template(TALK, **go_on) == expected
    assert expected.endswith("Hi there " if template is CHATML else "Hi there")  # the others trim
    parts = [TALK[0], {"role": "assistant", "content": [{"type": "text", "text": "Hi there "}]}]
    assert tokenizer.apply_chat_template(parts, **go_on) == expected
    twice = [TALK[0], {"role": "assistant", "content": "user"}]  # also the name of a role: only the last one counts
    assert tokenizer.apply_chat_template(twice, **go_on).endswith("user")
    with pytest.raises(RequestError, match="exclude each other"):
        tokenizer.apply_chat_template(TALK, continue_final_message=True)


def test_there_is_one_bos_and_the_template_writes_it(tmp_path):
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    tokenizer = make(tmp_path, template=LLAMA3, tokenizer_config=config)
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id
    assert tokenizer.apply_chat_template(TALK).count(tokenizer.bos_token_id) == 1
    assert tokenizer.apply_chat_template(TALK, chat_template=CHATML).count(tokenizer.bos_token_id) == 0  # as transformers


def test_parts_are_joined_for_templates_that_want_strings():
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    flat = [{"role": "user", "content": "a\nb"}]
    for template in (CHATML, LLAMA3):
        tokenizer = with_template(template)
        assert tokenizer.apply_chat_template(parts) == tokenizer.apply_chat_template(flat)
    macro = "{% macro show(content) %}{% for part in content %}[{{ part.text }}]{% endfor %}{% endmacro %}{{ show(messages[0].content) }}"
    assert with_template(macro).apply_chat_template(parts, tokenize=False) == "[a][b]"
    assert "user\nab<end" in with_template(GEMMA).apply_chat_template(parts, tokenize=False)  # loops over them itself


def test_tool_calls_have_their_arguments_as_objects():
    tokenizer = with_template(TOOLS)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "ü"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    text = tokenizer.apply_chat_template([TALK[0], message], tokenize=False)
    assert 'f({\n  "x": "ü"\n})' in text and "None" not in text
    assert call["function"]["arguments"] == '{"x": "ü"}'  # the caller's message is left alone
    call["function"]["arguments"] = "{x"
    with pytest.raises(RequestError, match=r"messages\[0\].tool_calls.*not JSON"):
        tokenizer.apply_chat_template([message])


@pytest.mark.parametrize("messages, what", [
    ([], "non-empty list"), ("hi", "non-empty list"), ({"role": "user"}, "non-empty list"), (None, "non-empty list"),
    (["hi"], r"messages\[0\] must be an object"), ([{"content": "x"}], "string 'role'"), ([{"role": 1, "content": "x"}], "string 'role'"),
    ([{"role": "user"}], r"messages\[0\] .*'user'.* no content"), ([{"role": "user", "content": 5}], "string or a list of text parts, got int"),
    ([TALK[0], {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], r"messages\[1\].content .*'image_url'"),
    ([{"role": "user", "content": [{"type": "text"}]}], "only .*'text'"),
    ([{"role": "assistant", "tool_calls": ["x"]}], "'function'"),
])  # fmt: skip
def test_messages_are_checked(messages, what):
    with pytest.raises(RequestError, match=what) as error:
        with_template(CHATML).apply_chat_template(messages)
    assert error.value.param.startswith("messages") and error.value.status == 400


def test_what_templates_refuse_is_a_request_error():
    with pytest.raises(RequestError, match="roles must alternate"):
        with_template(GEMMA).apply_chat_template([TALK[1]])
    with pytest.raises(RequestError, match="no valid Jinja: line 1"):
        with_template("{% for %}").apply_chat_template(TALK)
    for broken in ("{{ 1 / 0 }}", "{{ messages.x.y }}", "{{ 'a' + 1 }}"):
        with pytest.raises(RequestError, match="chat template refuses"):
            with_template(broken).apply_chat_template(TALK)
    with pytest.raises(RequestError, match="no chat template.*--chat-template"):
        with_template(None).apply_chat_template(TALK)
    with pytest.raises(RequestError, match="does not show the last message"):
        with_template("x").apply_chat_template(TALK, add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize(
    "evil",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}", "{{ range(999999999) }}"],
)
def test_templates_cannot_reach_out_of_the_sandbox(evil):
    with pytest.raises(RequestError, match="refuses"):
        print(with_template(evil + "{{ x.y }}").apply_chat_template(TALK, tokenize=False))


def test_templates_have_a_clock():
    text = with_template("{{ strftime_now('%Y') }}").apply_chat_template(TALK, tokenize=False)
    assert len(text) == 4 and text.isdigit()


def test_which_template_is_taken(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = make(tmp_path, tokenizer_config={"chat_template": named})

    def render(tokenizer, **kwargs):
        return tokenizer.apply_chat_template(TALK, tokenize=False, **kwargs)

    assert tokenizer.chat_template == "plain" and render(tokenizer) == "plain"
    assert render(tokenizer, tools=[{}]) == "tools" == render(tokenizer, chat_template="tool_use")
    assert render(tokenizer, chat_template="{{ 1 + 1 }}") == "2"
    tokenizer = make(tmp_path, template="file", tokenizer_config={"chat_template": "config"})
    assert tokenizer.chat_template == "file" and render(tokenizer, tools=[{}]) == "file"
    (tmp_path / "chat_template.jinja").unlink()
    assert make(tmp_path, tokenizer_config={"chat_template": "config"}).chat_template == "config"
    assert make(tmp_path, chat_template={"chat_template": "older"}).chat_template == "older"
    assert make(tmp_path, tokenizer_config={}, chat_template={}).chat_template is None


# ------------------------------------------------------------------------------------------------------------- GGUF


def test_a_gguf_file_brings_template_and_ends(tmp_path):
    backend = tiny.byte_level(**{"<s>": True, "</s>": True, "<|im_end|>": True})
    of = backend.token_to_id
    path = tiny.gguf_of(
        tmp_path / "t.gguf",
        backend,
        pre="gpt-2",
        chat_template=CHATML,
        bos_token_id=of("<s>"),
        eos_token_id=of("</s>"),
        padding_token_id=0,
        eom_token_id=7,
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.chat_template == CHATML and tokenizer.bos_token_id == of("<s>")
    assert tokenizer.eos_token_ids == {of("</s>"), of("<|im_end|>"), 7}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}])[-3:]
    bad = tiny.gguf_of(tmp_path / "bad.gguf", backend, pre="gpt-2", eos_token_id=10**6)
    with pytest.raises(ValueError, match="eos_token_id is 1000000"):
        load_tokenizer(bad)


def test_the_demo_model_talks_chatml(demo_gguf):
    tokenizer = load_tokenizer(demo_gguf)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == text and ids[0] == 1 and ids.count(2) == 2
    assert 2 in tokenizer.eos_token_ids and tokenizer.encode("Hi")[0] != 1  # this model adds no BOS
