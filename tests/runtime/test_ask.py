"""Asking several keepers: each application has one, and what only a silent one knows is not left out without a word."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from conveyor import Conveyor, brokers
from conveyor.broker import Broker, QueueInfo
from conveyor.core.jobs import JobFilter
from conveyor.core.journal import Entry, Kind
from conveyor.core.message import Message
from conveyor.core.questions import Answer, JobsOf, Question
from conveyor.errors import BrokerError, JournalError, NoKeeper, PublishFailed
from conveyor.runtime import ask
from conveyor.runtime.archive import Archive
from conveyor.runtime.ask import Asker, silence_of
from conveyor.runtime.journal import keeper_topic
from conveyor.runtime.keeper import Keeper

PATIENCE_SECONDS = 60.0
ALL = JobsOf()


class Gate(Keeper):
    """A keeper that answers nothing while it is shut."""

    def __init__(self, app: str, broker: Broker) -> None:
        super().__init__(app, broker, Archive(":memory:"), time.time)
        self.is_open = asyncio.Event()
        self.is_open.set()

    async def _reply(self, question: Question, answer: Answer) -> None:
        await self.is_open.wait()
        await super()._reply(question, answer)


@contextlib.asynccontextmanager
async def gate(app: str, broker: Broker) -> AsyncIterator[Gate]:
    """The keeper of an application that has done one job, of its own name."""
    keeper = Gate(app, broker)
    async with keeper:
        did = Entry(Kind.SUCCEEDED, 2.0, app, "topic", f"{app}.worker", started=1.0, attempt=1)
        await keeper._writer.do(Archive.write, [(app, [did])])
        try:
            yield keeper
        finally:
            keeper.is_open.set()


@pytest.fixture(params=["sqlite", "redis", "rabbitmq"])
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Broker]:
    """Every kind that several applications can be on."""
    file = tmp_path / "shop.queue"
    url = f"sqlite:///{file}" if request.param == "sqlite" else request.getfixturevalue(request.param).url()
    opened = brokers.from_url(url)
    await opened.open()
    yield opened
    await opened.close()


@contextlib.asynccontextmanager
async def asking(broker: Broker, app: str | None = None) -> AsyncIterator[Asker]:
    asker = Asker(broker, time.time, app)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            yield asker
    finally:
        await asker.close()


def ids(answer: Answer) -> set[str]:
    return {job.id for job in answer.jobs}


async def test_an_answer_waits_for_every_keeper_that_is_there(broker: Broker) -> None:
    async with gate("shop", broker), gate("mail", broker) as mail, asking(broker) as asker:
        mail.is_open.clear()
        question = asyncio.create_task(asker.ask(ALL, timeout_seconds=PATIENCE_SECONDS))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(question), 5 * ask.OTHERS_SECONDS)
        mail.is_open.set()
        answer = await question
        assert (ids(answer), answer.silent) == ({"shop", "mail"}, ())


async def test_who_does_not_answer_in_time_is_named_and_the_others_are_told(broker: Broker) -> None:
    async with gate("shop", broker), gate("mail", broker) as mail, asking(broker) as asker:
        mail.is_open.clear()
        answer = await asker.ask(ALL, timeout_seconds=1.0)
        assert (ids(answer), answer.silent) == ({"shop"}, ("mail",))


async def test_a_keeper_that_has_gone_is_named_and_not_waited_for(broker: Broker) -> None:
    async with gate("shop", broker), asking(broker) as asker:
        async with gate("mail", broker):
            pass
        answer = await asker.ask(ALL, timeout_seconds=PATIENCE_SECONDS * 2)
        assert (ids(answer), answer.silent) == ({"shop"}, ("mail",))


async def test_a_keeper_that_cannot_read_its_journal_is_named(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_of = Archive.answer

    def answer(archive: Archive, to: str, request: JobsOf) -> Answer:
        if archive is mail.archive:
            raise JournalError("it is damaged")
        return answer_of(archive, to, request)

    monkeypatch.setattr(Archive, "answer", answer)
    async with gate("shop", broker), gate("mail", broker) as mail, asking(broker) as asker:
        answer_of_both = await asker.ask(ALL)
        assert (ids(answer_of_both), answer_of_both.silent) == ({"shop"}, ("mail",))
    async with gate("mail", broker) as mail, asking(broker, "mail") as asker:
        with pytest.raises(NoKeeper, match="it is damaged"):
            await asker.ask(ALL)


async def test_nothing_counts_as_unknown_to_an_application_whose_own_keeper_is_silent(broker: Broker) -> None:
    unknown = JobsOf(JobFilter(ids=("nobody",)))
    async with gate("shop", broker), asking(broker, "mail") as asker:
        with pytest.raises(NoKeeper, match="keeps the journal of mail"):
            await asker.ask(unknown)
        with pytest.raises(NoKeeper):
            await asker.wait(["nobody"], timeout_seconds=0.0)
        assert ids(await asker.ask(JobsOf(JobFilter(ids=("shop",))))) == {"shop"}
        assert set(await asker.wait(["shop"], timeout_seconds=0.0)) == {"shop"}
        async with gate("mail", broker):
            assert (await asker.ask(unknown)).silent == ()
            assert await asker.wait(["nobody"], timeout_seconds=0.0) == {}


async def test_a_job_that_its_own_keeper_knows_is_told_without_waiting_for_the_others(broker: Broker) -> None:
    async with gate("shop", broker) as shop, gate("mail", broker) as mail, asking(broker, "shop") as asker:
        sent = Entry(Kind.PUBLISHED, 3.0, "sent", "shop.worker")
        await shop._writer.do(Archive.write, [("sent", [sent])])
        mail.is_open.clear()
        for id, status in (("shop", "done"), ("sent", "waiting")):
            (job,) = await asker.jobs(JobFilter(ids=(id,)), timeout_seconds=2 * PATIENCE_SECONDS)
            assert job.status == status


async def test_a_job_that_only_a_silent_keeper_can_tell_of_is_not_told_as_waiting(broker: Broker) -> None:
    async with gate("shop", broker) as shop, gate("mail", broker) as mail:
        sent = Entry(Kind.PUBLISHED, 1.0, "sent", "shop.work", "mail.worker")
        await mail._writer.do(Archive.write, [("sent", [sent])])
        shop.is_open.clear()
        for app in ("shop", "mail"):
            async with asking(broker, app) as asker:
                with pytest.raises(NoKeeper, match="journal of shop"):
                    await asker.jobs(JobFilter(ids=("sent",)), timeout_seconds=1.0)
        async with asking(broker, "shop") as asker:
            with pytest.raises(NoKeeper):
                await asker.wait(["sent"], timeout_seconds=0.0)


async def test_of_two_keepers_of_one_application_both_are_heard(broker: Broker) -> None:
    async with gate("shop", broker), gate("shop", broker) as other, asking(broker, "shop") as asker:
        more = Entry(Kind.SUCCEEDED, 2.0, "more", "topic", "shop.worker", started=1.0, attempt=1)
        await other._writer.do(Archive.write, [("more", [more])])
        for _ in range(5):
            assert ids(await asker.ask(ALL)) == {"shop", "more"}


@pytest.mark.parametrize("error", [BrokerError("not for you"), TimeoutError()])
async def test_where_nobody_says_which_journals_there_are_questions_are_answered_all_the_same(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def queues() -> list[QueueInfo]:
        raise error

    monkeypatch.setattr(broker, "queues", queues)
    async with gate("shop", broker):
        async with asking(broker) as asker:
            assert ids(await asker.ask(ALL)) == {"shop"}
        async with asking(broker, "mail") as asker:
            with pytest.raises(NoKeeper, match="journal of mail"):
                await asker.ask(JobsOf(JobFilter(ids=("nobody",))))


async def test_where_knocking_is_refused_questions_are_answered_all_the_same(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, knocks = broker.publish, list[str]()

    async def refusing(messages: Sequence[Message], *, queue: str | None = None) -> frozenset[str]:
        if refused := [message.id for message in messages if message.topic == keeper_topic("mail")]:
            knocks.extend(refused)
            raise PublishFailed(dict.fromkeys(refused, "ACCESS_REFUSED"))
        return await publish(messages, queue=queue)

    monkeypatch.setattr(broker, "publish", refusing)
    async with gate("shop", broker), gate("mail", broker), asking(broker) as asker:
        for _ in range(2):
            assert "shop" in ids(await asker.ask(ALL))
        assert len(knocks) == 1


async def test_a_ticket_says_that_nobody_can_tell_rather_than_that_its_job_waits(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shop.queue'}"
    app, other = Conveyor("shop", broker=url, journal=True), Conveyor("mail", broker=url, journal=True)

    @app.task
    def work() -> None: ...

    async with other.running(), app:
        ticket = await work.send()
        with pytest.raises(NoKeeper, match="journal of shop"):
            await ticket.status(timeout=0.0)


def test_silence_names_whose_it_is() -> None:
    assert silence_of(["mail", "shop"]).startswith("nobody who keeps the journal of mail or shop answered")


async def test_that_a_keeper_is_behind_is_logged_once_until_it_is_not_however_its_reason_changes(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    async with gate("a", broker) as one, gate("b", broker) as other, asking(broker) as asker:
        other.problem = "b is full"
        for problem in ("1,000 kB free", "992 kB free", None, "full", "full"):
            one.problem = problem
            await asker.jobs(JobFilter(ids=("a", "b")))
    said = [each.message.rpartition(": ")[2] for each in caplog.records if each.name == "conveyor.ask"]
    assert sorted(said) == ["1,000 kB free", "b is full", "full"]
