"""The page: it asks nobody but its server, what a model writes stays text, and a browser shows it all."""

import base64
import hashlib
import json
import re
from itertools import pairwise

import pytest

import served
import tiny
from browser import CHROMIUM, Browser
from fake_server import EXPERTS, LAYERS, TOP_K, FakeServer, picture
from moesmith.serve.page import html

in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"
)
XSS = [
    "<img src=x onerror=\"document.title='pwned'\">", "<script>document.title='pwned'</script>",
    "</div></section>", "<svg onload=document.title='pwned'>", "javascript:alert(1)", "&lt;b&gt;", "\u202e",
    "{{js}}",
]  # fmt: skip


# ---------------------------------------------------------------- the file


def test_the_policy_names_the_hash_of_what_stands_there():
    page = html()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page).group(1)
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy


def test_it_names_no_other_place():
    found = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+", html())
    assert found == []
    assert not re.search(r'\b(?:src|href)="(?!#|data:,)', html())


def test_the_script_never_makes_html_from_text():
    script = html().partition("<script>")[2]
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert word not in script


def test_every_id_the_script_wants_is_on_the_page():
    page = html()
    wanted = set(re.findall(r'\bby\("([\w-]+)"\)', page))
    there = re.findall(r'\bid="([\w-]+)"', page)
    assert wanted <= set(there) and len(there) == len(set(there))


def test_the_fake_picture_obeys_the_law_of_the_real_one():
    for counts, chosen in zip(*(picture(["a"] * 9)[key] for key in ("counts", "chosen")), strict=True):
        assert sum(counts) == 9 * TOP_K and all(len(set(of)) == TOP_K for of in chosen)


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def server():
    with FakeServer(page=html()) as server:
        yield server


def load(browser, server, **how):
    browser.messages.clear()
    browser.urls.clear()
    browser.open(server.url + "/", **how)
    browser.wait("!document.getElementById('model').disabled")


def ask(browser, text, wait=True):
    browser.type("#prompt", text)
    browser.key("Enter")
    last = "[...document.querySelectorAll('.turn.user .text')].at(-1)"
    browser.wait(f"{last}?.textContent === {json.dumps(text)}")
    if wait:
        browser.wait("document.getElementById('stop').hidden")


# Cells that have the colour of "chosen", per layer.
LIT = """(() => {
  const c = document.getElementById('heat'), w = c.width / EXPERTS, h = c.height / LAYERS, out = [];
  const all = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  const want = getComputedStyle(c).color.match(/\\d+/g).slice(0, 3).join();
  for (let layer = 0; layer < LAYERS; layer++) {
    const row = [];
    for (let expert = 0; expert < EXPERTS; expert++) {
      const at = 4 * (Math.floor((layer + .5) * h) * c.width + Math.floor((expert + .5) * w));
      if ([...all.slice(at, at + 3)].join() === want) row.push(expert);
    }
    out.push(row);
  }
  return out;
})()"""
# Tokens marked as those of the expert that is looked at.
MARKED = """[...document.getElementById('tokens').children]
  .map((span, i) => span.classList.contains('on') ? i : -1).filter(i => i >= 0)"""
CELLS = """[...document.querySelectorAll('#table tbody tr')]
  .map(row => [...row.querySelectorAll('td')].map(cell => +cell.textContent))"""
# What reaches out of the window, but for what scrolls or is cut on purpose.
OUTSIDE = """[...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
  && !e.closest('#scroll, #table, .skip, .unseen, summary')
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.id || e.className)"""
TOO_SMALL = """[...document.querySelectorAll('button, select, textarea')]
  .filter(e => e.checkVisibility() && e.getBoundingClientRect().height < 24).map(e => e.id)"""
NAMELESS = """[...document.querySelectorAll('button, select, textarea, input')].filter(e =>
  !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.[0]?.textContent.trim()))
  .map(e => e.id)"""
LAST = "[...document.querySelectorAll('.turn.assistant')].at(-1)"


@pytest.mark.slow
@in_a_browser
def test_a_conversation(browser, server):
    load(browser, server)
    server.says(["Grüße", ", 世界", " 🎉", "\n", "done"])
    ask(browser, "hello")
    assert browser.run(f"{LAST}.querySelector(':scope > .text').textContent") == "Grüße, 世界 🎉\ndone"
    assert "5 tokens" in browser.run(f"{LAST}.querySelector('.facts').textContent")
    browser.run("document.getElementById('settings').open = true")
    browser.type("#system", "Be brief.")
    browser.run(
        "(e => { e.value = '0'; e.dispatchEvent(new Event('input')); })"
        "(document.getElementById('temperature'))"
    )
    browser.run("document.getElementById('model').value = 'tiny-sft'")
    browser.type("#prompt", "two\nlines")
    browser.key("Enter")
    browser.wait("document.querySelectorAll('.turn.assistant').length === 2")
    browser.wait("document.getElementById('stop').hidden")
    first, second = server.requests
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("tiny", 0.7, 512)
    assert first["messages"] == [{"role": "user", "content": "hello"}] and first["stream"] is True
    assert (second["model"], second["temperature"]) == ("tiny-sft", 0)
    assert second["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Grüße, 世界 🎉\ndone"},
        {"role": "user", "content": "two\nlines"},
    ]
    browser.click("#new")
    assert browser.run("document.querySelectorAll('.turn').length") == 0
    ask(browser, "afresh")
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["Be brief.", "afresh"]
    assert browser.messages == []
    assert all(url.startswith(server.url) or url.startswith("data:") for url in browser.urls)


@pytest.mark.slow
@in_a_browser
def test_what_a_model_writes_stays_text(browser, server):
    server.models = ("<img src=x onerror=document.title='pwned'>", *server.models)
    load(browser, server)
    server.says(XSS, reasoning=XSS[0])
    ask(browser, XSS[1])
    browser.wait("!document.getElementById('map-body').hidden")
    browser.run("new Promise(done => setTimeout(done, 200))")
    assert browser.run("document.title") == "moesmith"
    assert browser.run(f"{LAST}.querySelector(':scope > .text').textContent") == "".join(XSS)
    assert browser.run("document.querySelectorAll('main img, main svg, main script').length") == 0
    assert "".join(XSS) == browser.text("#tokens") and browser.messages == []
    # Where escaping had a hole, the page's policy stands.
    browser.run(f'{LAST}.innerHTML = "<img src=x onerror=\\"document.title=\'pwned\'\\">"')
    browser.run("new Promise(done => setTimeout(done, 200))")
    assert browser.run("document.title") == "moesmith" and browser.messages != []


@pytest.mark.slow
@in_a_browser
def test_stop_ends_the_request_and_keeps_what_was_said(browser, server):
    load(browser, server)
    server.says(["a", "b", "c"], kind="slow", pause=0.05)
    ask(browser, "go on", wait=False)
    browser.wait(f"{LAST}.textContent.includes('abc')")
    assert browser.run("document.getElementById('send').hidden")
    browser.click("#stop")
    browser.wait("document.getElementById('stop').hidden")
    assert server.gone.wait(5), "the server sees that the client is gone"
    assert "stopped" in browser.run(f"{LAST}.querySelector('.facts').textContent")
    server.says(["fine"])
    ask(browser, "and now")
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["go on", "abc", "and now"]
    server.gone.clear()
    server.says(["a"], kind="slow")
    ask(browser, "again", wait=False)
    browser.wait(f"{LAST}.querySelector(':scope > .text').textContent === 'a'")
    browser.key("Escape")
    assert server.gone.wait(5)


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize(("kind", "says"), [("broken", "connection broke"), ("error", "out of memory")])
def test_a_reply_that_breaks_says_so_and_can_be_tried_again(kind, says, browser, server):
    load(browser, server)
    server.says(["one", "two", "three", "four"], kind=kind)
    ask(browser, "x")
    browser.wait(f"{LAST}.querySelector('.wrong') !== null")
    assert says in browser.run(f"{LAST}.querySelector('.wrong').textContent")
    server.says(["well"])
    browser.run(f"[...{LAST}.querySelectorAll('button')].find(b => b.textContent === 'Try again').click()")
    browser.wait(f"{LAST}.textContent.includes('well') && document.getElementById('stop').hidden")
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["x"]
    assert browser.run("document.querySelectorAll('.turn').length") == 2


@pytest.mark.slow
@in_a_browser
def test_refusals_are_said_in_words(browser, server):
    load(browser, server)
    server.refuses(429, "the queue is full", Retry_After="7")
    ask(browser, "x")
    assert "queue is full" in browser.run(f"{LAST}.textContent") and "7 s" in browser.run(
        f"{LAST}.textContent"
    )
    server.refuses(500, "")
    ask(browser, "y")
    assert "500" in browser.run(f"{LAST}.textContent")
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["y"], (
        "what got no reply is not said again"
    )


@pytest.mark.slow
@in_a_browser
def test_a_server_with_a_key(browser):
    with FakeServer(key="secret", page=html()) as server:
        browser.open(server.url + "/")
        browser.wait("document.getElementById('alert').textContent.includes('API key')")
        assert browser.run(
            "!document.getElementById('key-field').hidden && document.getElementById('model').disabled"
        )
        browser.type("#key", "secret")
        browser.key("Enter")
        browser.wait("!document.getElementById('model').disabled")
        assert browser.text("#alert") == ""
        ask(browser, "hello")
        assert server.asked[-1][2].get("Authorization") == "Bearer secret"
        assert "secret" not in browser.run("JSON.stringify([localStorage, sessionStorage, document.cookie])")


@pytest.mark.slow
@in_a_browser
def test_the_map_shows_the_last_reply_its_tokens_and_its_experts(browser, server):
    load(browser, server)
    pieces = ["The", " sum", " is", " 42", ".", "\n", "Done"]
    server.says(pieces)
    ask(browser, "x")
    browser.wait("!document.getElementById('map-body').hidden")
    facts = picture(pieces)
    said = browser.text("#map-said")
    assert f"{LAYERS} layers × {EXPERTS} experts, top-{TOP_K}, over 7 tokens" in said and "got none" in said
    idle = sum(n == 0 for row in facts["counts"] for n in row) / (LAYERS * EXPERTS)
    assert f"{100 * idle:.0f}\u00a0% of the experts" in said

    browser.run("document.getElementById('scroll').focus()")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowRight"):  # the first takes the corner
        browser.key(key)
    count, of = facts["counts"][2][1], facts["chosen"][2]
    assert browser.text("#tip").startswith(f"Layer 2, expert 1: {count} of 7 tokens")
    assert browser.run(MARKED) == [i for i, experts in enumerate(of) if 1 in experts] != []
    browser.key("Escape")
    assert browser.run(MARKED) == [] and browser.text("#tip") == ""

    browser.hover("#heat", 0.5 / EXPERTS, 3.5 / LAYERS)
    assert browser.text("#tip").startswith("Layer 3, expert 0: ")
    browser.hover("h1")
    browser.hover("#token-3")
    assert "Token 4 of 7, “ 42”" in browser.text("#tip")
    lit = LIT.replace("EXPERTS", str(EXPERTS)).replace("LAYERS", str(LAYERS))
    assert browser.run(lit) == [sorted(rows[3]) for rows in facts["chosen"]]
    browser.hover("h1")
    assert browser.run("document.getElementById('all').getAttribute('aria-pressed')") == "true"

    browser.click("#after")
    browser.click("#after")
    assert "Token 2 of 7" in browser.text("#tip")
    browser.run("document.getElementById('tokens').focus()")
    browser.key("End")
    assert "Token 7 of 7" in browser.text("#tip")
    browser.key("ArrowLeft")
    assert browser.run("document.getElementById('tokens').getAttribute('aria-activedescendant')") == "token-5"
    browser.click("#all")
    browser.run("document.getElementById('table').open = true")
    browser.wait("document.querySelectorAll('#table td').length > 0")
    cells = browser.run(CELLS)
    assert cells == facts["counts"]
    assert browser.messages == []


@pytest.mark.slow
@in_a_browser
def test_a_reply_before_the_last_can_be_looked_at_and_no_map_is_asked_for_unseen(browser, server):
    load(browser, server, width=390, height=800, touch=True)
    server.says(["first"] * 3)
    ask(browser, "x")
    server.says(["second"] * 5)
    ask(browser, "y")
    asked = [path for path, *_ in server.asked if "experts" in path]
    assert asked == [], "on a phone the map is out of sight: it would cost the server a pass for nothing"
    browser.click("#view-map")
    browser.wait("document.getElementById('map-said').textContent.includes('5 tokens')")
    browser.click("#view-chat")
    browser.run("document.querySelector('.turn.assistant .facts button').click()")
    browser.wait("document.getElementById('map-said').textContent.includes('3 tokens')")


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize(
    ("width", "dark"), [(320, False), (390, True), (768, False), (1280, True), (1920, False)]
)
def test_nothing_scrolls_sideways_and_text_can_be_read(width, dark, browser, server):
    server.shape = (48, 128, 8)
    server.models = ("a-model-with-a-very-long-name-" * 4, *server.models)
    load(browser, server, width=width, height=760, dark=dark, touch=width < 800)
    server.says(["word "] * 40 + ["x" * 400])
    ask(browser, "y" * 300)
    for view in ("chat", "map"):
        if width <= 860:
            browser.click(f"#view-{view}")
        if view == "map":
            browser.wait("!document.getElementById('map-body').hidden")
        assert browser.run("document.documentElement.scrollWidth") <= width
        for part in ("log", "map", "tokens"):
            assert (
                browser.run(f"(e => e.scrollWidth - e.clientWidth)(document.getElementById('{part}'))") <= 0
            )
        inside = browser.run(OUTSIDE)
        assert inside == []
        assert browser.run("document.getElementById('send').getBoundingClientRect().bottom") <= 760
    colours = browser.run("['color', 'backgroundColor'].map(k => getComputedStyle(document.body)[k])")
    ink, page = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (ink > page) == dark and abs(ink - page) > 500
    small = browser.run(TOO_SMALL)
    assert small == [], "too small for a finger"


@pytest.mark.slow
@in_a_browser
def test_it_can_be_used_by_keyboard_and_read_aloud(browser, server):
    load(browser, server)
    server.says(["ok"])
    ask(browser, "x")
    browser.wait("!document.getElementById('map-body').hidden")
    nameless = browser.run(NAMELESS)
    assert nameless == []
    assert browser.run("document.getElementById('log').getAttribute('role')") == "log"
    stops = []
    for _ in range(40):
        browser.key("Tab")
        stops.append(browser.run("document.activeElement.id || document.activeElement.textContent"))
    assert {"prompt", "send", "model", "new", "theme", "follow", "tokens", "scroll", "all"} <= set(stops)
    assert all(a != b for a, b in pairwise(stops)), "the focus moves at every step"


@pytest.mark.slow
@in_a_browser
def test_with_our_own_server(browser):
    """The same page over the real thing: what it shows is what the server's own routes say."""
    with served.running() as real:
        browser.messages.clear()
        browser.open(real.url + "/")
        browser.wait("!document.getElementById('model').disabled")
        assert browser.run("[...document.getElementById('model').options].map(o => o.value)") == [
            served.BASE, *served.ADAPTERS
        ]  # fmt: skip
        browser.run(
            "['temperature', 'max-tokens'].forEach((id, i) => { const e = document.getElementById(id);"
            " e.value = ['0', '12'][i]; e.dispatchEvent(new Event('input')); })"
        )
        browser.run("document.getElementById('model').value = 'second'")
        ask(browser, "hello")
        told = real.client().chat.completions.create(
            model="second", messages=[{"role": "user", "content": "hello"}], max_tokens=12, temperature=0
        )
        text = browser.run(f"{LAST}.querySelector(':scope > .text').textContent")
        assert text == told.choices[0].message.content
        browser.wait("!document.getElementById('map-body').hidden")
        browser.run("document.getElementById('table').open = true")
        browser.wait("document.querySelectorAll('#table td').length > 0")
        tokens = browser.run("document.getElementById('tokens').children.length")
        assert tokens == told.usage.completion_tokens
        assert [sum(row) for row in browser.run(CELLS)] == [tokens * tiny.TOP_K] * tiny.LAYERS
        assert browser.messages == []


@pytest.mark.slow
@in_a_browser
def test_the_theme_button(browser, server):
    load(browser, server)
    seen = []
    for _ in range(3):
        browser.click("#theme")
        seen.append((browser.text("#theme"), browser.run("getComputedStyle(document.body).backgroundColor")))
    assert [word for word, _ in seen] == ["Theme: light", "Theme: dark", "Theme: auto"]
    assert seen[0][1] == seen[2][1] == "rgb(255, 255, 255)" and seen[1][1] == "rgb(20, 23, 27)"
