"""A browser for the tests of pages."""

import pytest

from tests.study.visit import CHROMIUM, Visit


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Open the page of another inspection."""
    pages = []

    def visit(inspection, **options):
        path = tmp_path / "page.html"
        inspection.report(path)
        pages.append(Visit(browser, path, **options))
        return pages[-1]

    yield visit
    for opened in pages:
        opened.check()
        opened.page.close()
