"""The media worker under fire: killed, asked to stop, without its data service or RabbitMQ, and with more work than it may hold."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.examples.beside import wait_for

if TYPE_CHECKING:
    from servers.rabbitmq import RabbitMQ
    from tests.examples.media_worker.conftest import StartMedia


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_a_worker_killed_while_the_service_answers_has_one_effect(start_media: StartMedia, queue_type: str) -> None:
    media = start_media("service", "worker", MEDIA_QUEUE_TYPE=queue_type, DATA_SERVICE_TIMEOUT="30")
    media.image("cat.jpg")
    media.misbehave(seconds=3.0, after=True)
    media.send("cat.jpg")  # without any id: nothing but its content tells that it is a repeat
    media.known(1)  # done, and not answered yet
    media.programs[1].kill_all()
    media.start("worker")
    wait_for(lambda: len(media.calls()) >= 2, media.said)
    assert len(media.known(1)) == 1
    assert len({call["key"] for call in media.calls()}) == 1
    wait_for(lambda: media.foreigner.depth("media.process") == 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_asked_to_stop_finishes_what_it_holds(start_media: StartMedia, number: signal.Signals) -> None:
    media = start_media("service", "worker", DATA_SERVICE_TIMEOUT="30")
    for name in range(30):
        (media.root / f"{name}.txt").write_text("hello")
    media.misbehave(times=10, seconds=2.0)
    for name in range(30):
        media.send(f"{name}.txt")
    wait_for(lambda: media.programs[1].said().count("processed ") >= 10)
    assert media.programs[1].stop(number) == 0
    done = len(media.files())
    assert done >= 10
    assert done + media.foreigner.depth("media.process") == 30  # the rest is back in its queue
    media.start("worker")
    assert sorted(media.known(30)) == sorted(f"{name}.txt" for name in range(30))
    wait_for(lambda: len(media.calls()) >= 30, media.said)  # a call is listed once it is answered
    assert media.programs[-1].stop(number) == 0
    assert len(media.calls()) == 30  # nothing was done twice


def test_no_more_than_ten_messages_are_held_at_once(start_media: StartMedia) -> None:
    media = start_media("service", DATA_SERVICE_TIMEOUT="30")
    for name in range(25):
        (media.root / f"{name}.txt").write_text("hello")
        media.send(f"{name}.txt")
    media.misbehave(times=25, seconds=2.0)
    media.start("worker")
    wait_for(lambda: media.programs[1].said().count("processed ") == 10)
    assert media.foreigner.depth("media.process") == 15
    media.known(25)


def test_a_data_service_that_comes_late_is_waited_for(start_media: StartMedia) -> None:
    media = start_media("worker")
    (media.root / "a.txt").write_text("hello")
    media.send("a.txt")
    wait_for(lambda: "the data service failed 3 times" in media.said())
    media.start("service")
    assert media.known(1) == ["a.txt"]


def test_a_restart_of_rabbitmq_loses_nothing(start_media: StartMedia, rabbitmq: RabbitMQ) -> None:
    media = start_media("service", "worker", DATA_SERVICE_TIMEOUT="30")
    for name in range(20):
        (media.root / f"{name}.txt").write_text("hello")
    media.misbehave(times=10, seconds=1.0)
    for name in range(20):
        media.send(f"{name}.txt")
    rabbitmq.restart()
    assert sorted(media.known(20)) == sorted(f"{name}.txt" for name in range(20))
    wait_for(lambda: media.foreigner.depth("media.process") == 0)
    assert len(media.files()) == 20


def test_one_command_runs_all_of_it_and_ends_it_in_order(start_media: StartMedia) -> None:
    media = start_media("all")
    wait_for(lambda: "Uvicorn running" in media.said())
    media.image("cat.jpg")
    media.send("cat.jpg")
    media.known(1)
    assert media.programs[0].stop(signal.SIGINT) == 0
    assert "ended in order" in media.said()
