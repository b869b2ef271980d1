"""The page at `/`, in a real browser, against the real server on a runner that says what it is told to say."""

import contextlib
import os
import re
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_tokenizers
import uvicorn
from fakes import FakeRunner
from playwright.sync_api import Page, expect, sync_playwright

from jaxpaged.async_engine import AsyncEngine
from jaxpaged.batch import Sampled, TokenLogprobs, ladder
from jaxpaged.engine import Engine
from jaxpaged.scheduler import Limits
from jaxpaged.tokenizer import Tokenizer
from jaxpaged_server.app import create_app
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.service import Service

CHROMIUM = "/usr/bin/chromium"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PROBABILITIES = (0.95, 0.7, 0.05)  # of the first token, the second, ... and again
NUM_TOP = 5
HELLO = "Hello there, this is the answer."
TAG = '<img src="x:" onerror="window.hacked=1">'  # one token: else it could never be read as HTML
HOSTILE = TAG + "<script>window.hacked=1</script> naïve café 👩‍👩‍👧 日本語 𝔘"
PROMPT = "the quick brown fox jumps over the lazy dog, and the dog does not mind"


class Script(FakeRunner):
    """Answers every conversation with `text`, a token in `pace` seconds."""

    def __init__(self, limits: Limits, tokenizer: Tokenizer):
        super().__init__(limits)
        self.tokenizer, self.pace, self.text = tokenizer, 0.0, HELLO
        self.mark, self.end = (tokenizer.backend.token_to_id(mark) for mark in ("<|assistant|>", "<|end|>"))

    def _read_all(self, batch, num_rows: int) -> Sampled:
        time.sleep(self.pace)
        script = [*self.tokenizer.encode(self.text, add_special_tokens=False), self.end]
        count, rows = np.zeros(len(batch.slots), np.int64), range(num_rows)
        for row in rows:
            context = self.context(batch, row)
            count[row] = min(context[::-1].index(self.mark) if self.mark in context else 0, len(script) - 1)
        tokens = np.array(script, np.int32)[count]
        for row in rows:
            if batch.samples[row]:
                self.last_token[batch.slots[row]] = tokens[row]
        return Sampled(tokens, np.ones(len(tokens), bool), self._logprobs(tokens, count), None)

    def _logprobs(self, tokens: np.ndarray, count: np.ndarray) -> TokenLogprobs:
        """The token that is chosen, and the ids 1, 2, ... which share what is left."""
        p = np.array(PROBABILITIES, np.float32)[count % len(PROBABILITIES)]
        others = np.broadcast_to(np.arange(1, NUM_TOP), (len(tokens), NUM_TOP - 1))
        ids = np.concatenate([tokens[:, None], others], 1).astype(np.int32)
        top = np.log(np.concatenate([p[:, None], np.repeat((1 - p)[:, None] / NUM_TOP, NUM_TOP - 1, 1)], 1)).astype(np.float32)
        return TokenLogprobs(top[:, 0], np.ones(len(tokens), np.int32), ids, top)


@contextlib.contextmanager
def serving(**options):
    """A server in a thread of its own: its address and its runner."""
    backend = tiny_tokenizers.byte_level(**{mark: True for mark in MARKS}, **{TAG: False})
    tokenizer = Tokenizer(backend, {"eos_token": "<|end|>"}, (), {"default": TEMPLATE})
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=256, page_size=4, num_pages=301, max_model_len=800,
                    vocab_size=tokenizer.vocab_size)  # fmt: skip
    runner = Script(limits, tokenizer)
    engine = Engine(limits, runner, ladder(256, 8), tokenizer, tokenizer.eos_token_ids)
    service = Service(AsyncEngine(engine), ServerOptions(watchdog_timeout=0, **options), ["tiny"])
    app = create_app(service)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}/", runner=runner, engine=service.engine)
    finally:
        service.engine.draining = True
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server():
    with serving(reasoning_parser="qwen3", enable_prompt_tokens_details=True) as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    if not os.access(CHROMIUM, os.X_OK):
        pytest.fail(f"the tests of the page need {CHROMIUM}: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, server):
    """Opens the page. At the end of the test: nothing was asked of another origin, and the console has no errors but those
    that `allowed` names."""
    server.runner.pace, server.runner.text = 0.0, HELLO
    contexts, strangers, complaints, allowed = [], [], [], []

    def opened(url: str = server.url, **options) -> Page:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(10_000)
        contexts.append(context)
        tab = context.new_page()
        tab.on("request", lambda request: strangers.append(request.url) if not request.url.startswith((url, "data:")) else None)
        tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(url)
        return tab

    opened.allowed = allowed
    yield opened
    for context in contexts:
        context.close()
    assert not strangers
    assert not [text for text in complaints if not any(re.search(pattern, text) for pattern in allowed)]


def ask(tab: Page, text: str = PROMPT, button: str = "#send") -> None:
    tab.fill("#prompt", text)
    tab.click(button)


def finished(tab: Page, count: int = 1) -> None:
    expect(tab.get_by_role("button", name="Retry")).to_have_count(count)


def eventually(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never became true"
        time.sleep(0.01)


# -- the response ------------------------------------------------------------------------------------------------------------


def test_it_is_one_file_with_a_policy_that_allows_only_itself(server):
    with urllib.request.urlopen(server.url) as response:
        body, headers = response.read().decode(), response.headers
    assert headers["content-type"] == "text/html; charset=utf-8" and headers["cache-control"] == "no-cache"
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    assert not re.search(r"(src|href)=[\"']?(https?:|//)|@import|url\(", body)
    again = urllib.request.Request(server.url, headers={"if-none-match": headers["etag"]})
    with pytest.raises(urllib.error.HTTPError, match="304"):
        urllib.request.urlopen(again).close()


def test_an_injected_script_does_not_run(visit):
    tab = visit()
    visit.allowed.append("Content Security Policy")
    tab.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))")
    assert tab.evaluate("window.hacked") is None


# -- the playground ----------------------------------------------------------------------------------------------------------


def test_an_answer_streams_in_tokens_that_show_their_alternatives(visit, server):
    tab = visit()
    expect(tab.locator("#model")).to_have_value("tiny")
    ask(tab)
    finished(tab)
    content, tokens = tab.locator(".content"), tab.locator(".content .token")
    expect(content).to_have_text(HELLO)
    script = server.runner.tokenizer.encode(HELLO, add_special_tokens=False)
    assert tokens.all_text_contents() == [server.runner.tokenizer.token(token) for token in script]
    classes = [token.get_attribute("class") for token in tokens.all()[:3]]
    assert classes == ["token", "token p1", "token p4"]
    tokens.nth(2).hover()
    expect(tab.locator("#tip tr")).to_have_count(NUM_TOP)
    expect(tab.locator("#tip tr.picked")).to_contain_text("5.0 %")
    expect(tab.locator("#tip tr").nth(1)).to_contain_text("19 %")
    expect(tab.locator(".facts")).to_have_text(re.compile(rf"\d+ ms to first · {len(script) + 1} tokens · [\d,.]+ tokens/s"))
    tab.mouse.move(0, 0)
    expect(tab.locator("#tip")).to_be_hidden()


def test_model_text_is_never_html_and_characters_of_several_tokens_are_whole(visit, server):
    server.runner.text = HOSTILE
    tab = visit()
    ask(tab, "<b>bold</b>")
    finished(tab)
    expect(tab.locator(".content")).to_have_text(HOSTILE)
    expect(tab.locator(".ask")).to_have_text("<b>bold</b>")
    assert tab.evaluate("document.querySelectorAll('#logs img, #logs script, #logs b').length") == 0
    tab.locator(".content .token").first.hover()
    expect(tab.locator("#tip tr").first).to_contain_text(TAG.replace(" ", "␣"))
    assert tab.evaluate("[document.querySelector('#tip img'), window.hacked]") == [None, None]
    tab.locator(".content .token", has_text="𝔘").hover()
    assert tab.locator("#tip table").count() > 1, "a character of several tokens has the alternatives of each"


def test_reasoning_is_folded_away(visit, server):
    server.runner.text = "<think>Let me think.</think>It is blue."
    tab = visit()
    ask(tab)
    finished(tab)
    expect(tab.locator(".content")).to_have_text("It is blue.")
    expect(tab.locator("details .tokens")).to_be_hidden()
    tab.get_by_text("Reasoning").click()
    expect(tab.locator("details .tokens")).to_have_text("Let me think.")
    assert tab.locator("details .token").count() > 3


def test_the_settings_are_sent_and_the_servers_refusal_is_shown(visit):
    tab = visit()
    visit.allowed.append("status of 400")
    tab.click("#toggle-settings")
    tab.fill("[name=system]", "Be brief.")
    tab.fill("[name=temperature]", "7")
    ask(tab)
    expect(tab.locator(".fault")).to_have_text(re.compile("temperature must be .*7"))
    tab.fill("[name=temperature]", "0.5")
    tab.fill("[name=max_tokens]", "3")
    with tab.expect_request("**/v1/chat/completions") as sent:
        tab.get_by_role("button", name="Retry").click()
    body = sent.value.post_data_json
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    assert (body["temperature"], body["max_tokens"], body["top_logprobs"]) == (0.5, 3, 5) and "seed" not in body
    finished(tab)
    expect(tab.locator(".facts")).to_contain_text("3 tokens")
    expect(tab.locator(".facts")).to_contain_text("cut at max tokens")


def test_stop_ends_the_request_in_the_engine_and_retry_begins_again(visit, server):
    server.runner.pace = 0.05
    tab = visit()
    ask(tab)
    tab.wait_for_selector(".content .token")
    tab.click("#stop")
    expect(tab.locator(".facts")).to_contain_text("stopped")
    eventually(lambda: not server.engine.streams)
    assert tab.locator(".content").text_content() in HELLO[:-1]
    server.runner.pace = 0.0
    tab.get_by_role("button", name="Retry").click()
    finished(tab)
    expect(tab.locator(".content")).to_have_text(HELLO)


def test_a_conversation_goes_on_from_the_chosen_answer_and_can_be_cleared_and_copied(visit, server):
    tab = visit(permissions=["clipboard-read", "clipboard-write"])
    ask(tab)
    finished(tab)
    server.runner.text = "Second."
    with tab.expect_request("**/v1/chat/completions") as sent:
        ask(tab, "And then?")
    roles = [(message["role"], message["content"]) for message in sent.value.post_data_json["messages"]]
    assert roles == [("user", PROMPT), ("assistant", HELLO), ("user", "And then?")]
    finished(tab, 2)
    tab.get_by_role("button", name="Copy").nth(1).click()
    expect(tab.get_by_role("button", name="Copied")).to_be_visible()
    assert tab.evaluate("navigator.clipboard.readText()") == "Second."
    tab.click("#clear")
    expect(tab.locator(".answer")).to_have_count(0)
    expect(tab.locator(".welcome")).to_be_visible()


def test_conversations_run_side_by_side(visit, server):
    server.runner.pace = 0.15
    tab = visit()
    ask(tab)
    tab.wait_for_selector(".content .token")
    tab.click("#new")
    expect(tab.locator(".welcome")).to_be_visible()
    ask(tab, "Another one.")
    expect(tab.locator("#running")).to_have_text("2")
    server.runner.pace = 0.0
    finished(tab)
    tab.get_by_role("tab", name="Conversation 1").click()
    expect(tab.locator(".content:visible")).to_have_text(HELLO)
    expect(tab.locator(".ask:visible")).to_have_text(PROMPT)


# -- the live view -----------------------------------------------------------------------------------------------------------


def read_page(tab: Page, number: int) -> str:
    """What the map says of a page, by keyboard."""
    tab.focus("#map")
    tab.keyboard.press("Home")
    for _ in range(number - 1):
        tab.keyboard.press("ArrowRight")
    return tab.locator("#told").text_content()


READ_PIXEL = """([canvas, page]) => {
    const [x, y] = map.place(page - 1), context = document.querySelectorAll('#map canvas')[canvas].getContext('2d');
    return [...context.getImageData(x + 1, y + 1, 1, 1).data] }"""
GROUND, VEIL = 0, 1  # the map's canvases


def pixel(tab: Page, canvas: int, page: int) -> list[int]:
    """The colour of a page's upper left part."""
    return tab.evaluate(READ_PIXEL, [canvas, page])


def test_four_at_once_share_the_pages_of_their_prompt(visit, server):
    server.runner.pace, server.runner.text = 0.1, HELLO * 9
    visit.allowed.append("willReadFrequently")  # this test reads what the page only draws
    tab = visit()
    expect(tab.locator("#status")).to_have_text("live")
    blank = pixel(tab, GROUND, 1)
    ask(tab, PROMPT, "#send-four")
    expect(tab.locator("#running")).to_have_text("4")
    shared = tab.locator("#counts dd").nth(1)
    expect(shared).not_to_have_text("0")
    expect(tab.locator("#requests li")).to_have_count(4)
    assert read_page(tab, 1).startswith("Page 1: shared by 4: ") and pixel(tab, GROUND, 1) != blank
    row = tab.locator("#requests button").nth(1)
    row.hover()
    assert pixel(tab, VEIL, 1)[3] == 0 and pixel(tab, VEIL, 300)[3] > 100, "its pages stand out, the others are veiled"
    expect(tab.locator(".answer .slot").nth(1)).to_have_text(re.compile("^[0-3]$"))
    server.runner.pace = 0.0
    finished(tab, 4)
    expect(shared).to_have_text("0")
    expect(tab.locator("#requests li")).to_have_count(0)
    assert read_page(tab, 1) == "Page 1: cached: known content that nobody holds now."
    assert read_page(tab, 300) == "Page 300: free."


def test_speeds_latencies_and_counts_are_shown(visit):
    tab = visit()
    ask(tab)
    finished(tab)
    for latency in ("#ttft", "#itl"):
        for cell in tab.locator(f"{latency} td").all():
            expect(cell).to_have_text(re.compile(r"^[\d.]+ m?s$"))
    expect(tab.locator("#generation")).not_to_have_text(re.compile("^[0–]$"))
    assert tab.locator("#page-size").text_content() == "300 pages of 4 tokens"
    counts = [int(text) for text in tab.locator("#counts dd").all_text_contents()]
    assert sum(counts) == 300
    assert tab.locator("#speed path.first").get_attribute("d").startswith("M")


def test_the_page_of_a_pointer_is_told_and_only_changed_pages_are_drawn(visit):
    tab = visit()
    expect(tab.locator("#status")).to_have_text("live")
    box = tab.locator("#map canvas").first.bounding_box()
    tab.mouse.move(box["x"] + 5, box["y"] + 5)
    expect(tab.locator("#told")).to_have_text(re.compile("^Page 1: "))
    drawn = tab.evaluate("""() => { let drawn = 0; const draw = map.draw; map.draw = (i) => { drawn++; draw.call(map, i) };
        const codes = map.codes.slice(); codes[250] = 3; codes[251] = 0x8000; map.take(codes, [[2, 5]], []); return drawn }""")
    assert drawn == 2


def test_the_feed_is_read_only_while_the_page_can_be_seen(visit, server):
    tab = visit()
    expect(tab.locator("#status")).to_have_text("live")
    hide = """Object.defineProperty(document, 'hidden', {value: %s, configurable: true});
        document.dispatchEvent(new Event('visibilitychange'))"""
    with tab.expect_event("requestfailed", lambda request: request.url.endswith("/live")):
        tab.evaluate(hide % "true")
    with tab.expect_request("**/live"):
        tab.evaluate(hide % "false")


# -- everybody ---------------------------------------------------------------------------------------------------------------


def test_the_keyboard_is_enough(visit):
    tab = visit()
    expect(tab.locator("#model")).to_have_value("tiny")
    press = tab.keyboard.press
    press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the prompt"
    press("Enter")
    expect(tab.locator("#prompt")).to_be_focused()
    tab.keyboard.type("Hello")
    press("Enter")
    finished(tab)
    expect(tab.locator(".content")).to_have_text(HELLO)
    for _ in range(20):
        press("Shift+Tab")
        if "token" in tab.evaluate("document.activeElement.className"):
            break
    expect(tab.locator(".content .token").first).to_be_focused()
    press("ArrowRight")
    expect(tab.locator(".content .token").nth(1)).to_be_focused()
    expect(tab.locator("#tip")).to_contain_text("70 %")
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press("Escape")
    expect(tab.locator("#tip")).to_be_hidden()
    press("End")
    expect(tab.locator(".content .token").last).to_be_focused()
    for _ in range(20):
        press("Tab")
        if tab.evaluate("document.activeElement.id") == "map":
            break
    press("ArrowDown")
    expect(tab.locator("#told")).to_have_text(re.compile(r"^Page \d+: "))


def test_everything_that_can_be_operated_has_a_name(visit):
    tab = visit()
    ask(tab)
    finished(tab)
    tab.click("#toggle-settings")
    nameless = """() => [...document.querySelectorAll('button, input, select, textarea, [tabindex]:not(.token):not(.log)')]
        .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.length)).map((node) => node.outerHTML)"""
    assert tab.evaluate(nameless) == []
    expect(tab.get_by_role("log", name="Answers")).to_have_attribute("aria-live", "polite")
    expect(tab.locator(".answer")).to_have_attribute("aria-busy", "false")


def test_a_phone_shows_it_all_without_scrolling_sideways(visit, server):
    server.runner.text = "A_very_long_word_" * 12 + HOSTILE
    tab = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    expect(tab.locator("#status")).to_have_text("live")
    ask(tab, "w" * 200, "#send-four")
    finished(tab, 4)
    wide = """[document.documentElement, ...document.querySelectorAll('main *')]
        .filter((node) => node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.outerHTML.slice(0, 99))"""
    assert tab.evaluate(wide) == []
    tab.click("#toggle-settings")
    assert tab.evaluate(wide) == []
    tab.locator(".content .token").first.tap()
    expect(tab.locator("#tip")).to_be_visible()
    tab.get_by_role("button", name="Live").tap()
    expect(tab.locator("#map")).to_be_visible()
    expect(tab.locator("#prompt")).to_be_hidden()
    assert tab.evaluate(wide) == [] and tab.evaluate("document.documentElement.scrollWidth") == 390


CONTRASTS = [("--ink", "--surface", 7), ("--ink", "--ground", 7), ("--muted", "--surface", 4.5), ("--muted", "--ground", 4.5),
             ("--muted", "--sunken", 4.5), ("--accent", "--surface", 4.5), ("--on-accent", "--accent", 4.5),
             ("--danger", "--surface", 4.5), ("--edge", "--surface", 3), ("--edge", "--ground", 3),
             *((f"--s{i}", "--surface", 3) for i in range(8))]  # fmt: skip


def luminance(rgb) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_dark_and_light_have_the_contrast_of_wcag_aa(visit, scheme):
    tab = visit(color_scheme=scheme)
    colour = lambda expression: tab.evaluate(f"colour({expression!r}).rgb")
    assert (luminance(colour("var(--ground)")) < 0.1) == (scheme == "dark")
    for front, back, least in CONTRASTS:
        found = contrast(colour(f"var({front})"), colour(f"var({back})"))
        assert found >= least, f"{front} on {back}: {found:.2f}"
    strongest = colour("color-mix(in oklab, var(--unsure) 46%, var(--surface))")
    assert contrast(colour("var(--ink)"), strongest) >= 4.5


def test_the_theme_can_be_chosen_and_is_kept(visit):
    tab = visit(color_scheme="light")
    ground = lambda: tab.evaluate("getComputedStyle(document.body).backgroundColor")
    light = ground()
    tab.get_by_role("button", name="Switch to the dark theme").click()
    dark = ground()
    assert dark != light
    tab.reload()
    assert ground() == dark
    tab.get_by_role("button", name="Switch to the light theme").click()
    assert ground() == light


def test_nothing_moves_for_those_who_do_not_want_it(visit, server):
    server.runner.pace = 0.05
    moving = "getComputedStyle(document.querySelector('.running .content'), '::after').animationName"
    for motion, name in (("no-preference", "breathe"), ("reduce", "none")):
        tab = visit(reduced_motion=motion)
        ask(tab)
        tab.wait_for_selector(".running .content .token")
        assert tab.evaluate(moving) == name
        tab.click("#stop")


# -- with an API key ---------------------------------------------------------------------------------------------------------


def test_with_an_api_key_the_page_loads_asks_for_it_and_sends_it(visit):
    visit.allowed.append("status of 401")
    with serving(api_key=("secret",)) as guarded:
        tab = visit(guarded.url)
        dialog = tab.get_by_role("dialog")
        expect(dialog).to_contain_text("a valid API key is needed")
        tab.fill("#key", "wrong")
        tab.keyboard.press("Enter")
        expect(tab.locator("#key")).to_have_value("wrong")
        expect(dialog).to_be_visible()
        tab.fill("#key", "secret")
        tab.get_by_role("button", name="Use it").click()
        expect(dialog).to_be_hidden()
        expect(tab.locator("#status")).to_have_text("live")
        expect(tab.locator("#model")).to_have_value("tiny")
        assert tab.evaluate("[sessionStorage.getItem('jaxpaged.key'), localStorage.getItem('jaxpaged.key')]") == [
            "secret",
            None,
        ]
        ask(tab)
        finished(tab)
        expect(tab.locator(".content")).to_have_text(HELLO)
        tab.reload()
        expect(tab.locator("#status")).to_have_text("live")
        tab.close()


def test_without_the_key_the_page_says_what_is_missing(visit):
    visit.allowed.append("status of 401")
    with serving(api_key=("secret",)) as guarded:
        tab = visit(guarded.url)
        tab.get_by_role("button", name="Cancel").click()
        expect(tab.locator("#status")).to_have_text("needs the API key")
        tab.click("#change-key")
        tab.fill("#key", "secret")
        tab.keyboard.press("Enter")
        expect(tab.locator("#status")).to_have_text("live")
        tab.close()
