"""``conveyor graph``: which events an app's workers receive and publish, as text, Mermaid or JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from conveyor.cli import EXIT_CODES
from conveyor.cli.application import load_app
from conveyor.cli.terminal import OK, Output
from conveyor.cli.wiring import Wiring, wiring
from conveyor.runtime.logs import printable
from conveyor.runtime.worker import Worker

PLAIN = Output()

command = App(
    name="graph",
    help_epilogue=f"""Examples:
  conveyor graph shop:app
  conveyor graph shop:app --format mermaid > docs/flow.mmd
  conveyor graph shop:app --json | jq '.workers[].name'

{EXIT_CODES}""",
)


@command.default
def graph(
    app: str,
    /,
    *,
    style: Annotated[Literal["text", "mermaid", "json"], Parameter(name="--format")] = "text",
    output: Output = PLAIN,
) -> int:
    """Draw an app's wiring.

    Parameters:
        app: The app, as module:attribute.
        style: text, mermaid (for Markdown pages), or json. Default: text.
    """
    found = load_app(app)
    drawn = wiring(found.workers.values())
    if output.json or style == "json":
        output.document(as_json(found.name, drawn))
    else:
        print(as_mermaid(drawn) if style == "mermaid" else as_text(found.name, drawn))
    return OK


def as_text(name: str, drawn: Wiring) -> str:
    """Topic by topic, in the order of the flow."""
    lines = [printable(name)]
    for topic in drawn.topics:
        sources = (
            ", ".join(printable(worker.name) for worker in drawn.publishers.get(topic, ())) or "published from outside"
        )
        lines.append(f"\n  {printable(topic)}  ({sources})")
        for worker in drawn.receivers.get(topic, ()):
            emits = " | ".join(event.topic for event in worker.plan.emits)
            lines.append(f"    → {printable(worker.name)}" + (f"  publishes {emits}" if emits else ""))
        if topic not in drawn.receivers:
            lines.append("    (nobody receives it)")
    if drawn.tasks:
        lines.append("\n  tasks")
        lines += [
            f"    {printable(task.name)}({', '.join(field.name for field in task.plan.fields or ())})"
            for task in drawn.tasks
        ]
    return "\n".join(lines)


def as_mermaid(drawn: Wiring) -> str:
    """A Mermaid flowchart: rounded events, square workers; events that nobody receives are dashed."""
    topics = {topic: f"e{index}" for index, topic in enumerate(drawn.topics)}
    workers = {worker.name: f"w{index}" for index, worker in enumerate((*drawn.workers, *drawn.tasks))}
    lines = ["flowchart LR"]
    lines += [
        f'  {node}(["{_label(topic)}"])' + ("" if topic in drawn.receivers else ":::nobody")
        for topic, node in topics.items()
    ]
    lines += [f'  {node}["{_label(name)}"]' for name, node in workers.items()]
    for worker in drawn.workers:
        lines += [f"  {topics[event.topic]} --> {workers[worker.name]}" for event in worker.plan.receives]
        lines += [f"  {workers[worker.name]} --> {topics[event.topic]}" for event in worker.plan.emits]
    if any(topic not in drawn.receivers for topic in topics):
        lines.append("  classDef nobody stroke-dasharray: 4 4")
    return "\n".join(lines)


def _label(text: str) -> str:
    """A text inside a Mermaid label: everything but plain characters as a number."""
    return "".join(c if c.isalnum() or c in " ._-:" else f"#{ord(c)};" for c in printable(text))


def as_json(name: str, drawn: Wiring) -> dict[str, Any]:
    """The wiring for programs."""
    return {
        "app": name,
        "events": [
            {
                "topic": topic,
                "types": list(
                    dict.fromkeys(getattr(event.type, "__name__", str(event.type)) for event in drawn.types(topic))
                ),
                "published_by": [worker.name for worker in drawn.publishers.get(topic, ())],
                "received_by": [worker.name for worker in drawn.receivers.get(topic, ())],
            }
            for topic in drawn.topics
        ],
        "workers": [
            _worker(worker)
            | {
                "receives": [event.topic for event in worker.plan.receives],
                "publishes": [event.topic for event in worker.plan.emits],
            }
            for worker in drawn.workers
        ],
        "tasks": [
            _worker(task) | {"parameters": [field.name for field in task.plan.fields or ()]} for task in drawn.tasks
        ],
    }


def _worker(worker: Worker) -> dict[str, Any]:
    return {
        "name": worker.name,
        "queue": worker.queue.name,
        "mode": str(worker.plan.mode),
        "concurrency": worker.concurrency,
        "ordered": worker.queue.ordered,
    }
