"""What is done to owners, queues and messages inside a transaction of the queue file."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

import apsw
import msgspec

from conveyor.broker import Clock, DeadLetter, Delivery, Queue, Settlement
from conveyor.brokers.sqlite.queue_file import SQL, QueueFile
from conveyor.brokers.sqlite.wake import WakeSockets
from conveyor.core.message import JSON, NO_HEADERS, Message, redriven
from conveyor.core.settle import Dead, Done, RetryAt
from conveyor.errors import BrokerError, BrokerUnavailable, QueueConflict, QueueInUse

Receipt = tuple[int, int]
"""A message's row, and the token of its lease; all messages of one claim have one token."""

EXPIRED: Final = "its lease ended without a sign of life"
DIED: Final = "its process ended without closing the broker"
"""What is told about the end of a hand-over, where nobody else could."""
LARGE_BODY: Final = 65_536
"""Bytes; larger bodies are read one by one, smaller ones of a batch together."""
CLAIM_ROWS: Final = 1_000
"""So many messages are claimed in one commit at most: their bodies come out of SQLite as one value, which has its limit."""
CLAIM_BYTES: Final = 8 * 1024 * 1024
"""So many bytes of bodies are claimed in one commit at most, unless FEW_ROWS have more: others wait as long as they are read."""
FEW_ROWS: Final = 16
EARLY_ROWS: Final = 100
"""As many for whoever receives early, whose messages are in three places, and not looked at before."""
PURGE_ROWS: Final = 5_000
"""So many messages are purged in one commit, so that others wait milliseconds."""
COLUMNS: Final = 17
"""Values of one row of SQL["insert"]."""
INSERTS: Final = {
    rows: f"{SQL['insert']} {','.join(['(' + ','.join('?' * COLUMNS) + ')'] * rows)}" for rows in (100, 10, 1)
}
"""Rows at a time → the statement that inserts them."""
READY, DELAYED = 0, 2
"""Two of the states that statements.sql explains."""

_decode_headers: Final = msgspec.json.Decoder(dict[str, str]).decode


class _QueueRow(NamedTuple):
    id: int
    name: str
    ordered: int
    max_length: int | None
    lease_seconds: float
    owner: int | None
    topics: tuple[str, ...]


class Doubt(Exception):
    """A lease in a batch is lost, or a message cannot be stored: it is rolled back, and done again one operation after the other."""


class _TooMuch(Exception):
    """A claim has more bytes than one commit should read."""


class Claim(NamedTuple):
    """A claimed batch as it comes from SQLite; made into deliveries after the commit, when nobody waits for the write lock."""

    queue: str
    token: int
    rows: bytes
    bodies: bytes
    large: dict[int, bytes]

    def deliveries(self) -> list[Delivery]:
        """What the receiver gets."""
        try:
            rows = msgspec.json.decode(self.rows)
        except (msgspec.DecodeError, UnicodeDecodeError):  # another program put text there that is not UTF-8
            rows = msgspec.json.decode(self.rows.decode("utf-8", "replace"))
        made: list[Delivery] = []
        queue, token, bodies, large = self.queue, self.token, self.bodies, self.large
        offset, by_priority = 0, False
        for seq, deliveries, attempts, error, length, name, topic, key, headers, kind, *rest in rows:
            if length > LARGE_BODY:
                body = large[seq]
            else:
                body = bodies[offset : offset + length]
                offset += length
            message = Message(name, topic, body, key, _headers(headers), kind or JSON, *rest)
            by_priority = by_priority or message.priority != 0
            made.append(Delivery(message, queue, (seq, token), deliveries, attempts, error))
        if by_priority:
            made.sort(key=lambda each: -each.message.priority)
        return made


class Store:
    """The statements as one owner applies them. All but next_at is called inside a transaction, by one thread."""

    def __init__(self, file: QueueFile, owner: str, sockets: WakeSockets, clock: Clock) -> None:
        self.file = file
        self.touched: set[str] = set()
        """Queues in which this transaction made something ready, or may have."""
        self._owner = owner
        self._owner_id = 0
        self._sockets = sockets
        self._clock = clock
        self._now = 0.0
        """When this transaction began."""
        self._by_name: dict[str, _QueueRow] = {}
        self._by_topic: dict[str, list[_QueueRow]] = {}
        self._catalog = -1
        """The version of the two above."""
        self._unchecked: dict[int, int] = {}
        """Bounded queue → insertions since its length was last looked at."""

    def begin(self) -> None:
        """Start a write transaction; from here on nobody else writes."""
        self._db.execute("BEGIN IMMEDIATE")
        self._now = self._clock()
        self._read_catalog()

    def commit(self) -> None:
        """From here on all of it is durable, and seen by others."""
        self._db.execute("COMMIT")

    def roll_back(self) -> None:
        """Undo what is not committed; SQLite may have done so itself."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._catalog = -1
        self.touched.clear()

    def begin_part(self) -> None:
        """Start a part that can be undone alone."""
        self._db.execute("SAVEPOINT part")

    def end_part(self) -> None:
        """It stays, if the transaction does."""
        self._db.execute("RELEASE part")

    def undo_part(self) -> None:
        """It is as if it had only begun."""
        self._db.execute("ROLLBACK TO part")
        self._catalog = -1
        self._read_catalog()

    @property
    def _db(self) -> apsw.Connection:
        return self.file.db

    # Owners and queues

    def register(self) -> None:
        """Become known as alive: what needs an owner (a lease, a temporary queue, a subscription) has one from here on."""
        self._owner_id = 0
        for number, name in self.file.rows("SELECT id, socket FROM owner WHERE name = ?", self._owner):
            if name == self._sockets.name:
                self._owner_id = number
                return
            if self._sockets.is_alive(name):
                raise BrokerError(
                    f"the owner {self._owner!r} is in use by another living broker object on {self.file.path}"
                )
            self._forget(number, why=DIED, uncounted=False)
        self._db.execute("INSERT INTO owner (name, socket) VALUES (?, ?)", (self._owner, self._sockets.name))
        self._owner_id = self._db.last_insert_rowid()

    def sweep(self) -> None:
        """Look for owners that are dead: their leases, subscriptions and temporary queues end."""
        for number, name in self.file.rows("SELECT id, socket FROM owner"):
            if not self._sockets.is_alive(name):
                self._forget(number, why=DIED, uncounted=False)

    def _forget(self, number: int, *, why: str | None, uncounted: bool) -> int:
        """Give back what an owner holds, and forget it; returns how many messages came back."""
        self._db.execute(SQL["reclaim"], (number, self._now, why, int(uncounted)))
        if came_back := self._db.changes():
            self.touched.update(self._by_name)
        for [temporary] in self.file.rows("SELECT id FROM queue WHERE owner = ?", number):
            self._db.execute(SQL["remove_queue"], {"queue": temporary})
        self._db.execute("DELETE FROM subscription WHERE owner = ?", (number,))
        self._db.execute("DELETE FROM owner WHERE id = ?", (number,))
        self._changed()
        return came_back

    def reclaim(self, owner: str, why: str) -> int:
        """Give back what a dead owner held."""
        owners = self.file.rows("SELECT id FROM owner WHERE name = ?", owner)
        return sum(self._forget(number, why=_text(why), uncounted=False) for [number] in owners)

    def leave(self) -> None:
        """The end of this owner: what it still holds goes back uncounted."""
        number, self._owner_id = self._owner_id, 0
        self._forget(number, why=None, uncounted=True)

    def subscribe(self, queue: str) -> int:
        """Make a subscription known; returns its number."""
        row = self._declared(queue)
        self._db.execute("INSERT INTO subscription (owner, queue) VALUES (?, ?)", (self._owner_id, row.id))
        return self._db.last_insert_rowid()

    def _declared(self, queue: str) -> _QueueRow:
        row = self._by_name.get(queue)
        if row is None:
            raise BrokerError(f"there is no queue {queue!r} in {self.file.path}; declare it first")
        return row

    def unsubscribe(self, number: int) -> None:
        """A subscription is closed."""
        self._db.execute("DELETE FROM subscription WHERE id = ?", (number,))

    def _read_catalog(self) -> None:
        [[number]] = self.file.rows("SELECT value FROM meta WHERE name = 'catalog'")
        if number == self._catalog:
            return
        rows = [
            _QueueRow._make((*row, tuple(msgspec.json.decode(topics))))
            for *row, topics in self.file.rows(SQL["catalog"])
        ]
        self._by_name = {row.name: row for row in rows}
        self._by_topic = {}
        for row in rows:
            for topic in row.topics:
                self._by_topic.setdefault(topic, []).append(row)
        self._catalog = number
        if self._owner_id:  # somebody may have taken us for dead
            self.register()

    def _changed(self) -> None:
        self._db.execute("UPDATE meta SET value = value + 1 WHERE name = 'catalog'")
        self._read_catalog()

    def declare(self, wanted: Queue) -> None:
        """Make a queue exist as declared."""
        there = self._by_name.get(wanted.name)
        mine = self._owner_id if wanted.temporary else None
        if there is None:
            self._db.execute(
                "INSERT INTO queue (name, ordered, max_length, lease_seconds, owner) VALUES (?, ?, ?, ?, ?)",
                (wanted.name, int(wanted.ordered), wanted.max_length, wanted.lease_seconds, mine),
            )
            number = self._db.last_insert_rowid()
        else:
            number = there.id
            exists, asked = _nature(there.ordered, there.owner), _nature(wanted.ordered, mine)
            if exists != asked:
                raise QueueConflict(
                    f"the queue {wanted.name!r} exists as {exists}, and is declared as {asked}; rename it, or change one of the two"
                )
            if there.owner != mine:
                raise QueueConflict(
                    f"the temporary queue {wanted.name!r} belongs to another broker object; rename one of the two"
                )
            if (there.max_length is None) != (wanted.max_length is None):
                self._db.execute(SQL["set_bounded"], (number, int(wanted.max_length is not None)))
            self._db.execute(
                "UPDATE queue SET max_length = ?2, lease_seconds = ?3 WHERE id = ?1",
                (number, wanted.max_length, wanted.lease_seconds),
            )
        for topic in wanted.topics:
            self._db.execute("INSERT INTO binding VALUES (?, ?) ON CONFLICT DO NOTHING", (topic, number))
        self._changed()
        if wanted.max_length is not None:
            self._drop_oldest(self._by_name[wanted.name], wanted.max_length, wanted.max_length)

    # Messages

    def insert(self, messages: Iterable[Message], queue: str | None = None) -> list[str]:
        """Put messages into the queues of their topics, or into one alone; returns the ids of those that have none."""
        if queue is not None:
            only = (self._declared(queue),)
            self._insert((message, only) for message in messages)
            return []
        heard: list[tuple[Message, Sequence[_QueueRow]]] = []
        unheard: list[str] = []
        for message in messages:
            if (found := self._by_topic.get(message.topic)) is not None:
                heard.append((message, found))
            else:
                unheard.append(message.id)
        self._insert(heard)
        return unheard

    def _insert(self, messages: Iterable[tuple[Message, Sequence[_QueueRow]]]) -> None:
        now = self._now
        values: list[Any] = []
        queues: dict[int, _QueueRow] = {}
        for message, found in messages:
            due, key, kind = message.due, message.key, message.content_type
            headers = msgspec.json.encode(message.headers).decode() if message.headers else None
            for row in found:
                queues[row.id] = row
                values += (
                    row.id, DELAYED if due > now else READY, message.priority, max(now, due),
                    1 if row.ordered and key is not None else 0, 0 if row.max_length is None else 1,
                    message.id, message.topic, key, headers, None if kind == JSON else kind, message.correlation_id,
                    message.causation_id, message.created, due, message.expires, message.body
                )  # fmt: skip
        at, count = 0, len(values) // COLUMNS
        for rows, statement in INSERTS.items():
            while count - at >= rows:
                self._db.execute(statement, values[at * COLUMNS : (at + rows) * COLUMNS])
                at += rows
        last = self._db.last_insert_rowid()
        for row in queues.values():
            self.touched.add(row.name)
            if row.max_length is not None:
                self._drop_oldest(row, row.max_length, count)
        if any(row.ordered for row in queues.values()):
            self._db.execute(SQL["keep_order"], (last - count + 1, last))

    def _drop_oldest(self, row: _QueueRow, max_length: int, inserted: int) -> None:
        """Hold a queue to its bound. It is looked at once per hundredth of it: counting costs as much as the bound is long."""
        self._unchecked[row.id] = unchecked = self._unchecked.get(row.id, max_length) + inserted
        if unchecked * 100 < max_length:
            return
        self._unchecked[row.id] = 0
        self._db.execute(SQL["drop_oldest"], (row.id, max_length))
        if row.ordered and self._db.changes():
            self._db.execute(SQL["next_of_queue"], (row.id, self._now))

    def settle(self, settlements: Iterable[Settlement]) -> None:
        """End deliveries that are all held.

        Raises:
            Doubt: one of them is not; the transaction is to be rolled back.
        """
        ended: dict[int, list[int]] = {}
        back: list[tuple[object, ...]] = []
        dead: list[tuple[object, ...]] = []
        emits: list[Message] = []
        keys: list[tuple[int, str]] = []
        for settlement in settlements:
            delivery, verdict = settlement.delivery, settlement.verdict
            seq, token = cast("Receipt", delivery.receipt)
            if isinstance(verdict, Done):
                emits += verdict.emits
            elif isinstance(verdict, Dead):
                dead.append((seq, token, verdict.reason, _text(verdict.error), _text(verdict.traceback)))
            else:
                error = _text(verdict.error) if isinstance(verdict, RetryAt) else None
                back.append((seq, token, verdict.due, int(isinstance(verdict, RetryAt)), error))
                self.touched.add(delivery.queue)
                continue
            ended.setdefault(token, []).append(seq)
            row = self._by_name.get(delivery.queue)
            if row is not None and row.ordered and delivery.message.key is not None:
                keys.append((row.id, delivery.message.key))
                self.touched.add(row.name)
        if emits:
            self.insert(emits)
        for statement, rows in ((SQL["bury"], dead), (SQL["give_back"], back)):
            if rows:
                self._change(statement, (_json(rows), self._now), len(rows))
        for token, seqs in ended.items():
            self._change(SQL["end"], (_json(seqs), token), len(seqs))
        if keys:
            self._db.execute(SQL["next_of_keys"], (_json(keys), self._now))

    def _change(self, statement: str, values: tuple[object, ...], expected: int) -> None:
        self._db.execute(statement, cast("Any", values))
        if self._db.changes() != expected:
            raise Doubt

    def settle_with_care(self, settlements: Sequence[Settlement]) -> list[Delivery]:
        """End those deliveries that are still held, each once; returns the others."""
        held = self._held(each.delivery for each in settlements)
        mine: list[Settlement] = []
        lost: list[Delivery] = []
        for each in settlements:
            if each.delivery.receipt in held:
                held.remove(each.delivery.receipt)
                mine.append(each)
            else:
                lost.append(each.delivery)
        self.settle(mine)
        return lost

    def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Start the leases anew of those that are still held; returns the others."""
        held = self._held(deliveries)
        self._db.execute(SQL["extend"], (_json(list(held)), self._now))
        return [each for each in deliveries if each.receipt not in held]

    def _held(self, deliveries: Iterable[Delivery]) -> set[Receipt]:
        [[held]] = self.file.rows(SQL["held"], _json([each.receipt for each in deliveries]))
        return {(seq, token) for seq, token in msgspec.json.decode(held)}

    def next_at(self, queue: str, *, early: bool) -> float | None:
        """When there is something to claim, as far as is known: 0.0 is now. Needs no transaction."""
        row = self._by_name.get(queue)
        if row is None:
            return 0.0  # it is gone: let the claim tell
        [[at]] = self.file.rows(SQL["next_at_early" if early else "next_at"], row.id)
        return cast("float | None", at)

    def claim(self, queue: str, limit: int, *, early: bool) -> Claim | None:
        """Count and lease up to limit messages."""
        row = self._by_name.get(queue)
        if row is None:
            raise BrokerUnavailable(f"the queue {queue!r} is gone")
        limit = min(limit, CLAIM_ROWS)
        [[due, ended]] = self.file.rows(SQL["turned"], row.id, self._now)
        if due:
            self._db.execute(SQL["become_due"], (row.id, self._now, limit))
        if ended:
            self._db.execute(SQL["expire"], (row.id, self._now, limit, EXPIRED))
        if early:
            return self._lease(row, "claim_early", min(limit, EARLY_ROWS))
        if limit <= FEW_ROWS:
            return self._lease(row, "claim", limit)
        try:
            with self._db:
                claim = self._lease(row, "claim", limit, CLAIM_BYTES)
        except _TooMuch:  # to look at the sizes before costs every claim a tenth of its time
            [[fitting]] = self.file.rows(SQL["fitting"], row.id, limit, CLAIM_BYTES)
            claim = self._lease(row, "claim", max(FEW_ROWS, fitting))
        return claim

    def _lease(self, row: _QueueRow, how: str, limit: int, most: int | None = None) -> Claim | None:
        """Lease messages; _TooMuch where their bodies have more bytes than that."""
        until, token = self._now + row.lease_seconds, secrets.randbits(62)
        self._db.execute(SQL[how], (row.id, until, token, self._owner_id, limit))
        if not self._db.changes():
            return None
        [[rows, bodies, large]] = self.file.rows(SQL["claimed"], row.id, until, token, LARGE_BODY)
        left = msgspec.json.decode(large)
        if most is not None:
            more = self.file.rows(SQL["bytes"], large)[0][0] if left else 0
            if len(bodies or b"") + more > most:
                raise _TooMuch
        one_by_one = {seq: self.file.rows(SQL["body"], seq)[0][0] for seq in left}
        return Claim(row.name, token, rows, bodies or b"", one_by_one)

    def purge(self, queue: str) -> int:
        """Delete some of what waits in a queue; returns how many, 0 where nothing waits any more."""
        row = self._by_name.get(queue)
        if row is None:
            raise BrokerError(f"there is no queue {queue!r} in {self.file.path}")
        self._db.execute(SQL["purge"], (row.id, PURGE_ROWS))
        purged = self._db.changes()
        if purged and row.ordered:  # the next part may never come
            self._db.execute(SQL["next_of_queue"], (row.id, self._now))
        return purged

    def check_unused(self, queue: str, *, discard_dead: bool) -> None:
        """Raise QueueInUse where somebody receives from a queue, or it has dead letters that are to stay."""
        row = self._declared(queue)
        sockets = self.file.rows(SQL["receivers"], row.id)
        if consumers := sum(self._sockets.is_alive(name) for [name] in sockets):
            raise QueueInUse(queue, consumers=consumers)
        [[dead]] = self.file.rows("SELECT count(*) FROM dead_letter WHERE queue = ?", queue)
        if dead and not discard_dead:
            raise QueueInUse(queue, dead=dead)

    def remove(self, queue: str, *, discard_dead: bool) -> None:
        """A queue goes, with all that is in it."""
        self.check_unused(queue, discard_dead=discard_dead)
        self._db.execute("DELETE FROM dead_letter WHERE queue = ?", (queue,))
        self._db.execute(SQL["remove_queue"], {"queue": self._by_name[queue].id})
        self._changed()

    def bury(self, letters: Iterable[DeadLetter]) -> None:
        """Keep dead letters that came from elsewhere."""
        for each in letters:
            message = each.message
            headers = _json(message.headers) if message.headers else None
            kind = None if message.content_type == JSON else message.content_type
            self._db.execute(SQL["keep_dead"], (
                self._declared(each.queue).name, _text(each.reason), _text(each.error), _text(each.traceback), each.died,
                each.deliveries, each.attempts, message.id, message.topic, message.key, headers, kind, message.correlation_id,
                message.causation_id, message.created, message.due, message.expires, message.priority, message.body
            ))  # fmt: skip

    def redrive(self, letters: Iterable[DeadLetter]) -> int:
        """Put dead letters back into their queues, behind what is there."""
        positions = _json([int(each.position) for each in letters])
        there = [letter_of(row) for row in self.file.rows(SQL["letters"], positions) if row[1] in self._by_name]
        for each in there:
            self._insert([(redriven(each.message), (self._by_name[each.queue],))])
        return self.discard(there)

    def discard(self, letters: Iterable[DeadLetter]) -> int:
        """Delete dead letters."""
        positions = _json([int(each.position) for each in letters])
        self._db.execute("DELETE FROM dead_letter WHERE position IN (SELECT value FROM json_each(?))", (positions,))
        return self._db.changes()


def letter_of(row: tuple[Any, ...]) -> DeadLetter:
    """A row of SQL["letters"] or SQL["dead_letters"]."""
    position, queue, reason, error, trace, died, deliveries, attempts, body, name, topic, key, headers, kind, *rest = (
        row
    )
    message = Message(name, topic, body, key, _headers(headers), kind or JSON, *rest)
    return DeadLetter(
        position=f"{position:020d}", queue=queue, message=message, reason=reason, error=error, traceback=trace,
        deliveries=deliveries, attempts=attempts, died=died
    )  # fmt: skip  # the position sorts as text in the order of the numbers


def _headers(text: str | None) -> Mapping[str, str]:
    if text is None:
        return NO_HEADERS
    try:
        return _decode_headers(text)
    except msgspec.DecodeError:  # another program wrote it
        return {"unreadable-headers": text}


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _text(value: str) -> str:
    """Text as UTF-8 can hold it: an error's text may have come from anywhere."""
    return value.encode("utf-8", "replace").decode()


def _nature(ordered: object, owner: int | None) -> str:
    return f"{'lasting' if owner is None else 'temporary'} and {'ordered by key' if ordered else 'not ordered'}"
