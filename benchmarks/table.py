"""All measurements, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from benchmarks.subject import Goal, Load, Measurement, Subject

WAITING: Final = Load(100_000, ready=100_000)
QUEUED: Final = Load(50_000, ready=50_000)
"""On a server."""
NO_GOALS: Final[Mapping[str, Goal]] = {}
SENT: Final = Load(50_000)
HALF_SENT: Final = 25_000
MILLION: Final = 1_000_000
A_THIRD_SLOWER: Final = {"rate": Goal(share=2 / 3)}

FIVE_TIMES: Final = {"rate": Goal(first_at_least=5)}
FOUR_TIMES: Final = {"rate": Goal(first_at_least=4)}
SENT_TO_SERVER: Final = Load(30_000)
PINGS: Final = Load(2_000)
DRAMATIQ: Final = "one process of 8 threads, prefetch 100, default middleware, acknowledged after the actor"


def _waiting(messages: int) -> Load:
    """A peer's part of the queue: enough for a rate, and only seconds of it."""
    return Load(messages, ready=messages)


def _peer(
    name: str,
    measure: str,
    load: Load,
    fill: str | None = None,
    goals: Mapping[str, Goal] = NO_GOALS,
    environment: str = "peers",
    *,
    packages: str,
    settings: str,
) -> Subject:
    return Subject(name, measure, load, fill, goals, environment, tuple(packages.split()), settings)


MEASUREMENTS: Final = (
    Measurement(
        "consume",
        "Consume a queue of 100,000: claim, decode, handle, settle",
        (
            Subject("Conveyor", "consume:conveyor", WAITING, "load:fill", {"rate": Goal(at_least=45_000)}),
            Subject(
                "Conveyor, journal on",
                "consume:with_journal",
                WAITING,
                "load:fill",
                {"rate": Goal(share=0.85)},
                settings="the keeper in a process of its own",
            ),
            Subject("bare apsw", "bare_apsw:consume", WAITING, "bare_apsw:fill"),
            Subject("Conveyor in memory", "consume:in_memory", WAITING),
            Subject("Huey", "peers.huey:consume", Load(10_000, ready=10_000), "peers.huey:fill"),
        ),
    ),
    Measurement(
        "publish",
        "Publish from 100 tasks, each awaiting its own durable message",
        (
            Subject("Conveyor", "publish:conveyor", SENT, goals={"rate": Goal(at_least=20_000)}),
            Subject("bare apsw", "bare_apsw:publish", SENT),
            Subject("Conveyor in memory", "publish:in_memory", SENT),
            Subject("Huey", "peers.huey:publish", Load(10_000)),
        ),
    ),
    Measurement(
        "consume-depth",
        "Consume from a long queue",
        (
            Subject("100,000 ready", "consume:conveyor", WAITING, "load:fill"),
            Subject("1,000,000 ready", "consume:conveyor", Load(100_000, ready=MILLION), "load:fill", A_THIRD_SLOWER),
            Subject(
                "and 1,000,000 delayed",
                "consume:conveyor",
                Load(100_000, ready=100_000, delayed=MILLION),
                "load:fill",
                A_THIRD_SLOWER,
            ),
        ),
    ),
    Measurement(
        "publish-depth",
        "Publish into a long queue",
        (
            Subject("100,000 ready", "publish:conveyor", Load(HALF_SENT, ready=100_000), "load:fill"),
            Subject("1,000,000 ready", "publish:conveyor", Load(HALF_SENT, ready=MILLION), "load:fill", A_THIRD_SLOWER),
            Subject(
                "and 1,000,000 delayed",
                "publish:conveyor",
                Load(HALF_SENT, ready=100_000, delayed=MILLION),
                "load:fill",
                A_THIRD_SLOWER,
            ),
        ),
    ),
    Measurement(
        "transactions",
        "Handle in a transaction: inbox, a row, outbox (ledger on SQLite)",
        (Subject("Conveyor", "ledger:transactions", Load(2_000, ready=2_000), "load:fill"),),
    ),
    Measurement(
        "latency",
        "From publish() in one process to the handler in another, 200 messages/s",
        (
            Subject(
                "Conveyor", "latency:latency", Load(2_000), goals={"median": Goal(at_most=3), "p99": Goal(at_most=15)}
            ),
        ),
    ),
    Measurement(
        "memory",
        "Memory of `conveyor run`, idle",
        (
            Subject("runner", "latency:runner_memory", Load(1), goals={"rss": Goal(at_most=60)}),
            Subject("supervisor", "latency:supervisor_memory", Load(1), goals={"rss": Goal(at_most=60)}),
        ),
    ),
    Measurement(
        "import",
        "import conveyor",
        (
            Subject("Conveyor", "start:conveyor", Load(20), goals={"import": Goal(at_most=150)}),
            Subject("Huey", "start:huey", Load(20)),
        ),
    ),
    Measurement(
        "cores",
        "Handlers that compute for about 20 ms each, in pure Python",
        (
            Subject("cpu=True, one at a time", "cores:one_process", Load(200)),
            Subject("cpu=True, two at once", "cores:two_processes", Load(400), goals={"rate": Goal(share=1.7)}),
            Subject("threads, two at once", "cores:two_threads", Load(200)),
        ),
    ),
    Measurement(
        "hand-over",
        "Hand a message's bytes to a process (cpu=True), one at a time",
        (
            Subject("1 kB", "cores:small", Load(2_000)),
            Subject("1 MB", "cores:megabyte", Load(500)),
            Subject("50 MB", "cores:fifty_megabytes", Load(20)),
        ),
    ),
    Measurement(
        "rabbitmq-consume",
        "RabbitMQ: consume a queue of 50,000, one process",
        (
            Subject(
                "Conveyor",
                "consume:on_classic",
                QUEUED,
                "load:fill_classic",
                {"rate": Goal(at_least=20_000)},
                settings="?queue_type=classic: a classic durable queue, lazy; 100 at once, 200 held",
            ),
            Subject(
                "bare pika-asyncio",
                "bare_pika:consume",
                QUEUED,
                "load:fill_classic",
                {"rate": Goal(first_at_least=1)},
                packages=("pika",),
                settings="the same queue and messages; AsyncioConnection, prefetch 1,000, decodes in the callback, one ack for each",
            ),
            _peer(
                "FastStream",
                "peers.faststream:consume_rabbitmq",
                _waiting(10_000),
                "peers.faststream:fill_rabbitmq",
                FIVE_TIMES,
                packages="faststream aio-pika",
                settings="classic durable queue, prefetch 100, pydantic for the payload, acknowledged after the handler; plain asyncio",
            ),
            _peer(
                "taskiq",
                "peers.taskiq:consume_rabbitmq",
                _waiting(6_000),
                "peers.taskiq:fill_rabbitmq",
                FIVE_TIMES,
                "peers-taskiq",
                packages="taskiq taskiq-aio-pika aio-pika uvloop",
                settings="classic durable queue, 100 at once, prefetch 100, acknowledged after the task, no results; uvloop",
            ),
            _peer(
                "Dramatiq",
                "peers.dramatiq:consume_rabbitmq",
                _waiting(10_000),
                "peers.dramatiq:fill_rabbitmq",
                FIVE_TIMES,
                packages="dramatiq pika",
                settings=DRAMATIQ,
            ),
            _peer(
                "Celery",
                "peers.celery:consume",
                _waiting(5_000),
                "peers.celery:fill",
                FIVE_TIMES,
                packages="celery",
                settings="prefork with 2 children of prefetch 50, acks_late, no results, gossip, mingle or heartbeat; CPU of all three",
            ),
            Subject(
                "Conveyor, priorities",
                "consume:on_priorities",
                QUEUED,
                "load:fill_with_priorities",
                settings="?queue_type=priority: the same with x-max-priority",
            ),
            Subject(
                "Conveyor, quorum",
                "consume:on_quorum",
                QUEUED,
                "load:fill_server",
                settings="quorum queue, as is the default; 100 at once, 200 held",
            ),
            Subject(
                "bare pika-asyncio, quorum",
                "bare_pika:consume",
                QUEUED,
                "load:fill_server",
                packages=("pika",),
                settings="as above, from a quorum queue",
            ),
        ),
        "rabbitmq",
    ),
    Measurement(
        "rabbitmq-publish",
        "RabbitMQ: publish persistent messages with confirms, from 100 tasks",
        (
            Subject("Conveyor", "publish:on_classic", SENT_TO_SERVER, settings="?queue_type=classic"),
            Subject(
                "bare pika-asyncio",
                "bare_pika:publish",
                SENT_TO_SERVER,
                "load:fill_classic",
                {"rate": Goal(first_at_least=0.9)},
                packages=("pika",),
                settings="the same exchange, queue and messages; AsyncioConnection, mandatory, at most 100 unconfirmed",
            ),
            Subject(
                "bare pika, body alone",
                "bare_pika:publish_body",
                SENT_TO_SERVER,
                "load:fill_classic",
                packages=("pika",),
                settings="the same straight to the queue, without properties and headers, which the server would have to read",
            ),
            _peer(
                "FastStream",
                "peers.faststream:publish_rabbitmq",
                Load(6_000),
                packages="faststream aio-pika",
                settings="publish(persist=True), confirmed; plain asyncio",
            ),
            _peer(
                "taskiq",
                "peers.taskiq:publish_rabbitmq",
                Load(6_000),
                environment="peers-taskiq",
                packages="taskiq taskiq-aio-pika aio-pika uvloop",
                settings="kiq(), confirmed; uvloop",
            ),
            _peer(
                "Dramatiq",
                "peers.dramatiq:publish_rabbitmq",
                Load(5_000),
                packages="dramatiq pika",
                settings="confirm_delivery, one by one, as its interface has it",
            ),
            _peer(
                "Celery",
                "peers.celery:publish",
                Load(3_000),
                packages="celery",
                settings="confirm_publish, one by one, as its interface has it",
            ),
            Subject("Conveyor, quorum", "publish:on_quorum", SENT_TO_SERVER, settings="quorum queue"),
        ),
        "rabbitmq",
    ),
    Measurement(
        "rabbitmq-latency",
        "RabbitMQ: from publish() in one process to the handler in another, 200 messages/s",
        (
            Subject("Conveyor", "latency:on_server", PINGS, settings="quorum queue"),
            Subject(
                "bare pika-asyncio",
                "bare_pika:latency",
                PINGS,
                packages=("pika",),
                settings="quorum queue; basic.publish with confirms; a consumer that acknowledges each one",
            ),
        ),
        "rabbitmq",
    ),
    Measurement(
        "redis-consume",
        "Redis: consume a queue of 50,000, one process",
        (
            Subject(
                "Conveyor",
                "consume:on_redis",
                QUEUED,
                "load:fill_server",
                {"rate": Goal(at_least=20_000)},
                settings="100 at once, 200 held",
            ),
            Subject(
                "bare redis-py",
                "bare_redis:consume",
                QUEUED,
                "bare_redis:fill",
                {"rate": Goal(first_at_least=0.5)},
                packages=("redis", "hiredis"),
                settings="XREADGROUP of 100, a handler for each, one XACK for all; nothing is deleted",
            ),
            _peer(
                "Repid",
                "peers.repid:consume",
                _waiting(20_000),
                "peers.repid:fill",
                FOUR_TIMES,
                packages="repid redis hiredis uvloop",
                settings="streams, 100 read at a time, 100 at once, one XACK for each; uvloop",
            ),
            _peer(
                "taskiq",
                "peers.taskiq:consume_redis",
                _waiting(6_000),
                "peers.taskiq:fill_redis",
                FOUR_TIMES,
                "peers-taskiq",
                packages="taskiq taskiq-redis redis hiredis uvloop",
                settings="streams, 100 read at a time, 100 at once, 100 held, no results; uvloop",
            ),
            _peer(
                "FastStream",
                "peers.faststream:consume_redis",
                _waiting(8_000),
                "peers.faststream:fill_redis",
                FOUR_TIMES,
                packages="faststream redis hiredis uvloop",
                settings="a stream with a group, 100 read at a time, no logger; uvloop",
            ),
            _peer(
                "Dramatiq",
                "peers.dramatiq:consume_redis",
                _waiting(10_000),
                "peers.dramatiq:fill_redis",
                FOUR_TIMES,
                packages="dramatiq redis hiredis",
                settings=DRAMATIQ,
            ),
            _peer(
                "SAQ",
                "peers.saq:consume",
                _waiting(5_000),
                "peers.saq:fill",
                FOUR_TIMES,
                packages="saq redis hiredis",
                settings="100 at once, ttl=-1 (no results); plain asyncio",
            ),
            _peer(
                "streaq",
                "peers.streaq:consume",
                _waiting(3_000),
                "peers.streaq:fill",
                FOUR_TIMES,
                "peers-redis5",
                packages="streaq coredis",
                settings="100 at once, 100 held, ttl=0 (no results); plain asyncio",
            ),
            _peer(
                "arq",
                "peers.arq:consume",
                _waiting(3_000),
                "peers.arq:fill",
                FOUR_TIMES,
                "peers-redis5",
                packages="arq redis hiredis",
                settings="max_jobs=100, poll_delay=0.01, keep_result=0; plain asyncio",
            ),
        ),
        "redis",
    ),
    Measurement(
        "redis-publish",
        "Redis: publish from 100 tasks",
        (
            Subject("Conveyor", "publish:on_redis", SENT_TO_SERVER),
            Subject(
                "bare redis-py",
                "bare_redis:publish",
                SENT_TO_SERVER,
                packages=("redis", "hiredis"),
                settings="each task awaits its XADD",
            ),
        ),
        "redis",
    ),
    Measurement(
        "redis-latency",
        "Redis: from publish() in one process to the handler in another, 200 messages/s",
        (
            Subject("Conveyor", "latency:on_server", PINGS),
            Subject(
                "bare redis-py",
                "bare_redis:latency",
                PINGS,
                goals={"median": Goal(first_at_most=1.5)},
                packages=("redis", "hiredis"),
                settings="XADD; XREADGROUP BLOCK, then XACK",
            ),
        ),
        "redis",
    ),
)
