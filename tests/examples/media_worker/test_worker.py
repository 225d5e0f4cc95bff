"""The media worker on a real RabbitMQ: what it does, tells, refuses and repeats, with a real data service."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.examples.beside import wait_for

if TYPE_CHECKING:
    from tests.examples.media_worker.conftest import Media

users = itertools.count(1)


@pytest.fixture
def user() -> int:
    """A user whom no other test works for."""
    return next(users)


def test_an_image_gets_thumbnails_and_the_data_service_is_told(media: Media, user: int) -> None:
    media.image("holiday/cat.jpg", (800, 400))
    media.send("holiday/cat.jpg", user)
    (path,) = media.known(1, user)
    with Image.open(media.root / path) as largest:
        assert largest.size == (512, 256)
    with Image.open((media.root / path).with_name("128.jpg")) as small:
        assert small.size == (128, 64)


def test_another_file_is_examined_and_the_news_goes_on_as_plain_json(media: Media, user: int) -> None:
    heard = media.foreigner.listen("file.processed")
    (media.root / "report.pdf").write_bytes(b"%PDF-1.7 report")
    media.send("report.pdf", user, headers={"X-Request-ID": "req-42"})
    assert media.known(1, user) == ["report.pdf"]
    body, headers = media.foreigner.take(heard)
    assert body == {
        "user_id": user,
        "path": "report.pdf",
        "media_type": "application/pdf",
        "size": 15,
        "sha256": hashlib.sha256(b"%PDF-1.7 report").hexdigest(),
        "thumbnails": {},
    }
    assert headers["X-Request-ID"] == "req-42"


def test_the_request_id_is_in_every_log_line_and_every_call(media: Media, user: int) -> None:
    media.image("cat.png")
    media.misbehave(status=503)
    media.send("cat.png", user, headers={"x-request-id": f"req-{user}"})
    media.known(1, user)
    ids = [call["request_id"] for call in media.calls()]
    assert ids.count(f"req-{user}") == 2
    lines = [line for line in media.programs[1].lines() if "message_id" in line]
    assert all(line["request_id"] for line in lines)
    said = {line["message"].split()[0] for line in lines if line["request_id"] == f"req-{user}"}
    assert {"processed", "the", "HTTP"} <= said
    assert f"(request 'req-{user}')" in media.programs[0].said()


def test_a_message_without_a_request_id_gets_one(media: Media, user: int) -> None:
    (media.root / f"{user}.txt").write_text("hello")
    before = len(media.calls())
    media.send(f"{user}.txt", user)
    media.known(1, user)
    (call,) = media.calls()[before:]
    assert len(call["request_id"]) >= 16
    about = [line for line in media.programs[1].lines() if line.get("request_id") == call["request_id"]]
    assert len(about) >= 3


def test_a_request_id_of_any_form_travels_and_forges_nothing(media: Media, user: int) -> None:
    (media.root / f"{user}.txt").write_text("hello")
    media.send(f"{user}.txt", user, headers={"X-Request-ID": "a\r\nX-Evil: 1 ü"})
    media.known(1, user)
    assert media.calls()[-1]["request_id"] == "a%0D%0AX-Evil:%201%20%C3%BC"


def test_an_unknown_user_is_a_dead_letter_at_once(media: Media) -> None:
    (media.root / "nobody.txt").write_text("hello")
    before, calls = len(media.foreigner.peek("media.process.dead")), len(media.calls())
    media.send("nobody.txt", 4711)
    body, headers = media.dead(before + 1)[-1]
    assert body == {"user_id": 4711, "file_info": {"path": "nobody.txt"}}
    assert "no such user: 4711" in headers["conveyor-error"]
    assert [call["status"] for call in media.calls()[calls:]] == [404]


@pytest.mark.parametrize(
    ("info", "why"),
    [
        ({"path": "../users.db"}, "leads out of the media folder"),
        ({"path": "/etc/passwd"}, "leads out of the media folder"),
        ({"path": "refused.txt", "size": 1}, "not 1 as the message says"),
        ({"path": "refused.txt", "sha256": "0" * 64}, "not what the message says"),
        ({"path": "broken.jpg"}, "the image is broken"),
        ({}, "path"),
    ],
)
def test_what_cannot_be_processed_is_a_dead_letter_that_says_why(
    media: Media, info: dict[str, object], why: str
) -> None:
    (media.root / "refused.txt").write_text("hello")
    whole = media.image("broken.jpg").read_bytes()
    (media.root / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    before, calls = len(media.foreigner.peek("media.process.dead")), len(media.calls())
    media.foreigner.send("media.process", {"user_id": 1, "file_info": info})
    _, headers = media.dead(before + 1)[-1]
    assert why in headers["conveyor-error"]
    assert media.calls()[calls:] == []


def test_a_file_that_comes_late_is_waited_for(media: Media, user: int) -> None:
    media.send(f"late-{user}.txt", user)
    wait_for(lambda: "attempt 1 failed" in media.programs[1].said())
    (media.root / f"late-{user}.txt").write_text("here I am")
    assert media.known(1, user) == [f"late-{user}.txt"]


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_data_service_out_of_order_is_asked_again_later(media: Media, user: int, status: int) -> None:
    (media.root / f"{user}.txt").write_text("hello")
    before = len(media.calls())
    media.misbehave(times=4, status=status)  # more often than is tried at once
    media.send(f"{user}.txt", user)
    assert media.known(1, user) == [f"{user}.txt"]
    assert [call["status"] for call in media.calls()[before:]] == [status] * 4 + [200]
    assert len({call["key"] for call in media.calls()[before:]}) == 1


def test_a_service_that_says_when_is_not_asked_before(media: Media, user: int) -> None:
    (media.root / f"{user}.txt").write_text("hello")
    before = len(media.calls())
    media.misbehave(status=503, retry_after=1)
    media.send(f"{user}.txt", user)
    media.known(1, user)
    assert [call["status"] for call in media.calls()[before:]] == [503, 200]
    assert "again in 1.0 s" in media.programs[1].said()


@pytest.mark.parametrize("fault", [{"status": 500}, {"seconds": 3.0}])
def test_a_patch_that_was_done_but_not_answered_is_repeated_without_a_second_effect(
    media: Media, user: int, fault: dict[str, object]
) -> None:
    (media.root / f"{user}.txt").write_text("hello")
    before = len(media.calls())
    media.misbehave(after=True, **fault)
    media.send(f"{user}.txt", user)
    wait_for(lambda: len(media.calls()) >= before + 2, media.said)
    assert media.files(user) == [f"{user}.txt"]
    assert len({call["key"] for call in media.calls()[before:]}) == 1


def test_a_message_that_comes_twice_has_one_effect_and_another_request_a_second(media: Media, user: int) -> None:
    media.image(f"{user}.jpg")
    for request in ("r-1", "r-1", "r-2"):
        calls = len(media.calls())
        media.send(f"{user}.jpg", user, headers={"X-Request-ID": request})
        wait_for(lambda calls=calls: len(media.calls()) > calls)  # type: ignore[misc]
    assert len(media.files(user)) == 2


def test_a_refusal_that_lasts_is_not_repeated(media: Media, user: int) -> None:
    (media.root / f"{user}.txt").write_text("hello")
    before, calls = len(media.foreigner.peek("media.process.dead")), len(media.calls())
    media.misbehave(status=403)
    media.send(f"{user}.txt", user)
    _, headers = media.dead(before + 1)[-1]
    assert "refuses with 403" in headers["conveyor-error"]
    assert [call["status"] for call in media.calls()[calls:]] == [403]


def test_a_service_that_stays_down_makes_a_dead_letter_in_the_end(media: Media, user: int) -> None:
    (media.root / f"{user}.txt").write_text("hello")
    before = len(media.foreigner.peek("media.process.dead"))
    media.misbehave(times=12, status=503)  # 4 attempts of 3 calls
    media.send(f"{user}.txt", user)
    body, headers = media.dead(before + 1)[-1]
    assert headers["conveyor-reason"] == "exhausted"
    assert "the data service failed 3 times" in headers["conveyor-error"]
    assert json.dumps(body) == json.dumps({"user_id": user, "file_info": {"path": f"{user}.txt"}})
