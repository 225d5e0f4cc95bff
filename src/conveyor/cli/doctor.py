"""``conveyor doctor``: the promises of the conformance suite, proved on a broker of the user's own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import glob
import logging
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from cyclopts import App

from conveyor import brokers
from conveyor.broker import Broker, Feature
from conveyor.cli import EXIT_CODES
from conveyor.cli.connection import Where
from conveyor.cli.terminal import FAILED, OK, Output, errors, out, safe, span
from conveyor.config import masked
from conveyor.errors import BrokerUnavailable, ConfigurationError
from conveyor.testing.promises import PROMISES, Ended, Makers, Result, prove
from conveyor.testing.promises.suite import SHORT_LEASE_SECONDS, sweep

HERE = Where()
PLAIN = Output()
COLOURS = {Ended.PASSED: "green", Ended.FAILED: "bold red", Ended.SKIPPED: "yellow"}
WORDS = {Ended.PASSED: "kept", Ended.FAILED: "BROKEN", Ended.SKIPPED: "not asked"}
RISKS = {
    Feature.DURABLE: "what it holds is lost with its process",
    Feature.FENCE: "a process that slept past its lease can settle what another one has by now",
}
"""What it means for every app that a broker lacks one of these; the others only matter to those who ask for them."""

HELD: Final = {"amqp": ("RabbitMQ", "consumer_timeout", 1_800.0), "amqps": ("RabbitMQ", "consumer_timeout", 1_800.0)}
"""Scheme → server, its setting for how long a message may be held, and its default in seconds. The URL has a parameter of that name."""

FAIR_LEASE_SECONDS: Final = {"amqp": 2.0, "amqps": 2.0}
"""Scheme → the shortest lease that it is fair to prove promises with: AMQP's heartbeats come once a second at most."""

LOOK_SECONDS: Final = 1.0
"""Between two looks whether the server is still there."""
AWAY_SECONDS: Final = 10.0
"""A server that has not answered for so long is gone: what is proved on it now proves nothing. Longer than its restart may be felt."""
TIDY_SECONDS: Final = 5.0
"""How long a proof that is broken off may take to end."""

command = App(
    name="doctor",
    help_epilogue=f"""Examples:
  conveyor doctor --broker sqlite:///shop.queue
  conveyor doctor --app shop:app --only publishing,leases
  conveyor doctor --json | jq '.promises[] | select(.verdict == "failed")'

With --app, handlers that may take longer than the server lets a message be
held are among the risks.

It works with queues that nobody else uses, and removes them afterwards, also
those of an earlier run that was killed; on SQLite in a file of its own beside
yours. It takes a minute or two.

{EXIT_CODES}""",
)


@command.default
def doctor(
    *,
    only: str | None = None,
    where: Where = HERE,
    output: Output = PLAIN,
) -> int:
    """Prove on a broker of yours that it keeps Conveyor's promises.

    Parameters:
        only: Only these promises or areas, with commas between. Default: all.
    """
    chosen = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
    known = sorted({promise.area for promise in PROMISES.values()})
    unknown = [name for name in chosen or () if name not in known and name not in PROMISES]
    if unknown:
        raise ConfigurationError(f"there is no promise or area {unknown[0]!r}; the areas are {', '.join(known)}")
    return asyncio.run(_examine(where.url(), where.app, chosen, output))


async def _examine(url: str, app: str | None, only: Sequence[str] | None, output: Output) -> int:
    parts = urlsplit(url)
    if parts.scheme == "memory" and not parts.netloc:
        raise ConfigurationError("memory:// is another broker each time it is opened; examine memory://NAME")
    missing, risks = await _look(url)
    risks += [] if app is None else long_handlers(app, url)
    if not output.json:
        output.say(masked(url), "bold")
        for feature, why in missing.items():
            output.say(f"  lacks {feature}: {why}", "yellow")
        for risk in risks:
            output.say(f"  risk: {risk}", "yellow")
    with _workplace(url) as place:
        lease_seconds = FAIR_LEASE_SECONDS.get(parts.scheme, SHORT_LEASE_SECONDS)
        makers = Makers(functools.partial(brokers.from_url, place), lease_seconds)
        results = await _prove(makers, only, output, watched=parts.scheme not in {"sqlite", "memory"})
    failed = [result for result in results if result.ended is Ended.FAILED]
    kept = sum(result.ended is Ended.PASSED for result in results)
    if output.json:
        output.document(
            {
                "broker": masked(url),
                "ok": not failed,
                "missing": {str(feature): why for feature, why in missing.items()},
                "risks": [masked(risk) for risk in risks],
                "promises": [as_json(result) for result in results],
            }
        )
    else:
        output.say(
            f"{kept} of {len(results)} promises kept" + (f", {len(failed)} BROKEN" if failed else ""),
            "bold red" if failed else "green",
        )
    return FAILED if failed else OK


async def _look(url: str) -> tuple[dict[Feature, str], list[str]]:
    """Open the broker once: what it lacks, and what endangers messages there. A queue file is not made for that."""
    parts = urlsplit(url)
    broker = brokers.from_url(url)
    with _overheard() as warnings:
        if parts.scheme != "sqlite" or await asyncio.to_thread(_file(url).exists):
            await broker.open()
        try:
            risks = await broker.risks()
        finally:
            await broker.close()
    missing = dict(broker.missing)
    lacks = [f"no {feature}: {risk}" for feature, risk in RISKS.items() if feature in missing]
    return missing, [*lacks, *risks, *(said for said in warnings.said if said not in risks)]


def long_handlers(app: str, url: str) -> list[str]:
    """Workers that may hold a message for longer than the server allows, as far as that can be known."""
    from conveyor.cli.application import load_app

    parts = urlsplit(url)
    if parts.scheme not in HELD:
        return []
    server, setting, default = HELD[parts.scheme]
    limit = float(dict(parse_qsl(parts.query)).get(setting, default))
    workers = {name: worker.timeout_seconds for name, worker in load_app(app).workers.items()}
    return [
        f"worker {name} may take {'as long as it likes' if seconds is None else span(seconds)}, and {server} takes a message back that"
        f" is held for longer than {setting}, which cannot be seen from here: Conveyor counts on {span(limit)}, and renews in time."
        f" Where the server's is shorter, put ?{setting}=SECONDS into the URL, or work is done twice."
        for name, seconds in workers.items()
        if seconds is None or seconds >= limit
    ]


@contextlib.contextmanager
def _workplace(url: str) -> Iterator[str]:
    """Where promises are proved: in the broker itself, for SQLite in a file of its own beside the one that is meant.

    There it has the same disk and the same settings, takes no lock that anybody waits for, and can be deleted as a whole.
    """
    parts = urlsplit(url)
    if parts.scheme != "sqlite":
        yield url
        return
    file = _file(url).with_name(f"{_file(url).name}.doctor-{secrets.token_hex(4)}")
    try:
        yield parts._replace(path="/" + quote(str(file))).geturl()
    finally:
        for made in file.parent.glob(f"{glob.escape(file.name)}*"):
            if made.is_dir():
                shutil.rmtree(made, ignore_errors=True)
            else:
                made.unlink(missing_ok=True)


def _file(url: str) -> Path:
    return Path(unquote(urlsplit(url).path[1:]))


async def _prove(makers: Makers, only: Sequence[str] | None, output: Output, *, watched: bool) -> list[Result]:
    chosen = [p for p in PROMISES.values() if only is None or p.name in only or p.area in only]
    results: list[Result] = []
    with output.progress() as bar, _overheard():  # the proofs provoke warnings on purpose
        task = bar.add_task("proving", total=len(chosen))

        async def ask(server: Broker | None) -> None:
            for promise in chosen:
                result = await prove(promise, makers)
                if result.ended is Ended.FAILED and server is not None:
                    await server.risks()  # where it does not answer, that is why
                results.append(result)
                bar.advance(task)
                if not output.json:
                    _print(result)
                elif errors().is_terminal:
                    output.note(f"{promise.name}: {WORDS[result.ended]}")

        if not watched:
            await ask(None)
            return results
        server = makers.broker()
        await server.open()
        asking = asyncio.create_task(ask(server), name="proving")
        watching = asyncio.create_task(_away(server), name="watching the server")
        try:
            await sweep(server, time.time())
            ended, _ = await asyncio.wait([asking, watching], return_when=asyncio.FIRST_COMPLETED)
            for each in ended:
                each.result()
            await sweep(server, time.time())
        except BrokerUnavailable as error:
            raise BrokerUnavailable(
                f"the server went away after {len(results)} of {len(chosen)} promises, so the others were not asked: {error}"
            ) from error
        finally:
            watching.cancel()
            asking.cancel()
            await asyncio.wait([asking, watching], timeout=TIDY_SECONDS)
            await server.close()
    return results


async def _away(server: Broker) -> NoReturn:
    """Raise BrokerUnavailable when the server has given no answer for a while."""
    loop = asyncio.get_running_loop()
    last = loop.time()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        try:
            async with asyncio.timeout(AWAY_SECONDS):
                await server.risks()
            last = loop.time()
        except (BrokerUnavailable, TimeoutError) as error:
            if loop.time() - last > AWAY_SECONDS:
                said = str(error) or f"no answer for {AWAY_SECONDS:g} s"
                raise BrokerUnavailable(said) from error


def _print(result: Result) -> None:
    sentence = " ".join(result.promise.sentence.split())
    out().print(
        safe(f"  {WORDS[result.ended]:<10}", COLOURS[result.ended]),
        safe(f"{sentence}"),
        safe(f"({result.promise.name}, {result.seconds:.2f} s)", "dim"),
        soft_wrap=True,
    )
    if result.error:
        out().print(safe(f"            {masked(result.error)}", COLOURS[result.ended]), soft_wrap=True)


def as_json(result: Result) -> dict[str, Any]:
    """One promise as --json prints it."""
    return {
        "name": result.promise.name,
        "area": result.promise.area,
        "sentence": " ".join(result.promise.sentence.split()),
        "verdict": str(result.ended),
        "seconds": round(result.seconds, 3),
        "error": masked(result.error),
    }


class _Warnings(logging.Handler):
    """Keeps what is logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(masked(record.getMessage()))


@contextlib.contextmanager
def _overheard() -> Iterator[_Warnings]:
    """What Conveyor warns of inside the block is kept, and shown nowhere else."""
    logger = logging.getLogger("conveyor")
    warnings, before = _Warnings(), logger.propagate
    logger.addHandler(warnings)
    logger.propagate = False
    try:
        yield warnings
    finally:
        logger.propagate = before
        logger.removeHandler(warnings)
