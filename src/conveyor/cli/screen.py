"""What `conveyor top` draws: three tables that fit the terminal, and what its keys do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, ClassVar, Final

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import ScrollableContainer
from textual.drivers.linux_driver import LinuxDriver
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Static

from conveyor.cli.figures import (
    ERRORS,
    QUEUES,
    RUNNERS,
    Column,
    Texts,
    brief_rate,
    failure_cells,
    failure_text,
    fitted,
    heights,
    in_middle,
    queue_cells,
    queue_text,
    runner_cells,
    runner_text,
    widths,
)
from conveyor.cli.terminal import safe, shortened
from conveyor.cli.top import Picture, QueueRow, Watcher
from conveyor.core.words import counted
from conveyor.errors import ConveyorError
from conveyor.runtime.control import Failure

SCROLLBAR: Final = 1
TABLES: Final = ("queues", "runners", "errors")

HELP: Final = """\
conveyor top shows a broker's queues, the runners
that are connected to it, and their latest errors.

Tab, ↑ ↓   select a table, and a row in it
Enter      the whole of what is selected, as it is
           from then on; Enter, Esc or q closes it
p          pause the selected queue, or let it go
           on: from a paused queue nothing is
           fetched, what was not begun goes back,
           what runs is finished
r          put the dead letters of the selected
           queue back (asks first)
q, Ctrl-C  quit

oldest     how long the oldest ready message has
           been waiting
rate/s     attempts that ended, well or not, in
           the last ten seconds
in flight  messages that runners have and have
           not settled
failed     attempts that ended with an error
           since the runners started
retried    those of them that are tried again
memory     of the process itself

A runner is called HOST/NUMBER, as its supervisor
counts: logs say the same number. One without a
supervisor is called HOST/PID.

The newest error stays in sight until you move the
cursor. A wide terminal shows more columns.
"""


Row = tuple[str, Sequence[str | Text]]
"""Its key, and its cells."""


class Table(DataTable[Text]):
    """A table that fits its room: what does not is cut where one sees it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select_cursor", "Whole"),
        Binding("tab", "app.focus_next", "Next", key_display="⇥"),
    ]

    def __init__(self, columns: Sequence[Column], *, id: str, nothing: str, newest_first: bool = False) -> None:
        super().__init__(id=id, cursor_type="row", cell_padding=0, header_height=1)
        self._all = columns
        self._nothing = nothing
        self._newest_first = newest_first
        """While the cursor is on the first row it stays there, whatever comes: who looks on sees what is new."""
        self._shown: list[Row] = []
        self._known = False
        self.keys: list[str] = []

    @property
    def selected(self) -> str | None:
        """The key of the selected row."""
        return self.keys[self.cursor_row] if 0 <= self.cursor_row < len(self.keys) else None

    def show(self, rows: Sequence[Row], *, known: bool) -> None:
        """Draw these rows; the one that somebody has selected stays selected, and in its place, wherever it is now.

        Parameters:
            known: the broker has been looked at; before, that there is no row means nothing.
        """
        self._shown = list(rows)
        self._known = known
        self._draw()

    def on_resize(self) -> None:
        """Draw anew, with the cursor in sight."""
        self._draw()
        self.move_cursor(row=self.cursor_row)

    @property
    def lines_wanted(self) -> int:
        """Lines with which all rows are seen, and at least one."""
        return 1 + max(1, len(self._shown))

    def _draw(self) -> None:
        room = self.size.width - SCROLLBAR
        if room < len(self._all) * 2:
            return
        selected, before, top = self.selected, self.cursor_row, self.scroll_offset.y
        places = [place for place, column in enumerate(self._all) if column.least <= self.app.size.width]
        columns = [self._all[place] for place in places]
        rows = [(key, [cells[place] for place in places]) for key, cells in self._shown]
        self.clear(columns=True)
        if not rows:
            self.keys = []
            self.add_column(Text(columns[0].label.ljust(room)[:room], "bold"), width=room)
            self.add_row(Text(shortened(self._nothing if self._known else "not known yet", room), "dim"))
            self.show_cursor = False
            return
        self.show_cursor = True
        sizes = widths(columns, [[str(cell) for cell in cells] for _, cells in rows], room)
        for column, width in zip(columns, sizes, strict=True):
            self.add_column(fitted(column.label, column, width, "bold"), width=width + 1)
        for _, cells in rows:
            row_places = zip(cells, columns, sizes, strict=True)
            self.add_row(*(fitted(cell, column, width) for cell, column, width in row_places))
        self.keys = [key for key, _ in rows]
        row = self.keys.index(selected) if selected in self.keys else min(max(before, 0), len(rows) - 1)
        if self._newest_first and before <= 0 and top <= 0:
            row = before = 0
        self.move_cursor(row=row, scroll=False)
        self.scroll_to(y=top if row == before else top + row - before, animate=False)


class Scrolled(ScrollableContainer):
    """Room for a text that may be longer than the terminal; the keys say so."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("up", "scroll_up", "Scroll", key_display="↑↓←→")]


class Whole(ModalScreen[None]):
    """A text that has all the room it needs, as it is now; any of the usual keys closes it.

    Parameters:
        read: gives the text; None where what it told of is no longer there: then its last state stays.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,enter,q,question_mark", "dismiss", "Close", key_display="esc ⏎ q")
    ]

    def __init__(self, read: Callable[[], Texts | None]) -> None:
        super().__init__()
        self._read = read
        self._shown: Texts | None = None

    def compose(self) -> ComposeResult:
        with Scrolled(id="whole"):
            yield Static(id="text")
            yield Static(id="listing")
        yield Footer()

    def on_mount(self) -> None:
        """Begin with what there is."""
        self.draw()

    def draw(self) -> None:
        """Show the text as it is now; whoever has scrolled stays where he is."""
        texts = self._read()
        self.query_one("#whole").border_title = "no longer there; known last:" if texts is None else None
        if texts is None or texts == self._shown:
            return
        self._shown = texts
        for name, text in zip(("#text", "#listing"), texts, strict=True):
            static = self.query_one(name, Static)
            static.update(safe(text))
            static.display = bool(text)


class Question(ModalScreen[bool]):
    """Something that should not happen by a slip of the finger."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape,q", "answer(False)", "No"),
    ]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        yield Static(safe(self._text + "\n\n[y] yes   [n] no"), id="question")
        yield Footer()

    def action_answer(self, answer: bool) -> None:
        """Close with it."""
        self.dismiss(answer)


class Driver(LinuxDriver):
    """Draws on stdout: Textual's own draws on stderr, which may lead into a file."""

    def __init__(
        self, app: App[Any], *, debug: bool = False, mouse: bool = True, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(app, debug=debug, mouse=mouse, size=size)
        self._file = sys.__stdout__


class Top(App[None]):
    """The terminal as conveyor top uses it.

    Parameters:
        watcher: looks, and does what is asked for.
    """

    ENABLE_COMMAND_PALETTE = False
    TITLE = "conveyor top"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "turn", "Pause/resume"),
        Binding("r", "redrive", "Redrive"),
        Binding("question_mark", "help", "Help"),
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),  # also while a window is open
    ]
    CSS = """
    #title { height: 1; background: $primary-darken-2; color: $text; }
    #title.away { background: $error; }
    DataTable { scrollbar-size-vertical: 1; scrollbar-size-horizontal: 0; background: $surface; overflow-x: hidden; }
    DataTable.old { opacity: 60%; }
    Whole, Question { align: center middle; }
    #text { width: 100%; }
    #listing { width: auto; text-wrap: nowrap; }
    #whole { width: 96%; height: 90%; padding: 0 1; border: round $primary; background: $surface; }
    #question { width: auto; max-width: 90%; height: auto; padding: 1 2; border: round $warning; background: $surface; }
    """

    def __init__(self, watcher: Watcher) -> None:
        super().__init__(driver_class=Driver)
        self._watcher = watcher
        self._picture = Picture()
        self._mounted = False

    def compose(self) -> ComposeResult:
        yield Static(id="title")
        yield Table(QUEUES, id="queues", nothing="no queue yet; conveyor run APP declares them")
        yield Table(RUNNERS, id="runners", nothing="no runner answers; conveyor run APP starts them")
        yield Table(ERRORS, id="errors", nothing="no error since the runners started", newest_first=True)
        yield Footer()

    def on_mount(self) -> None:
        """Begin with the queues."""
        self._mounted = True
        self.query_one("#queues").focus()
        self._draw()

    def on_resize(self) -> None:
        """The title is as wide as the terminal, and the tables share its lines."""
        self._draw_title()
        self._share_lines()

    def show(self, picture: Picture) -> None:
        """Draw what there is to see now."""
        self._picture = picture
        if self._mounted:
            self._draw()

    # --- keys ---------------------------------------------------------------------------------------------------------

    def action_turn(self) -> None:
        """Pause the selected queue, or let it go on."""
        if queue := self._queue():
            self._do(self._watcher.turn(queue.name))

    def action_redrive(self) -> None:
        """Put the dead letters of the selected queue back, after a question."""
        queue = self._queue()
        if queue is None:
            return
        if not queue.dead:
            self.notify(safe(f"{queue.name} has no dead letters").plain, markup=False)
            return

        def answered(yes: bool | None) -> None:
            if yes:
                self._do(self._watcher.redrive(queue.name))

        self.push_screen(Question(f"Put {counted(queue.dead, 'dead letter')} back into {queue.name}?"), answered)

    def on_data_table_row_selected(self) -> None:
        """Show all of what is selected: Enter, or a click on the selected row."""
        table = self.focused
        if isinstance(table, Table) and (key := table.selected) is not None:
            self.push_screen(Whole(lambda: self._text_of(str(table.id), key)))

    def action_help(self) -> None:
        """Say what the keys do."""
        self.push_screen(Whole(lambda: ("", HELP)))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _table(self, name: str) -> Table:
        return self.screen_stack[0].query_one(f"#{name}", Table)

    def _queue(self) -> QueueRow | None:
        selected = self._table("queues").selected
        return next((row for row in self._picture.queues if row.name == selected), None)

    def _text_of(self, table: str, key: str) -> Texts | None:
        picture = self._picture
        found: Iterator[Texts]
        match table:
            case "queues":
                found = (queue_text(row) for row in picture.queues if row.name == key)
            case "runners":
                found = (runner_text(row) for row in picture.runners if row.status.runner == key)
            case _:
                found = (failure_text(each[1]) for each in picture.failures if _key(*each) == key)
        return next(found, None)

    def _do(self, what: Coroutine[Any, Any, str]) -> None:
        async def do() -> None:
            try:
                self.notify(safe(await what).plain, markup=False)
            except ConveyorError as error:
                self.notify(safe(str(error)).plain, severity="error", markup=False)

        self.run_worker(do())

    def _draw(self) -> None:
        picture = self._picture
        self._draw_title()
        rows: dict[str, list[Row]] = {
            "queues": [(row.name, queue_cells(row)) for row in picture.queues],
            "runners": [(row.status.runner, runner_cells(row)) for row in picture.runners],
            "errors": [(_key(*each), failure_cells(each[1])) for each in picture.failures],
        }
        for name in TABLES:
            self._table(name).show(rows[name], known=picture.looked)
            self._table(name).set_class(picture.outage is not None, "old")
        self._share_lines()
        if isinstance(self.screen, Whole) and self.screen.is_mounted:
            self.screen.draw()

    def _share_lines(self) -> None:
        tables = [self._table(name) for name in TABLES]
        room = self.size.height - 2  # the title, and the keys
        for table, lines in zip(tables, heights(room, [table.lines_wanted for table in tables]), strict=True):
            table.styles.height = lines

    def _draw_title(self) -> None:
        picture, title = self._picture, self.screen_stack[0].query_one("#title", Static)
        title.set_class(picture.outage is not None, "away")
        room = self.size.width - 2
        if picture.outage is not None:
            text = f"AWAY for {picture.outage_seconds:.0f} s, trying on: {picture.outage}"
        elif not picture.looked:
            text = f"connecting to {self._watcher.title}"
        else:
            figures = f"{counted(len(picture.runners), 'runner')}   {brief_rate(picture.rate)}/s"
            name = in_middle(f"conveyor top   {self._watcher.title}", room - len(figures) - 1)
            text = name.ljust(room - len(figures)) + figures
        title.update(safe(f" {shortened(text, room)}" if picture.outage else f" {text}"))


def _key(runner: str, failure: Failure) -> str:
    return f"{runner} {failure.number}"
