"""Makes docs/images/shop.png from the real page: ``python -m tests.browser.shop_picture``."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Final

from playwright.async_api import Browser, Page, async_playwright

from tests.conftest import Chromium
from tests.examples.orders.conftest import ROOT, Shop, item, order

PICTURE: Final = ROOT / "docs" / "images" / "shop.png"
SIZE: Final = {"width": 1240, "height": 800}


async def main() -> None:
    """Run a shop with a few orders behind it, and photograph one on its way."""
    folder = Path(tempfile.mkdtemp(prefix="shop-picture-"))
    shop = Shop(folder)
    chromium = Chromium(shutil.which("chromium") or "chromium")
    try:
        shop.start()
        mouse, keyboard = item("PROD-002", 3, 29.99, "Mouse"), item("PROD-003", 1, 79.99, "Keyboard")
        for body in (order(mouse), order(item("PROD-004", 1, 299.99, "Monitor")), order(item(), keyboard)):
            await shop.finish(body)
        shop.close()
        shop.settings.update(validation="1", payment="1", inventory="30")
        shop.start()
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=chromium.path, args=list(chromium.flags))
            page = await new_page(browser, shop)
            await page.screenshot(path=PICTURE)
            await browser.close()
    finally:
        shop.close()
        shutil.rmtree(folder, ignore_errors=True)


async def new_page(browser: Browser, shop: Shop) -> Page:
    """A page that shows an order at the inventory."""
    context = await browser.new_context(
        viewport={"width": SIZE["width"], "height": SIZE["height"]},
        device_scale_factor=1.5,
        reduced_motion="reduce",
        locale="en-GB",
        timezone_id="UTC",
    )
    page = await context.new_page()
    await page.goto(shop.base)
    await page.locator(".line").first.wait_for()
    await page.get_by_role("button", name="Add another item").click()
    await page.get_by_role("button", name="One more").nth(1).click()
    await page.get_by_label("E-mail").fill("ada@example.com")
    await page.get_by_role("button", name="Place order").click()
    await page.locator("#timeline [aria-current]", has_text="Reserving").wait_for()
    await page.locator("#history li").nth(2).wait_for()
    await page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    return page


if __name__ == "__main__":
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    asyncio.run(main())
