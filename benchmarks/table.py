"""All measurements, in the order in which they are shown."""

from __future__ import annotations

from typing import Final

from benchmarks.subject import Goal, Load, Measurement, Subject

WAITING: Final = Load(100_000, ready=100_000)
QUEUED: Final = Load(50_000, ready=50_000)
"""On a server."""
SENT: Final = Load(50_000)
HALF_SENT: Final = 25_000
MILLION: Final = 1_000_000
A_THIRD_SLOWER: Final = {"rate": Goal(share=2 / 3)}

MEASUREMENTS: Final = (
    Measurement(
        "consume",
        "Consume a queue of 100,000: claim, decode, handle, settle",
        (
            Subject("Conveyor", "consume:conveyor", WAITING, "load:fill"),
            Subject(
                "Conveyor, prefetch=1000",
                "consume:conveyor_prefetch",
                WAITING,
                "load:fill",
                {"rate": Goal(at_least=45_000)},
            ),
            Subject("bare apsw", "bare_apsw:consume", WAITING, "bare_apsw:fill"),
            Subject("Conveyor in memory", "consume:in_memory", WAITING),
            Subject("Huey", "peers.huey:consume", Load(10_000, ready=10_000), "peer_huey:fill"),
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
        "rabbitmq-consume",
        "RabbitMQ: consume a queue of 50,000, one process",
        (
            Subject(
                "Conveyor",
                "consume:on_classic",
                QUEUED,
                "load:fill_classic",
                {"rate": Goal(at_least=20_000)},
                settings="classic durable queue, defaults (100 at once, 200 held)",
            ),
            Subject(
                "bare pika-asyncio",
                "bare_pika:consume",
                QUEUED,
                "bare_pika:fill",
                {"rate": Goal(first_at_least=1)},
                packages=("pika",),
                settings="AsyncioConnection, prefetch 1,000, decodes in the callback, one ack for each",
            ),
            Subject(
                "Conveyor, quorum", "consume:on_quorum", QUEUED, "load:fill_server", settings="quorum queue, defaults"
            ),
            Subject(
                "bare pika-asyncio, quorum",
                "bare_pika:consume_quorum",
                QUEUED,
                "bare_pika:fill_quorum",
                packages=("pika",),
                settings="as above",
            ),
        ),
        "rabbitmq",
    ),
    Measurement(
        "rabbitmq-publish",
        "RabbitMQ: publish persistent messages with confirms, from 100 tasks",
        (
            Subject("Conveyor", "publish:on_classic", Load(30_000), settings="classic durable queue"),
            Subject(
                "bare pika-asyncio",
                "bare_pika:publish",
                Load(30_000),
                None,
                {"rate": Goal(first_at_least=0.9)},
                packages=("pika",),
                settings="AsyncioConnection, 100 unconfirmed at most",
            ),
            Subject("Conveyor, quorum", "publish:on_quorum", Load(30_000), settings="quorum queue"),
        ),
        "rabbitmq",
    ),
    Measurement(
        "rabbitmq-latency",
        "RabbitMQ: from publish() in one process to the handler in another, 200 messages/s",
        (
            Subject("Conveyor", "latency:on_rabbitmq", Load(2_000), settings="classic durable queue"),
            Subject(
                "bare pika-asyncio", "bare_pika:latency", Load(2_000), packages=("pika",), settings="as for consuming"
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
                settings="defaults (100 at once, 200 held)",
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
        ),
        "redis",
    ),
    Measurement(
        "redis-publish",
        "Redis: publish from 100 tasks",
        (
            Subject("Conveyor", "publish:on_redis", Load(30_000)),
            Subject(
                "bare redis-py",
                "bare_redis:publish",
                Load(30_000),
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
            Subject("Conveyor", "latency:on_redis", Load(2_000)),
            Subject(
                "bare redis-py",
                "bare_redis:latency",
                Load(2_000),
                None,
                {"median": Goal(first_at_most=1.5)},
                packages=("redis", "hiredis"),
                settings="XADD; XREADGROUP BLOCK, then XACK",
            ),
        ),
        "redis",
    ),
)
