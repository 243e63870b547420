"""A page in a browser, as a reader has it."""

import json
import re
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def embedded(source):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', source, re.DOTALL)
    return json.loads(text)


class Visit:
    """A page that is open, with what it complained of and what it asked the network for."""

    def __init__(self, browser, path, **options):
        self.complaints, self.requests = [], []
        self.page = browser.new_page(viewport={"width": 1300, "height": 1000}, **options)
        self.page.set_default_timeout(120_000)  # of a machine with much else to do
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#overview .heatmaplayer image")
        self.page.wait_for_selector("#pattern .heatmaplayer image")

    def __call__(self, script):
        return self.page.evaluate(script)

    def check(self):
        """It complained of nothing, and needed nothing but itself."""
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []

    def until(self, script):
        """Playwright's own way of waiting needs eval, which the page forbids."""
        for _ in range(600):
            if self(script):
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(script)

    def text(self, selector):
        return self.page.text_content(selector)

    def click(self, plot, x, y, axes=""):
        """Click into a plot at the coordinates of its axes, of which there may be several."""
        self.page.locator("#" + plot).scroll_into_view_if_needed()
        at = self(
            f"""(() => {{ const box = el("{plot}").getBoundingClientRect(), layout = el("{plot}")._fullLayout;
            const x = layout.xaxis{axes}, y = layout.yaxis{axes};
            return [box.x + x._offset + x.l2p({x}), box.y + y._offset + y.l2p({y})]; }})()"""
        )
        self.page.mouse.move(at[0] - 2, at[1])
        self.page.mouse.move(*at)
        self.page.wait_for_selector(".hoverlayer .hovertext")
        self.page.mouse.click(*at)

    def z(self, plot, trace=0):
        return self(f"el('{plot}').data[{trace}].z")
