"""What the journals of many processes tell their keeper, as it travels: packed on one side, read on the other."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, Final, NamedTuple

import msgspec

from conveyor.core.journal import Batch, Entry, Successes, Told
from conveyor.core.settle import describe
from conveyor.core.words import counted

log = logging.getLogger("conveyor.keeper")

LARGEST_BATCH: Final = 2_000
"""Entries in one message at most; of one Alike, not more than 65,535."""
LARGEST_BATCH_BYTES: Final = 256 * 1024
"""Bytes of results and tracebacks after which a batch is full."""

Row = tuple[Any, ...]
"""The fields of an entry, as far as the last one that is not at its default; or what is one success's own, see OWN."""
_encode: Final = msgspec.msgpack.Encoder().encode
_write: Final = msgspec.msgpack.Encoder().encode_into
_batch: Final = msgspec.msgpack.Decoder(Batch[Entry]).decode
_parts: Final = msgspec.msgpack.Decoder(list[list[msgspec.Raw]]).decode
_entry: Final[Callable[[msgspec.Raw], Told]] = msgspec.msgpack.Decoder(Entry).decode
_successes: Final[Callable[[msgspec.Raw], Told]] = msgspec.msgpack.Decoder(Successes).decode


class Alike:
    """Successes that have all but OWN in common, written down as they came.

    Parameters:
        topic, worker, process, queue, attempt, crashes: of them all.

    Raises:
        Exception: these cannot be encoded.
    """

    __slots__ = ("_begin", "number", "rows")

    def __init__(self, topic: str, worker: str, process: str, queue: str, attempt: int, crashes: int) -> None:
        self.number = 0
        self.rows = bytearray()
        empty = _encode((topic, worker, process, queue, attempt, crashes, ()))
        self._begin = empty[:-1]  # without the array at the end

    def packed(self) -> msgspec.Raw:
        """Successes, as they travel."""
        array = b"\xdc" + self.number.to_bytes(2, "big")  # MessagePack's "array 16"
        return msgspec.Raw(b"".join((self._begin, array, self.rows)))


class Gathered:
    """The successes of a process until they are shipped.

    Each is written down as it comes: what is kept of thousands of messages until then makes all else slower that takes memory
    meanwhile, by more than the writing costs.

    Parameters:
        process: where they were.
    """

    def __init__(self, process: str) -> None:
        self._process = process
        self._open: dict[tuple[str, str, str, int, int], Alike] = {}
        self._full: list[Alike] = []

    def add(self, topic: str, worker: str, queue: str, attempt: int, crashes: int, row: Row) -> None:
        """One more.

        Raises:
            Exception: it cannot be encoded.
        """
        of = topic, worker, queue, attempt, crashes
        alike = self._open.get(of)
        if alike is None:
            alike = self._open[of] = Alike(topic, worker, self._process, queue, attempt, crashes)
        rows = alike.rows
        start = len(rows)
        try:
            _write(row, rows, -1)
        except Exception:
            del rows[start:]
            raise
        alike.number += 1
        if alike.number >= LARGEST_BATCH:
            self._full.append(self._open.pop(of))

    def take(self) -> list[Alike]:
        """All of them, to be shipped."""
        taken = self._full + [alike for alike in self._open.values() if alike.number]
        self._open, self._full = {}, []
        return taken


class Packed(NamedTuple):
    """A batch as it travels.

    Parameters:
        number: entries in it.
        unfit: entries that could not be encoded, and are not in it.
    """

    body: bytes
    number: int
    unfit: int


def packed(entries: Sequence[Entry | Row], successes: Iterable[Alike], *, heavy: bool) -> Iterator[Packed]:
    """Batches that a broker can carry.

    Parameters:
        heavy: some of the entries have a weight.
    """
    for batch in zip_longest(_portions(entries, heavy=heavy), _shared_out(successes), fillvalue=()):
        yield _encoded(*batch)


def weight(entry: Entry | Row) -> int:
    """How many bytes of results and tracebacks are in an entry."""
    return 0 if isinstance(entry, tuple) else len(entry.traceback) + (0 if entry.result is None else len(entry.result))


def _portions(entries: Sequence[Entry | Row], *, heavy: bool) -> Iterator[Sequence[Entry | Row]]:
    if not heavy:
        yield from (entries[start : start + LARGEST_BATCH] for start in range(0, len(entries), LARGEST_BATCH))
        return
    batch: list[Entry | Row] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += weight(entry)
        if len(batch) == LARGEST_BATCH or size >= LARGEST_BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _shared_out(successes: Iterable[Alike]) -> Iterator[Sequence[Alike]]:
    portion: list[Alike] = []
    room = LARGEST_BATCH
    for alike in successes:
        if alike.number > room:
            yield portion
            portion, room = [], LARGEST_BATCH
        portion.append(alike)
        room -= alike.number
    if portion:
        yield portion


def _encoded(entries: Sequence[Entry | Row], successes: Sequence[Alike]) -> Packed:
    """A batch without what cannot travel."""
    number, shared = sum(alike.number for alike in successes), [alike.packed() for alike in successes]
    try:
        return Packed(_encode((entries, shared)), len(entries) + number, 0)
    except Exception:  # whatever one of them holds, the others are told
        fit = [msgspec.Raw(body) for body in map(_alone, entries) if body is not None]
        return Packed(_encode((fit, shared)), len(fit) + number, len(entries) - len(fit))


def _alone(entry: Entry | Row) -> bytes | None:
    """An entry as it travels; None where it cannot."""
    try:
        try:
            return _encode(entry)
        except UnicodeEncodeError:  # an error's text may hold half characters, which no store can keep
            return _encode(_clean(entry))
    except Exception:
        return None


def _clean(entry: Entry | Row) -> Entry:
    if isinstance(entry, tuple):
        entry = Entry(*entry)
    texts = {name: getattr(entry, name) for name in entry.__struct_fields__}
    clean = {name: text.encode("utf-8", "replace").decode() for name, text in texts.items() if type(text) is str}
    return msgspec.structs.replace(entry, **clean)


def told_by(body: bytes) -> list[Told]:
    """What is in a batch, without what cannot be read.

    Raises:
        ValueError: it makes no sense at all.
    """
    try:
        return _batch(body).told()
    except (ValueError, msgspec.MsgspecError) as error:
        problem, parts = error, _parts(body)
    told: list[Told] = []
    for decode, some in zip((_entry, _successes), parts, strict=False):
        for part in some:
            with contextlib.suppress(ValueError, msgspec.MsgspecError):
                told.append(decode(part))
    left_out = counted(sum(map(len, parts)) - len(told), "part")
    log.error("left %s of a batch out of the journal, of which nobody can make sense: %s", left_out, describe(problem))
    return told
