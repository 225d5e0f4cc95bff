"""All measurements, in the order in which they are shown."""

from __future__ import annotations

from typing import Final

from benchmarks.subject import Goal, Load, Measurement, Subject

WAITING: Final = Load(100_000, ready=100_000)
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
            Subject("Huey", "peer_huey:consume", Load(10_000, ready=10_000), "peer_huey:fill"),
        ),
    ),
    Measurement(
        "publish",
        "Publish from 100 tasks, each awaiting its own durable message",
        (
            Subject("Conveyor", "publish:conveyor", SENT, goals={"rate": Goal(at_least=20_000)}),
            Subject("bare apsw", "bare_apsw:publish", SENT),
            Subject("Conveyor in memory", "publish:in_memory", SENT),
            Subject("Huey", "peer_huey:publish", Load(10_000)),
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
)
