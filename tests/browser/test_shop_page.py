"""The shop's page in a real browser, as its customers use it."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Final

import pytest
from playwright.async_api import Page, Route, expect

if TYPE_CHECKING:
    from tests.browser.conftest import Visitor
    from tests.examples.orders.conftest import StartShop

WAIT_MS: Final = 60_000
SLOW_ENOUGH: Final = {"validation": "0.4", "payment": "0.4", "inventory": "0.4", "shipping": "0.4"}
"""Seconds that a step must take so that the page is seen in it."""

expect.set_options(timeout=WAIT_MS)


async def fill(page: Page, *lines: tuple[str, int], email: str = "ada@example.com") -> None:
    """Fill in the form."""
    for number, (product, quantity) in enumerate(lines):
        if number > 0:
            await page.get_by_role("button", name="Add another item").click()
        line = page.locator(".line").nth(number)
        await line.get_by_label("Product").select_option(product)
        await line.get_by_role("spinbutton", name="Quantity").fill(str(quantity))
    await page.get_by_label("E-mail").fill(email)


async def order(page: Page) -> None:
    await page.get_by_role("button", name="Place order").click()


async def ended(page: Page, status: str) -> None:
    await expect(page.locator("#order")).to_have_attribute("data-status", status)


async def width(page: Page) -> int:
    """How wide the page's content is."""
    return int(await page.evaluate("document.documentElement.scrollWidth"))


async def test_an_order_is_placed_and_seen_through_to_its_end(start_shop: StartShop, visitor: Visitor) -> None:
    shop = start_shop(**SLOW_ENOUGH)
    page = await visitor.window(shop.base)
    await fill(page, ("PROD-001", 1), ("PROD-002", 3))
    await expect(page.locator("#total")).to_have_text("$1,089.96")
    await page.evaluate(
        "window.seen = []; new MutationObserver(() => seen.push(document.querySelector('#headline').textContent))"
        ".observe(document.querySelector('#headline'), {childList: true, characterData: true, subtree: true})"
    )
    await order(page)
    await ended(page, "completed")
    seen = await page.evaluate("window.seen")
    words = ["Checking the order", "Taking the payment", "Reserving the items", "Preparing the shipment"]
    assert [text for text in seen if text in words] == words
    assert seen[-1] == "Your order is on its way"

    steps = page.locator("#timeline li")
    await expect(page.locator("#timeline li[data-state=done] time")).to_have_count(6)
    await expect(steps.locator(".step")).to_have_text(
        [
            f"{name} (done)"
            for name in ("Order placed", "Order checked", "Paid", "Items reserved", "Shipped", "Completed")
        ]
    )
    await expect(page.locator("#history code")).to_have_text(
        [
            "order_created",
            "order_validated",
            "payment_processed",
            "inventory_reserved",
            "shipment_created",
            "order_completed",
        ]
    )
    await expect(page.locator("#items tr")).to_have_text(["Laptop1$999.99$999.99", "Mouse3$29.99$89.97"])
    await expect(page.locator("#order-total")).to_have_text("$1,089.96")
    order_id = page.url.partition("?order=")[2]
    await expect(page.locator("#data")).to_contain_text(f"TXN-{order_id[:8]}")
    await expect(page.locator("#data")).to_contain_text("ada@example.com")
    await expect(page.locator("#recent a[aria-current] .state")).to_have_text("Completed")


async def test_an_order_can_be_reloaded_shared_and_left(start_shop: StartShop, visitor: Visitor) -> None:
    shop = start_shop()
    page = await visitor.window(shop.base)
    await fill(page, ("PROD-002", 1))
    await order(page)
    await ended(page, "completed")
    address = page.url
    await page.reload()
    await ended(page, "completed")
    other = await visitor.window(shop.base)
    await other.goto(address)
    await ended(other, "completed")
    await page.go_back()
    await expect(page.locator("#headline")).to_have_text("Place an order and watch it travel")
    await page.go_forward()
    await ended(page, "completed")
    await page.go_back()
    await page.locator("#recent a").click()
    await ended(page, "completed")
    assert page.url == address


async def test_a_declined_payment_is_said_in_words(start_shop: StartShop, visitor: Visitor) -> None:
    page = await visitor.window(start_shop(decline_rate="1").base)
    await fill(page, ("PROD-001", 1))
    await order(page)
    await expect(page.get_by_role("heading", level=1)).to_have_text("Payment declined")
    await expect(page.locator("#lead")).to_contain_text("you were not charged")
    await expect(page.locator("#timeline li[data-state=bad]")).to_contain_text("Payment declined")
    await expect(page.locator("#timeline li[data-state=never]")).to_have_count(3)


async def test_missing_stock_shows_the_reason_and_the_refund(start_shop: StartShop, visitor: Visitor) -> None:
    page = await visitor.window(start_shop().base)
    await fill(page, ("PROD-004", 2))
    await order(page)
    await expect(page.get_by_role("heading", level=1)).to_have_text("Insufficient inventory")
    await expect(page.locator("#lead")).to_contain_text("Your payment of $599.98 has been refunded")
    await expect(page.locator("#timeline")).to_contain_text("Payment refunded")
    await expect(page.locator("#history code")).to_contain_text(["payment_refunded", "order_failed"])


async def test_what_the_server_refuses_is_shown_at_its_field(start_shop: StartShop, visitor: Visitor) -> None:
    page = await visitor.window(start_shop().base)
    await fill(page, ("PROD-001", 1), ("PROD-002", 0), email="ada@example")
    await expect(page.locator("#total")).to_have_text("–")
    await order(page)
    email = page.get_by_label("E-mail")
    await expect(email).to_have_attribute("aria-invalid", "true")
    await expect(email).to_have_accessible_description("Enter a valid e-mail address, such as name@example.com")
    quantity = page.locator(".line").nth(1).get_by_role("spinbutton")
    await expect(quantity).to_have_attribute("aria-invalid", "true")
    await expect(quantity).to_have_accessible_description("The quantity must be a whole number from 1 to 10,000")
    await expect(quantity).to_be_focused()
    await expect(page.locator(".line").nth(0).locator(".error")).to_be_hidden()
    await quantity.fill("2")
    await expect(page.locator(".line").nth(1).locator(".error")).to_be_hidden()
    await email.fill("ada@example.com")
    await order(page)
    await ended(page, "completed")
    await expect(page.locator("#order-total")).to_have_text("$1,059.97")


async def test_lines_can_be_added_changed_and_removed(start_shop: StartShop, visitor: Visitor) -> None:
    page = await visitor.window(start_shop().base)
    await fill(page, ("PROD-002", 2), ("PROD-003", 1), ("PROD-001", 1))
    await expect(page.locator(".sum")).to_have_text(["$59.98", "$79.99", "$999.99"])
    await page.get_by_role("button", name="Remove Laptop").click()
    await page.get_by_role("button", name="One more").nth(1).click()
    await page.get_by_role("button", name="One less").nth(0).click()
    await expect(page.locator(".sum")).to_have_text(["$29.99", "$159.98"])
    await expect(page.locator("#total")).to_have_text("$189.97")


async def test_the_page_connects_again_when_the_server_is_back(start_shop: StartShop, visitor: Visitor) -> None:
    shop = start_shop(web_only="yes")
    page = await visitor.window(shop.base)
    await fill(page, ("PROD-001", 1))
    await order(page)
    connection = page.get_by_role("status").filter(has_text=re.compile("Live"))
    await connection.wait_for()
    shop.close()
    await expect(page.locator("#connection")).to_contain_text(re.compile(r"Connection lost\. Trying again in \d s"))
    await expect(page.get_by_role("button", name="Try now")).to_be_visible()
    shop.settings.pop("web_only")
    shop.start()
    await ended(page, "completed")
    await expect(page.locator("#connection-text")).to_have_text("Up to date")
    await expect(page.locator("#history li")).to_have_count(6)


async def test_an_order_placed_while_the_server_is_away_is_placed_once(start_shop: StartShop, visitor: Visitor) -> None:
    shop = start_shop()
    page = await visitor.window(shop.base)
    await fill(page, ("PROD-001", 1))
    # The server takes the order, but its answer is lost on the way.
    await page.route("**/orders", lose_answer)
    await order(page)
    await expect(page.get_by_role("alert")).to_contain_text("The shop does not answer")
    await page.unroute("**/orders")
    await order(page)
    await ended(page, "completed")
    assert (await shop.query("SELECT count(*) FROM orders"))[0][0] == 1


async def lose_answer(route: Route) -> None:
    """Let the server answer, and the customer not hear it."""
    if route.request.method == "POST":
        await route.fetch()
        await route.abort("connectionrefused")
    else:
        await route.continue_()


async def test_an_unknown_order_is_said_in_words(start_shop: StartShop, visitor: Visitor) -> None:
    page = await visitor.window(start_shop().base)
    await page.goto("/?order=00000000-0000-4000-8000-000000000000")
    await expect(page.get_by_role("heading", level=1)).to_have_text("There is no such order")


@pytest.mark.parametrize("size", [320, 390, 768])
async def test_nothing_is_wider_than_a_narrow_screen(start_shop: StartShop, visitor: Visitor, size: int) -> None:
    shop = start_shop()
    page = await visitor.window(shop.base, width=size, height=700, scheme="dark")
    assert await width(page) <= size
    await fill(page, ("PROD-003", 10_000), ("PROD-004", 10_000), email="a" * 60 + "@" + "b" * 60 + ".example.com")
    await order(page)
    await ended(page, "failed")
    await expect(page.locator("#history li")).to_have_count(5)
    assert await width(page) <= size
    await expect(page.locator("#headline")).to_be_in_viewport()


async def test_the_keyboard_is_enough(start_shop: StartShop, visitor: Visitor) -> None:
    page = await visitor.window(start_shop().base)
    focused = "document.activeElement.name || document.activeElement.id || document.activeElement.textContent.trim()"
    order_of_focus = []
    for _ in range(30):
        await page.keyboard.press("Tab")
        order_of_focus.append(await page.evaluate(focused))
        shown = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert shown != "none", f"{order_of_focus[-1]} does not show that it has the focus"
        if order_of_focus[-1] == "product":
            await page.keyboard.press("ArrowDown")
        elif order_of_focus[-1] == "quantity":
            await page.keyboard.press("ArrowUp")
        elif order_of_focus[-1] == "email":
            await page.keyboard.type("ada@example.com")
        elif order_of_focus[-1] == "submit":
            break
    assert [name for name in order_of_focus if name in ("product", "quantity", "email", "submit")] == [
        "product", "quantity", "email", "submit",
    ]  # fmt: skip
    await page.keyboard.press("Enter")
    await expect(page.locator("#order")).to_be_focused()
    await ended(page, "completed")
    await expect(page.locator("#order-total")).to_have_text("$59.98")


async def test_hostile_text_is_shown_as_text(start_shop: StartShop, visitor: Visitor) -> None:
    shop = start_shop()
    nasty = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    line = {"product_id": "PROD-001", "name": nasty, "quantity": 1, "price": 1}
    placed = (await shop.finish({"customer_email": "ada@example.com", "items": [line]}))["order"]
    page = await visitor.window(shop.base)
    await page.goto(f"/?order={placed['id']}")
    await ended(page, "completed")
    await expect(page.locator("#items td").first).to_have_text(nasty)
    await expect(page.locator("#recent .what").first).to_have_text(nasty)
    assert await page.locator("main img, main script").count() == 0


async def test_two_windows_show_the_same_order_live(start_shop: StartShop, visitor: Visitor) -> None:
    shop = start_shop(web_only="yes")
    first = await visitor.window(shop.base)
    await fill(first, ("PROD-001", 1))
    await order(first)
    await expect(first.locator("#headline")).to_have_text("Waiting for the first worker")
    second = await visitor.window(shop.base, width=390, height=844)
    await second.goto(first.url)
    await expect(second.locator("#headline")).to_have_text("Waiting for the first worker")
    shop.run_workers()
    await asyncio.gather(ended(first, "completed"), ended(second, "completed"))
