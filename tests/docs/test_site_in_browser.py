"""The documentation site in a real browser, served as a host would: every page whole at every width, without the world."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from browser import PROGRAM, Browser

ROOT = Path(__file__).parents[2]
IDEAS = sorted((ROOT / "docs" / "ideas").glob("*.md"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="there is no chromium here: `make packages` installs it"),
]


@dataclass(frozen=True)
class Site:
    """A built site, and the address where it is served."""

    folder: Path
    address: str


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """The browser says what failed."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pytest.importorskip("mkdocs", reason="pip install 'thinwire[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Site(folder, f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


SEEN = """new Promise(done => {
  const pictures = [...document.images];
  pictures.forEach(each => each.loading = 'eager');
  Promise.allSettled(pictures.map(each => each.decode())).then(() => done({
    beyond: document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth,
    width: innerWidth,
    broken: pictures.filter(each => !each.naturalWidth).map(each => each.src),
    text: document.body.innerText.length}));
})"""


def faults(browser: Browser, url: str, address: str, *, width: int, dark: bool) -> list[str]:
    """What is wrong with a page of the site at `address`, shown in a window of `width` pixels."""
    browser.open(url, width=width, height=900, dark=dark)
    seen = browser.evaluate(SEEN)
    found = [*browser.complaints(), *(f"broken picture {each}" for each in seen["broken"])]
    found += [f"asks {each}" for each in browser.requests() if not each.startswith(address)]
    if seen["beyond"] > 0 or seen["width"] != width:
        found.append(f"{seen['beyond']} px beyond a page of {seen['width']} px")
    return found if seen["text"] > 20 else [*found, "the page is empty"]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["desktop, light", "phone, dark"])
def test_every_page_is_whole_and_asks_nobody_else(site: Site, browser: Browser, width: int, dark: bool) -> None:
    pages = sorted(str(page.relative_to(site.folder)) for page in site.folder.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))
    found = {page: faults(browser, site.address + page, site.address, width=width, dark=dark) for page in pages}
    assert {page: wrong for page, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_scheme_is_the_systems(site: Site, browser: Browser, dark: bool) -> None:
    browser.open(site.address, width=1280, height=900, dark=dark)
    assert browser.evaluate("document.body.dataset.mdColorScheme") == ("slate" if dark else "default")


def test_the_search_finds_a_key(site: Site, browser: Browser) -> None:
    browser.open(site.address + "index.html?q=inner_steps", width=1280, height=900, dark=False)
    found = browser.evaluate("""new Promise(done => { const look = () => {
      const links = [...document.querySelectorAll('.md-search-result__link')];
      links.length ? done(links.map(each => each.href)) : setTimeout(look, 50); }; look(); })""")
    assert any("sync.html" in link for link in found)


# Of every picture: where it is, what is said of it, how wide it is shown.
DRAWING = "[...document.querySelectorAll('article img')].map(each => [each.src, each.alt, each.width])"


@pytest.mark.parametrize("idea", IDEAS, ids=lambda page: page.stem)
def test_an_idea_has_one_drawing_whose_letters_a_phone_shows(site: Site, browser: Browser, idea: Path) -> None:
    browser.open(f"{site.address}ideas/{idea.stem}.html", width=390, height=844, dark=False)
    [(source, alt, width)] = browser.evaluate(DRAWING)
    assert source.endswith(f"/pictures/{idea.stem}.svg") and len(alt.split()) > 5
    drawn = (ROOT / "docs" / "pictures" / f"{idea.stem}.svg").read_text()
    whole = re.findall(r'viewBox="0 0 (\d+) \d+"', drawn)[0]
    assert min(int(size) for size in re.findall(r'font-size="(\d+)"', drawn)) * width / int(whole) > 10


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ('<img src="nowhere.png">', "broken picture"),
        ('<img src="nowhere.png" loading="lazy" style="position: absolute; top: 9000px">', "broken picture"),
        ('<script src="http://localhost:1/far.js"></script>', "asks http://localhost"),
        ('<div style="width: 500px">wide</div>', "px beyond"),
        ("<script>nothing.here()</script>", "nothing is not defined"),
        ("<script>console.error('it went wrong')</script>", "it went wrong"),
    ],
)
def test_a_fault_in_a_page_is_seen(site: Site, browser: Browser, body: str, word: str) -> None:
    page = site.folder / f"fault-{len(list(site.folder.glob('*.htm')))}.htm"  # a name of its own: nothing is cached
    page.write_text((site.folder / "models.html").read_text().replace("</article>", body + "</article>"))
    found = faults(browser, site.address + page.name, site.address, width=390, dark=False)
    assert any(word in each for each in found), found
