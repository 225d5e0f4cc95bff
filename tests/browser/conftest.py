"""A real browser, and the shop that it visits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Error, Page, async_playwright

if TYPE_CHECKING:
    from tests.conftest import Chromium
    from tests.examples.orders.conftest import StartShop

WAIT_MS: Final = 60_000
"""Longest wait for anything, in milliseconds: the machine may be crowded."""
EXPECTED: Final = ("Failed to load resource: the server responded with a status of 422", "net::ERR_CONNECTION_REFUSED")
"""What Chromium itself notes about answers and outages that tests ask for."""


class Visitor:
    """Somebody with a browser window, and everything that the browser complained about."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.complaints: list[str] = []
        self.foreign: list[str] = []

    async def window(self, base: str, *, width: int = 1280, height: int = 900, scheme: str = "light") -> Page:
        """Open a window on the shop's page, and wait until it can be used."""
        context: BrowserContext = await self._browser.new_context(
            base_url=base,
            viewport={"width": width, "height": height},
            color_scheme="dark" if scheme == "dark" else "light",
            reduced_motion="reduce",
            locale="en-US",
            timezone_id="UTC",
        )
        context.set_default_timeout(WAIT_MS)
        await context.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('CSP', e.violatedDirective, e.blockedURI))"
        )
        page = await context.new_page()
        page.on("console", self._heard)
        page.on("pageerror", self._failed)
        page.on("request", lambda request: None if request.url.startswith(base) else self.foreign.append(request.url))
        await page.goto("/")
        await page.locator(".line").first.wait_for()
        return page

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(known in message.text for known in EXPECTED):
            self.complaints.append(message.text)

    def _failed(self, error: Error) -> None:
        self.complaints.append(str(error))


@pytest.fixture
async def visitor(chromium: Chromium) -> AsyncIterator[Visitor]:
    """A visitor; afterwards nothing may have been complained about, and nothing fetched from elsewhere."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium.path, args=list(chromium.flags))
        try:
            found = Visitor(browser)
            yield found
            assert found.complaints == []
            assert found.foreign == []
        finally:
            await browser.close()


@pytest.fixture
def start_shop(tmp_path: Path) -> Iterator[StartShop]:
    """Start a shop with these settings."""
    from tests.examples.orders.conftest import Shop

    shops = []

    def start(**settings: str) -> Shop:
        shop = Shop(tmp_path, **settings)
        shops.append(shop)
        shop.start()
        return shop

    yield start
    for shop in shops:
        shop.close()
