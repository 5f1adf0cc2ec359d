"""The documentation site: it builds strictly, asks no other server, is current, and what its pages say of commands and messages is so."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import http.server
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from docgen import figure, links, options, strategies
from selfimprove import discovery, hooks, records
from selfimprove.cli import main

TOP = Path(__file__).parent.parent
DOCS = TOP / "docs"
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
RUN = ("start.md", "comparing.md", "machines.md", "safety.md")
"""Pages whose commands run, in their order, in an empty folder."""
ELSEWHERE = ("selfimprove doctor", "make ", "selfimprove bench arms=[toy]", "selfimprove bench --merge")
"""What other tests run, because it looks at the machine or takes minutes."""
LISTED = re.findall(r"^selfimprove bench .*--dry-run$", (TOP / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
"""What tests/test_docs.py runs, because the README says it too, and which takes seconds."""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)], cwd=TOP, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


class _Page(HTMLParser):
    """What a page loads by itself, and its ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        given = {k: v or "" for k, v in attrs}
        self.ids.add(given.get("id", ""))
        if tag in ("script", "img", "iframe", "source", "video", "embed"):
            self.loaded.append(given.get("src", ""))
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.loaded.append(given.get("href", ""))


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        for address in _Page(path.read_text(encoding="utf-8")).loaded:
            assert not re.match(r"(\w+:)?//", address), f"{path.relative_to(site)} loads {address}"
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(\w+:)?//", path.read_text(encoding="utf-8")), path.name


def test_every_hook_record_and_option_has_its_place(site: Path) -> None:
    text = (site / "hooks.html").read_text(encoding="utf-8")
    for spec in hooks.SPECS:
        for name in vars(spec):
            if hasattr(getattr(spec, name), f"{hooks.PROJECT}_spec"):
                assert f'id="{name}"' in text, name
    ids = _Page((site / "reference" / "records.html").read_text(encoding="utf-8")).ids
    for name, thing in vars(records).items():
        if dataclasses.is_dataclass(thing) and not name.startswith("_"):
            assert {f"selfimprove.records.{name}", *(f"selfimprove.records.{name}.{f.name}" for f in dataclasses.fields(thing))} <= ids
    for group, found in options.groups().items():
        ids = _Page((site / "reference" / "options" / f"{group}.html").read_text(encoding="utf-8")).ids
        assert {options.anchor(o) for o in found} <= ids
    for folder in strategies.plugins():
        assert (site / "strategies" / f"{folder}.html").is_file()


def test_every_option_says_what_it_takes() -> None:
    for group, found in options.groups().items():
        for option in found:
            assert option.summary, f"{group}={option.name} does not begin with a comment"
            if target := options.target_of(option):
                assert options.summary_of(target), f"{target} has no docstring"


def test_arguments_are_those_of_the_signature() -> None:
    taken = options.arguments_of("selfimprove.policy_gradient.PolicyGradient")
    assert taken["beta"] == options.Argument("float", "0.0", "weight of the KL divergence from the reference.")
    assert taken["clip_low"].about == taken["clip_high"].about != ""
    assert taken["lora"].default == "required"


def test_the_figure_is_current() -> None:
    assert (DOCS / "six_verbs.svg").read_text(encoding="utf-8") == figure.document(), "run python -m docgen.figure > docs/six_verbs.svg"
    for verb in figure.verbs():
        assert f"{verb.letter} = {verb.name}" in figure.document()


def test_links_follow_their_documents() -> None:
    known = frozenset({"log.md", "strategies/srt.md", "reference/options/index.md", "reference/options/task.md"})
    text = "[a](../../docs/log.md#x) [b](../srt/README.md) [`c`](../../conf/task) [d](src/x.py) [e](https://example.org)\n```\n[a](../../docs/log.md)\n```\n"
    assert links.moved(text, "plugins/seal/README.md", "strategies/seal.md", known) == (
        "[a](../log.md#x) [b](srt.md) [`c`](../reference/options/task.md) d [e](https://example.org)\n```\n[a](../../docs/log.md)\n```\n"
    )


# ---- commands ----


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def answer(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and all that a command prints; errors come last."""
    capsys.readouterr()
    code: object = 0
    try:
        code = main(shlex.split(command)[1:])
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return int(str(code or 0)), out + err


@pytest.mark.parametrize("name", RUN)
def test_the_commands_of_a_page_run_in_their_order(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in "".join(fenced(DOCS / name, "bash")).splitlines():
        if line and not line.startswith(ELSEWHERE) and line not in LISTED:
            code, said = answer(line, capsys)
            assert code == 0, f"{line}: {said}"


@pytest.mark.parametrize("name", [p.name for p in sorted(DOCS.glob("*.md")) if fenced(p, "console")])
def test_a_transcript_is_what_happens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for block in fenced(DOCS / name, "console"):
        for entry in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = entry.partition("\n")
            _, said = answer(command, capsys)
            pattern = r".*".join(re.escape(part) for part in _flat(expected).split("…"))
            assert re.fullmatch(pattern, _flat(said)), f"{command} said {said}"


# ---- messages ----


def _flat(text: str) -> str:
    return " ".join(text.split())


@functools.cache
def messages() -> tuple[tuple[re.Pattern[str], int], ...]:
    """Every text that the code formats, as a pattern, and how many of its characters are fixed."""
    found = {}
    for path in [*(TOP / "selfimprove").rglob("*.py"), *TOP.glob("plugins/*/src/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else None for v in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            else:
                continue
            fixed = sum(len(p) for p in parts if p is not None)
            if fixed > 20:
                pattern = "".join(".*?" if p is None else re.sub(r"(\\ |\\\n|\s)+", " ", re.escape(p)) for p in parts)
                found[pattern.strip()] = fixed
    return tuple((re.compile(p), n) for p, n in found.items())


MESSAGES = [line for block in fenced(DOCS / "troubleshooting.md", "text") for line in block.splitlines()]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_source(message: str) -> None:
    assert sum(n for p, n in messages() if p.search(message)) > 0.4 * len(message), "no such message in the source any more"


# ---- in a browser ----

HARNESS = """<!doctype html><title>pages</title><pre id="out"></pre><script>
const pages = %s, width = %d, found = {};
async function look(page) {
  const frame = document.createElement('iframe');
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  document.body.append(frame);
  await new Promise(done => { frame.onload = done; frame.src = page; });
  await new Promise(done => setTimeout(done, 150));
  const root = frame.contentDocument.documentElement;
  found[page] = {
    over: root.scrollWidth - frame.contentWindow.innerWidth,
    loaded: frame.contentWindow.performance.getEntriesByType('resource').map(e => e.name),
  };
  frame.remove();
}
(async () => { for (const page of pages) await look(page); document.getElementById('out').textContent = JSON.stringify(found); })();
</script>"""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_fits_its_window_without_an_error(site: Path, width: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    pages = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html") if "files" not in p.parts and p.name != "404.html")
    harness = site / f"harness_{width}.html"
    harness.write_text(HARNESS % (json.dumps(pages), width), encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", f"--window-size={width + 100},1000"]
    words += ["--enable-logging=stderr", "--virtual-time-budget=600000", "--timeout=240000", "--dump-dom"]
    try:
        with served(site) as address:
            done = subprocess.run([CHROMIUM, *words, address + harness.name], capture_output=True, text=True, timeout=300)
    finally:
        harness.unlink()
    printed = re.search(r'<pre id="out">(\{.*?\})</pre>', done.stdout, flags=re.DOTALL)
    assert printed is not None, done.stderr[-2000:]
    found = json.loads(printed[1].replace("&amp;", "&"))
    assert sorted(found) == pages
    assert not {page: f["over"] for page, f in found.items() if f["over"] > 0}, "pages scroll sideways"
    assert not {u for f in found.values() for u in f["loaded"] if not u.startswith(address)}
    assert not re.findall(r"CONSOLE.*", done.stderr)


def test_no_plugin_is_without_a_page() -> None:
    ours = {s.distribution for s in discovery.sources()} - {discovery.CORE}
    assert set(strategies.plugins().values()) <= ours
