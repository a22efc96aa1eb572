"""Open the site in a browser without a display, and check what readers see: ``make docs-check``, after ``make docs``.

    python docs/check_site.py [--site docs/_build/html] [--out docs/_build/screenshots] [PAGE ...]

All pages are read for links and pictures that lead nowhere. Those that are named, or by default all but most pages of
single names in the reference, are opened at 400 and 1,400 pixels, light and dark. It is a failure if a picture is
missing, a formula is not rendered, the page scrolls sideways, something is printed as an error on the console, or
anything is requested from the network. Screenshots are written to a folder. It requires chromium and tornado (of
nbclient, in the extra ``docs``).
"""

import argparse
import asyncio
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (400, 1400)
NAMES = ("Evolution", "MGRIT", "PointSensors", "SpaceTime", "TimeParallelReducedFunctional", "TrustRegionResult")
"""Of the reference's pages of single names those that are opened by default."""
TALLEST = 6000
"""Pixels of a screenshot."""

LOOK = """
(async () => {
  const wrong = [], shown = e => e.getClientRects().length > 0;
  const formulas = [...document.querySelectorAll('.math')];
  if (formulas.length) {
    if (!window.MathJax || !MathJax.startup) wrong.push('MathJax is not loaded');
    else {
      await MathJax.startup.promise;
      const plain = formulas.filter(f => shown(f) && !f.querySelector('mjx-container'));
      if (plain.length) wrong.push(`${plain.length} formulas are not rendered: ${plain[0].textContent.slice(0, 80)}`);
      const bad = document.querySelectorAll('mjx-merror');
      if (bad.length) wrong.push(`${bad.length} formulas have errors: ${bad[0].textContent.slice(0, 80)}`);
    }
  }
  for (const image of document.images) {
    try { await image.decode(); } catch (e) { /* counted below */ }
    if (!image.naturalWidth) wrong.push(`picture ${image.getAttribute('src')} is missing`);
  }
  const root = document.documentElement;
  if (root.scrollWidth > window.innerWidth) {
    const wide = [...document.querySelectorAll('main *, body *')].filter(e =>
      e.getBoundingClientRect().right > window.innerWidth + 1 && shown(e) && !e.closest('[style*="overflow"]'));
    const first = wide.map(e => e.tagName.toLowerCase() + '.' + e.className).slice(0, 4).join(', ');
    wrong.push(`the page is ${root.scrollWidth} pixels wide: ${first}`);
  }
  return {wrong, height: root.scrollHeight, formulas: formulas.length, images: document.images.length};
})()
"""


class Page(HTMLParser):
    """Anchors of a page, and what it refers to."""

    def __init__(self):
        super().__init__()
        self.anchors, self.targets = set(), []

    def handle_starttag(self, tag, attrs):
        """Note ids, links and sources."""
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        for name in ("href", "src"):
            if given.get(name) and not (tag == "link" and given.get("rel") in ("canonical", "search")):
                self.targets.append(given[name])


def broken_links(site):
    """Links and pictures of all pages that lead nowhere, as ``page: target``."""
    pages = {}
    for path in sorted(site.rglob("*.html")):
        if path.relative_to(site).parts[0] == "_static":  # templates of the theme
            continue
        pages[path] = Page()
        pages[path].feed(path.read_text(errors="replace"))
    found = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or target == "#":
                continue
            other = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if other.is_dir():
                other /= "index.html"
            if not other.is_file():
                found.append(f"{path.relative_to(site)}: {target}")
            elif parts.fragment and other in pages and unquote(parts.fragment) not in pages[other].anchors:
                found.append(f"{path.relative_to(site)}: {target}: there is no such place on the page")
    return found, len(pages)


def chosen_pages(site):
    """Pages that are opened by default."""
    found = []
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        if name.startswith("reference/generated/"):
            if not name.endswith(tuple(f"/pint_fem.{one}.html" for one in NAMES)):
                continue
        elif name in ("genindex.html", "py-modindex.html", "search.html") or name.startswith("_"):
            continue
        found.append(name)
    return found


class Browser:
    """Chromium's DevTools protocol: one page, its messages, and what it has requested and printed."""

    def __init__(self, socket):
        self.socket, self.count, self.answers, self.events = socket, 0, {}, defaultdict(list)

    async def listen(self):
        """Sort messages into answers and events."""
        while (text := await self.socket.read_message()) is not None:
            message = json.loads(text)
            if "id" in message:
                self.answers.pop(message["id"]).set_result(message)
            else:
                self.events[message["method"]].append(message["params"])

    async def call(self, method, **params):
        """Call a method and wait for its answer."""
        self.count += 1
        answer = self.answers[self.count] = asyncio.get_running_loop().create_future()
        await self.socket.write_message(json.dumps({"id": self.count, "method": method, "params": params}))
        message = await asyncio.wait_for(answer, 120)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    async def open(self, url, width, dark):
        """Load a page and return what is wrong with it, and what was found."""
        self.events.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        await self.call("Emulation.setEmulatedMedia", features=scheme)
        await self.call("Page.navigate", url=url)
        limit = time.monotonic() + 60
        while not self.events["Page.loadEventFired"]:
            if time.monotonic() > limit:
                return [f"{url} is not loaded after a minute"], {}
            await asyncio.sleep(0.02)
        looked = await self.call("Runtime.evaluate", expression=LOOK, awaitPromise=True, returnByValue=True)
        found = looked["result"].get("value") or {"wrong": [str(looked.get("exceptionDetails"))], "height": 900}
        wrong = found["wrong"]
        wrong += [
            f"requested {request['request']['url']}"
            for request in self.events["Network.requestWillBeSent"]
            if not request["request"]["url"].startswith(("file:", "data:", "blob:"))
        ]
        wrong += [
            f"console: {e['entry']['text']}" for e in self.events["Log.entryAdded"] if e["entry"]["level"] == "error"
        ]
        wrong += [
            f"console: {[a.get('value', a.get('description')) for a in e['args']]}"
            for e in self.events["Runtime.consoleAPICalled"]
            if e["type"] in ("error", "assert")
        ]
        wrong += [f"exception: {e['exceptionDetails']['text']}" for e in self.events["Runtime.exceptionThrown"]]
        return wrong, found

    async def screenshot(self, path, width, height):
        """Write a picture of the page from its top."""
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, TALLEST), "scale": 1}
        made = await self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(made["data"]))


def start(program, folder):
    """Start the browser; its process, and the address of its page for messages."""
    command = [
        program, "--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--remote-debugging-port=0",
        "--remote-allow-origins=*", "--disable-background-networking", "--disable-component-update",
        f"--user-data-dir={folder}", "about:blank",
    ]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.insert(1, "--no-sandbox")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    port = Path(folder) / "DevToolsActivePort"
    limit = time.monotonic() + 120
    while not (port.is_file() and len(port.read_text().splitlines()) > 1):
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            sys.exit(f"[docs-check] {program} does not start: try '{program} --headless=new --dump-dom about:blank'")
        time.sleep(0.1)
    return process, port.read_text().splitlines()[0]


async def look(port, site, pages, out):
    """Open all pages; what is wrong, as ``page at width, theme: what``."""
    from tornado.httpclient import AsyncHTTPClient
    from tornado.websocket import websocket_connect

    listed = json.loads((await AsyncHTTPClient().fetch(f"http://127.0.0.1:{port}/json/list")).body)
    address = next(one["webSocketDebuggerUrl"] for one in listed if one["type"] == "page")
    browser = Browser(await websocket_connect(address, max_message_size=2**28))
    listener = asyncio.create_task(browser.listen())
    for domain in ("Page", "Runtime", "Log", "Network"):
        await browser.call(f"{domain}.enable")
    found, formulas, images = [], 0, 0
    for number, page in enumerate(pages, 1):
        before = len(found)
        for width in WIDTHS:
            for dark in (False, True):
                wrong, seen = await browser.open((site / page).as_uri(), width, dark)
                theme = "dark" if dark else "light"
                found += [f"{page} at {width}, {theme}: {what}" for what in wrong]
                name = page.removesuffix(".html").replace("/", "-")
                await browser.screenshot(out / f"{name}-{width}-{theme}.png", width, seen.get("height", 900))
        formulas, images = formulas + seen.get("formulas", 0), images + seen.get("images", 0)
        print(f"[docs-check] {number}/{len(pages)} {page}: {len(found) - before or 'nothing'} wrong", flush=True)
    print(f"[docs-check] {len(pages)} pages with {formulas} formulas and {images} pictures")
    listener.cancel()
    return found


def main():
    """Check the site, and exit with status 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="such as install.html (default: nearly all)")
    parser.add_argument("--site", type=Path, default=HERE / "_build" / "html", help="folder of the pages")
    parser.add_argument("--out", type=Path, default=HERE / "_build" / "screenshots", help="folder of the screenshots")
    opts = parser.parse_args()
    site = opts.site.resolve()
    if not (site / "index.html").is_file():
        sys.exit(f"[docs-check] there is no {site}/index.html: make docs first")
    found, count = broken_links(site)
    print(f"[docs-check] {count} pages read: {len(found) or 'no'} broken links")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        print("\n".join(found))
        sys.exit(f"[docs-check] no browser: install {' or '.join(BROWSERS)} (apt install chromium)")
    opts.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process, port = start(program, folder)
        try:
            found += asyncio.run(look(port, site, opts.pages or chosen_pages(site), opts.out))
        finally:
            process.terminate()
            process.wait(30)
    print(f"[docs-check] screenshots are in {opts.out.resolve()}")
    if found:
        print("\n".join(found))
        sys.exit(f"[docs-check] {len(found)} things are wrong")


if __name__ == "__main__":
    main()
