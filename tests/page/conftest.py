"""A gateway with the test's database behind it, and Chromium before it.

Where there is no Chromium the tests are skipped, or fail if PGPARK_TEST_NEEDS_BROWSER is set.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.conftest import FLAGS, missing
from tests.gateway.conftest import Gateway, gateway, gateways

__all__ = ["gateway", "gateways"]


@contextlib.contextmanager
def a_browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path or missing("there is no Chromium on this machine"), args=FLAGS
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """While it is open, its driver keeps an event loop running in this thread."""
    with a_browser() as browser:
        yield browser


class Seen:
    """What a page complained of: errors of scripts, of its policy, and of the console."""

    def __init__(self, page: Page, expected: tuple[str, ...] = ()) -> None:
        self.errors: list[str] = []
        self.expected = expected
        page.on("console", lambda message: message.type in ("error", "warning") and self._note(message.text))
        page.on("pageerror", lambda error: self._note(str(error)))

    def _note(self, text: str) -> None:
        if not any(part in text for part in self.expected):
            self.errors.append(text)


@pytest.fixture
def visit(browser: Browser, gateway: Gateway) -> Iterator[Callable[..., Page]]:
    """Opens the page for a new token of these kinds (default: admin); fails if anything was complained of meanwhile."""
    contexts = []
    seen: list[Seen] = []

    def open_(
        *kinds: str,
        pool: str = "gpu",
        expected: tuple[str, ...] = (),
        secret: str | None = None,
        scope: Any = None,
        **look: Any,
    ) -> Page:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | look))
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        seen.append(Seen(page, expected))
        secret = gateway.secret(*kinds, **(scope or {})) if secret is None else secret
        page.goto(f"{gateway.url}/#pool={pool}" + (f"&token={secret}" if secret else ""))
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [error for one in seen for error in one.errors] == []
