"""A channel: a conversation within a connection, with its requests, consumers and confirmed publishes."""

from __future__ import annotations

import asyncio
import functools
import itertools
import struct
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from pamqp import commands
from pamqp.base import Frame

from conveyor.brokers.rabbitmq.amqp.errors import (
    NO_CODE,
    AmqpError,
    ChannelClosed,
    Malformed,
    Nacked,
    OutcomeUnknown,
    Returned,
    again,
    fail,
)
from conveyor.brokers.rabbitmq.amqp.frames import (
    BODY,
    END,
    FRAME,
    FRAME_END,
    HEADER,
    METHOD,
    NO_PROPERTIES,
    Incoming,
    Properties,
    Table,
    decode_method,
    decode_text,
    encode_method,
    encode_text,
)

if TYPE_CHECKING:
    from conveyor.brokers.rabbitmq.amqp.connection import Connection

MAX_BODY_BYTES: Final = 512 * 1024 * 1024
"""A larger body is refused in both directions; no RabbitMQ can be set to carry more."""
MAX_ROUTES: Final = 1024
"""Publish methods that a channel keeps encoded, one for each exchange and routing key."""
MAX_CANCELLED: Final = 256
"""Consumers that are remembered after they were cancelled, for messages that were on their way to them."""
ANSWER_SECONDS: Final = 15.0
"""A server that takes longer to answer a method has lost it: RabbitMQ 3.10 answers some of those that reach a quorum queue in the
moment of its recovery only after a minute, and holds up their channel until then."""
CLOSE_SECONDS: Final = 5.0
"""How long an orderly close, of a channel or a connection, waits for the server; a socket is simply cut then."""

DELIVER: Final = commands.Basic.Deliver.index
ACK: Final = commands.Basic.Ack.index
NACK: Final = commands.Basic.Nack.index
BASIC: Final = commands.Basic.frame_id

_known_name: Final = functools.lru_cache(maxsize=1024)(decode_text)
"""Of an exchange, or a routing key: there are few."""

_METHOD: Final = struct.Struct(">I")
_DELIVERY: Final = struct.Struct(">QBB")  # delivery tag, redelivered, length of the exchange's name
_CONFIRM: Final = struct.Struct(">QB")  # delivery tag, bits
_SETTLE: Final = struct.Struct(">BHIIQBB")  # a whole ack or nack
_HEADER: Final = struct.Struct(">HHQ")  # class, weight, body size
_HEADER_FRAME: Final = struct.Struct(">BHIHHQ")
_BETWEEN: Final = struct.Struct(">BBHI")  # the end of one frame and the start of the next


class QueueOk(NamedTuple):
    """A declared queue: its name, the messages that are ready in it, and its consumers."""

    name: str
    messages: int
    consumers: int


class _Consumer(NamedTuple):
    tag: str
    on_delivery: Callable[[Incoming], None]
    on_cancel: Callable[[str], None] | None


class _Request(NamedTuple):
    replies: tuple[type[Frame], ...]
    consumer_tag: str | None
    future: asyncio.Future[Any]


class _Publish(NamedTuple):
    future: asyncio.Future[None]
    exchange: str
    routing_key: str
    raw_properties: bytes


_Reply = TypeVar("_Reply", bound=Frame)
_Answer = TypeVar("_Answer")


def _ignore(_message: Incoming) -> None:
    """Where messages go that arrive on a channel that is being closed; the server takes them back."""


class Channel:
    """A conversation within a connection; `Connection.channel` opens it.

    Requests may be sent without waiting for each other; the server answers them in order. Whoever stops waiting for one
    has not taken it back. All of them raise ChannelClosed with the server's words if it refuses, and the channel is gone
    then, or ConnectionClosed.

    Parameters:
        number: its number on the connection.
        closed: done when the channel is gone; its result is the reason.
    """

    def __init__(self, connection: Connection, number: int, *, patient: bool = False) -> None:
        loop = asyncio.get_running_loop()
        self._answer_seconds = None if patient else ANSWER_SECONDS
        self.number = number
        self.connection = connection
        self.closed: asyncio.Future[AmqpError] = loop.create_future()
        self._loop = loop
        self._closing = False
        # Finished, though its number may still be taken: what arrives meanwhile is read over.
        self._gone = False
        self._flowing = True
        self._requests: deque[_Request] = deque()
        # The last `get` whose message began to arrive.
        self._getting: asyncio.Future[Any] | None = None
        self._consumers: dict[bytes, _Consumer] = {}
        self._cancelled: OrderedDict[bytes, _Consumer] = OrderedDict()
        self._tags = itertools.count(1)
        self._routes: dict[tuple[str, str, bool], bytes] = {}
        # The next publish's number for its confirm; 0 until confirms are on.
        self._next_publish = 0
        self._unconfirmed: dict[int, _Publish] = {}
        self._returned: dict[int, Returned] = {}
        self._last_returned = 0
        # The message whose frames are arriving, what is to be done with it, and what is missing (None: its header).
        self._message: Incoming | None = None
        self._sink: Callable[[Incoming], None] = _ignore
        self._missing: int | None = None
        self._chunks: list[bytes] = []

    # Exchanges and queues

    async def exchange_declare(
        self,
        exchange: str,
        kind: str = "topic",
        *,
        passive: bool = False,
        durable: bool = True,
        auto_delete: bool = False,
        internal: bool = False,
        arguments: Table | None = None,
    ) -> None:
        """Create an exchange, or make sure that it exists like this; passive only asks whether it exists at all."""
        await self.request(
            commands.Exchange.Declare,
            commands.Exchange.DeclareOk,
            exchange=exchange,
            exchange_type=kind,
            passive=passive,
            durable=durable,
            auto_delete=auto_delete,
            internal=internal,
            arguments=arguments or {},
        )

    async def exchange_delete(self, exchange: str, *, if_unused: bool = False) -> None:
        fields = {"exchange": exchange, "if_unused": if_unused}
        await self.request(commands.Exchange.Delete, commands.Exchange.DeleteOk, **fields)

    async def exchange_bind(
        self, destination: str, source: str, routing_key: str = "", arguments: Table | None = None
    ) -> None:
        """Let messages of one exchange into another; RabbitMQ's extension."""
        fields = {
            "destination": destination,
            "source": source,
            "routing_key": routing_key,
            "arguments": arguments or {},
        }
        await self.request(commands.Exchange.Bind, commands.Exchange.BindOk, **fields)

    async def exchange_unbind(
        self, destination: str, source: str, routing_key: str = "", arguments: Table | None = None
    ) -> None:
        fields = {
            "destination": destination,
            "source": source,
            "routing_key": routing_key,
            "arguments": arguments or {},
        }
        await self.request(commands.Exchange.Unbind, commands.Exchange.UnbindOk, **fields)

    async def queue_declare(
        self,
        queue: str = "",
        *,
        passive: bool = False,
        durable: bool = True,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: Table | None = None,
    ) -> QueueOk:
        """Create a queue, or make sure that it exists like this; passive only asks whether it exists at all.

        Parameters:
            queue: its name; if empty, the server invents one.
        """
        declared = await self.request(
            commands.Queue.Declare,
            commands.Queue.DeclareOk,
            queue=queue,
            passive=passive,
            durable=durable,
            exclusive=exclusive,
            auto_delete=auto_delete,
            arguments=arguments or {},
        )
        return QueueOk(declared.queue or queue, declared.message_count or 0, declared.consumer_count or 0)

    async def queue_bind(
        self, queue: str, exchange: str, routing_key: str = "", arguments: Table | None = None
    ) -> None:
        fields = {"queue": queue, "exchange": exchange, "routing_key": routing_key, "arguments": arguments or {}}
        await self.request(commands.Queue.Bind, commands.Queue.BindOk, **fields)

    async def queue_unbind(
        self, queue: str, exchange: str, routing_key: str = "", arguments: Table | None = None
    ) -> None:
        fields = {"queue": queue, "exchange": exchange, "routing_key": routing_key, "arguments": arguments or {}}
        await self.request(commands.Queue.Unbind, commands.Queue.UnbindOk, **fields)

    async def queue_delete(self, queue: str, *, if_unused: bool = False, if_empty: bool = False) -> int:
        """Delete a queue; how many messages went with it."""
        fields = {"queue": queue, "if_unused": if_unused, "if_empty": if_empty}
        deleted = await self.request(commands.Queue.Delete, commands.Queue.DeleteOk, **fields)
        return deleted.message_count or 0

    async def queue_purge(self, queue: str) -> int:
        """Empty a queue of what is ready in it; how many messages that were."""
        purged = await self.request(commands.Queue.Purge, commands.Queue.PurgeOk, queue=queue)
        return purged.message_count or 0

    # Consuming

    async def qos(self, prefetch: int, *, whole_channel: bool = False) -> None:
        """Bound the unsettled deliveries; 0 is no bound.

        Parameters:
            whole_channel: the bound is for all consumers of the channel together, not for each that starts from now on
                (quorum queues refuse that).
        """
        fields = {"prefetch_count": prefetch, "global_": whole_channel}
        await self.request(commands.Basic.Qos, commands.Basic.QosOk, **fields)

    async def consume(
        self,
        queue: str,
        on_delivery: Callable[[Incoming], None],
        *,
        tag: str = "",
        no_ack: bool = False,
        exclusive: bool = False,
        arguments: Table | None = None,
        on_cancel: Callable[[str], None] | None = None,
    ) -> str:
        """Have a queue's messages delivered; the consumer's tag.

        Parameters:
            on_delivery: called for each message as its last byte arrives; it must not block.
            tag: the consumer's name on this channel; one is made up if it is empty.
            on_cancel: called with the tag when the server ends the consumer by itself, as when the queue is deleted.
        """
        tag = tag or f"c{self.number}.{next(self._tags)}"
        self.check()
        self._consumers[encode_text(tag)] = _Consumer(tag, on_delivery, on_cancel)
        await self.request(
            commands.Basic.Consume,
            commands.Basic.ConsumeOk,
            queue=queue,
            consumer_tag=tag,
            no_ack=no_ack,
            exclusive=exclusive,
            arguments=arguments or {},
        )
        return tag

    async def cancel(self, tag: str) -> None:
        """End a consumer; what it was delivered stays its channel's to settle, and what is on its way may still arrive."""
        await self.request(commands.Basic.Cancel, commands.Basic.CancelOk, consumer_tag=tag)

    async def get(self, queue: str, *, no_ack: bool = False) -> Incoming | None:
        """The next message of a queue; None if it has none ready. If nobody waits for it any more, its channel keeps it."""
        replies = (commands.Basic.GetOk, commands.Basic.GetEmpty)
        self.check()
        future: asyncio.Future[Incoming | None] = self._loop.create_future()
        frame = encode_method(commands.Basic.Get, self.number, queue=queue, no_ack=no_ack)
        self._requests.append(_Request(replies, None, future))
        self.connection.send(frame)
        return await self._answer("Basic.Get", future)

    def ack(self, delivery_tag: int, *, multiple: bool = False) -> None:
        """Settle a delivery as done; multiple settles all before it as well. Sent with this tick, never confirmed."""
        self._settle(ACK, delivery_tag, multiple)

    def nack(self, delivery_tag: int, *, multiple: bool = False, requeue: bool = True) -> None:
        """Give a delivery back to its queue, or else drop it (into the queue's dead-letter exchange)."""
        self._settle(NACK, delivery_tag, multiple | requeue << 1)

    def reject(self, delivery_tag: int, *, requeue: bool = True) -> None:
        """As nack of one delivery; some servers count the two differently."""
        self.check()
        fields = {"delivery_tag": delivery_tag, "requeue": requeue}
        self.connection.send(encode_method(commands.Basic.Reject, self.number, **fields))

    async def recover(self, *, requeue: bool = True) -> None:
        """Give back all unsettled deliveries of the channel."""
        await self.request(commands.Basic.Recover, commands.Basic.RecoverOk, requeue=requeue)

    def _settle(self, method: int, delivery_tag: int, bits: int) -> None:
        if self._closing or self._gone or self.connection.closing:
            self.check()
        frame = _SETTLE.pack(METHOD, self.number, 13, method, delivery_tag, bits, FRAME_END)
        self.connection.send(frame)

    # Publishing

    @property
    def unconfirmed(self) -> int:
        """How many publishes await their confirm."""
        return len(self._unconfirmed)

    async def confirm_select(self) -> None:
        """Have the server confirm every publish from now on."""
        if self._next_publish == 0:
            self.check()
            self._next_publish = 1  # what is published before the answer comes is confirmed as well
            await self.request(commands.Confirm.Select, commands.Confirm.SelectOk)

    def publish(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        properties: Properties | bytes = NO_PROPERTIES,
        *,
        mandatory: bool = False,
    ) -> asyncio.Future[None]:
        """Publish a message; a future that is done when the server has confirmed it, and fails otherwise.

        Sent with this tick. `drain` before it keeps what waits to be sent within bounds. Without confirm_select nothing is
        known of the outcome, and the future is done at once. The future fails with Returned, Nacked or OutcomeUnknown.

        Parameters:
            properties: encoded already, or to be encoded.
            mandatory: a message that no queue takes is returned, and its future fails; needs confirms. A return says not
                which publish it answers: several of the same exchange, routing key and properties are answered in order.

        Raises:
            ChannelClosed, ConnectionClosed: it is not sent.
            ValueError: AMQP cannot carry it.
        """
        if self._closing or self._gone or self.connection.closing:
            self.check()
        raw = properties if isinstance(properties, bytes) else properties.encode()
        size = len(body)
        limit = self.connection.max_payload
        if len(raw) + 12 > limit or size > MAX_BODY_BYTES:
            raise ValueError(
                f"properties of {len(raw)} bytes and a body of {size}; AMQP carries {limit - 12} and {MAX_BODY_BYTES}"
            )
        method = self._routes.get((exchange, routing_key, mandatory)) or self._route(exchange, routing_key, mandatory)
        number = self.number
        head = _HEADER_FRAME.pack(HEADER, number, 12 + len(raw), BASIC, 0, size)
        if 0 < size <= limit:
            self.connection.send(method, head, raw, _BETWEEN.pack(FRAME_END, BODY, number, size), body, END)
        else:
            self.connection.send(method, head, raw, END, *self._split(body, limit))
        future: asyncio.Future[None] = self._loop.create_future()
        if self._next_publish:
            self._unconfirmed[self._next_publish] = _Publish(future, exchange, routing_key, raw)
            self._next_publish += 1
        else:
            future.set_result(None)
        return future

    @property
    def congested(self) -> bool:
        """Publishing is not welcome now: the socket is full, or the server asked for a pause."""
        return self.connection.congested or not self._flowing

    async def drain(self) -> None:
        """Wait until publishing is welcome: the socket takes bytes, and the server asked for no pause.

        Raises:
            ChannelClosed, ConnectionClosed: it never will be.
        """
        self.check()
        while self.congested:
            await self.connection.changed()
            self.check()

    def _route(self, exchange: str, routing_key: str, mandatory: bool) -> bytes:
        if mandatory and not self._next_publish:
            raise ValueError("mandatory needs confirm_select: nobody would hear of a return")
        fields = {"exchange": exchange, "routing_key": routing_key, "mandatory": mandatory}
        method = encode_method(commands.Basic.Publish, self.number, **fields)
        if len(self._routes) >= MAX_ROUTES:
            self._routes.clear()
        self._routes[exchange, routing_key, mandatory] = method
        return method

    def _split(self, body: bytes, limit: int) -> Iterator[bytes]:
        for start in range(0, len(body), limit):
            chunk = body[start : start + limit]
            yield FRAME.pack(BODY, self.number, len(chunk))
            yield chunk
            yield END

    # Requests and the end

    def check(self) -> None:
        """Raise what ended the channel, if anything did."""
        if self.closed.done():
            raise again(self.closed.result())
        self.connection.check()
        if self._closing:
            raise ChannelClosed(200, "closed by this client")

    async def request(self, method: type[Frame], reply: type[_Reply], **fields: Any) -> _Reply:
        """Send a method and wait for its reply; where none comes, the connection is given up."""
        self.check()
        future: asyncio.Future[_Reply] = self._loop.create_future()
        frame = encode_method(method, self.number, **fields)
        self._requests.append(_Request((reply,), fields.get("consumer_tag"), future))
        self.connection.send(frame)
        return await self._answer(method.name, future)

    async def _answer(self, name: str, future: asyncio.Future[_Answer]) -> _Answer:
        while not (await asyncio.wait([future], timeout=self._answer_seconds))[0]:
            if self.connection.blocked is None:  # else the server has said that it does not listen now
                self.connection.give_up(f"the server did not answer {name} within {ANSWER_SECONDS:g} s")
        return future.result()

    async def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Take leave of the server, which takes back what was not settled. A channel that is gone already is fine."""
        self.begin_close()
        try:
            async with asyncio.timeout(timeout_seconds):
                await asyncio.shield(self.closed)
        except TimeoutError:
            # The number stays taken: only the server's answer frees it.
            self.finish(ChannelClosed(NO_CODE, f"the server did not answer the close within {timeout_seconds:g} s"))

    def begin_close(self) -> None:
        """Ask the server to close the channel; what it still confirms until then counts."""
        if not self._closing and not self.closed.done() and not self.connection.closing:
            self._closing = True
            self.ignore_deliveries()
            fields = {"reply_code": 200, "reply_text": "goodbye", "class_id": 0, "method_id": 0}
            self.connection.send(encode_method(commands.Channel.Close, self.number, **fields))

    def ignore_deliveries(self) -> None:
        """From now on, messages that are delivered are the server's to take back."""
        self._consumers.clear()
        self._cancelled.clear()

    def finish(self, reason: AmqpError) -> None:
        """Every promise that this channel made is settled with the reason why it ended."""
        if self.closed.done():
            return
        self.closed.set_result(reason)
        self._gone = True
        self._consumers.clear()
        self._cancelled.clear()
        self._message = None
        self._chunks.clear()
        for asked in self._requests:
            fail(asked.future, again(reason))
        self._requests.clear()
        if self._getting is not None:
            fail(self._getting, again(reason))
        for number, publish in self._unconfirmed.items():
            unknown = OutcomeUnknown(f"no confirm came: {reason}")
            unknown.__cause__ = reason
            fail(publish.future, self._returned.get(number, unknown))
        self._unconfirmed.clear()
        self._returned.clear()
        self.connection.wake()

    # What the server sends

    def on_frame(self, kind: int, data: bytes, start: int, stop: int) -> int:
        """A frame for this channel, as a part of what was read; where the next frame begins that was not handled with it."""
        if self._gone and kind != METHOD:
            return stop + 1
        if kind == METHOD:
            (method,) = _METHOD.unpack_from(data, start)
            if method == DELIVER:
                return self.on_deliver(data, start + 4, stop)
            if method == ACK or method == NACK:  # noqa: PLR1714, SIM109 - quicker than a set
                number, bits = _CONFIRM.unpack_from(data, start + 4)
                self.on_confirm(number, bool(bits & 1), method == NACK)
            else:
                self.on_method(decode_method(data[start:stop]))
        elif kind == HEADER:
            self.on_header(data, start, stop)
        elif kind == BODY:
            self.on_body(data[start:stop])
        else:
            raise Malformed(f"a frame of type {kind} on channel {self.number}")
        return stop + 1

    def on_method(self, frame: Frame) -> None:
        """Any method but those of the hot path."""
        match frame:
            case commands.Channel.Close():
                self.connection.send(encode_method(commands.Channel.CloseOk, self.number))
                self.finish(ChannelClosed(frame.reply_code or NO_CODE, frame.reply_text))
                if not self._closing:  # else both closed at once, and the answer to ours is still to come
                    self.connection.forget(self.number)
            case commands.Channel.CloseOk() if self._closing:
                self.finish(ChannelClosed(200, "closed by this client"))
                self.connection.forget(self.number)
            case _ if self._gone:
                pass
            case commands.Basic.Return():
                message = Incoming(frame.exchange or "", frame.routing_key or "")
                code, text = frame.reply_code or NO_CODE, frame.reply_text or ""
                self._expect(message, lambda message: self._on_return(Returned(code, text, message)))
            case commands.Basic.Cancel():
                consumer = self._end_consumer(encode_text(frame.consumer_tag or ""))
                if consumer is not None and consumer.on_cancel is not None:
                    self.connection.call(consumer.on_cancel, consumer.tag)
            case commands.Channel.Flow():
                self._flowing = bool(frame.active)
                self.connection.send(encode_method(commands.Channel.FlowOk, self.number, active=self._flowing))
                self.connection.wake()
            case _:
                self._on_reply(frame)

    def _on_reply(self, frame: Frame) -> None:
        future = self._asked_for(frame)
        if isinstance(frame, commands.Basic.GetOk):
            message = Incoming(
                frame.exchange or "", frame.routing_key or "", frame.delivery_tag or 0, bool(frame.redelivered)
            )
            self._getting = future
            self._expect(message, lambda message: None if future.done() else future.set_result(message))
            return
        if isinstance(frame, commands.Basic.CancelOk):
            self._end_consumer(encode_text(frame.consumer_tag or ""))
        if not future.done():
            future.set_result(None if isinstance(frame, commands.Basic.GetEmpty) else frame)

    def _asked_for(self, frame: Frame) -> asyncio.Future[Any]:
        """The request that a reply answers: the oldest of its kind, and of its consumer where it names one. Others may be
        overtaken, since RabbitMQ lets the queues themselves answer consume and cancel.
        """
        tag = getattr(frame, "consumer_tag", None)
        for position, asked in enumerate(self._requests):
            if isinstance(frame, asked.replies) and asked.consumer_tag == tag:
                del self._requests[position]
                return asked.future
        raise Malformed(f"{frame.name} on channel {self.number}, where nobody asked for it")

    def _end_consumer(self, tag: bytes) -> _Consumer | None:
        """A consumer is cancelled. A quorum queue may have sent it messages that arrive only now, so it is still listened to."""
        consumer = self._consumers.pop(tag, None)
        if consumer is not None:
            self._cancelled[tag] = consumer
            if len(self._cancelled) > MAX_CANCELLED:
                self._cancelled.popitem(last=False)
        return consumer

    def on_deliver(self, data: bytes, position: int, stop: int) -> int:
        """basic.deliver: consumer tag, delivery tag, redelivered, exchange, routing key; returns what on_frame() returns."""
        if self._gone:
            return stop + 1
        start = position + 1
        position = start + data[position]
        tag = data[start:position]
        consumer = self._consumers.get(tag) or self._cancelled.get(tag)
        delivery_tag, redelivered, size = _DELIVERY.unpack_from(data, position)
        start = position + 10
        position = start + size
        exchange = _known_name(data[start:position])
        start = position + 1
        if start + data[position] != stop:
            raise Malformed("a delivery shorter or longer than announced")
        routing_key = _known_name(data[start:stop])
        if consumer is not None:
            message = Incoming(exchange, routing_key, delivery_tag, redelivered != 0, consumer.tag)
            if behind := self._filled(message, data, stop + 1):
                self.connection.call(consumer.on_delivery, message)
                return behind
            self._expect(message, consumer.on_delivery)
        elif self._closing or self.connection.closing:
            self._expect(Incoming(exchange, routing_key), _ignore)
        else:
            raise Malformed(f"a delivery for the unknown consumer {tag!r}")
        return stop + 1

    def _filled(self, message: Incoming, data: bytes, position: int) -> int:
        """Give a message its properties and body, where each follows at once and in one frame, as they mostly do.

        Returns:
            Where the next frame begins; 0 where it is otherwise, or wrong: the frames are handled one by one then.
        """
        last, most = len(data) - 1, self.connection.max_payload
        if position + 19 > last or self._message is not None:
            return 0
        kind, number, size, content, _, body_size = _HEADER_FRAME.unpack_from(data, position)
        stop = position + 7 + size
        if kind != HEADER or number != self.number or not 14 <= size <= most or content != BASIC or stop + 8 > last:
            return 0
        end, kind, number, size = _BETWEEN.unpack_from(data, stop)
        start = stop + 8
        behind: int = start + size
        if (
            (end, kind, number, size) != (FRAME_END, BODY, self.number, body_size)
            or behind > last
            or data[behind] != FRAME_END
            or not 0 < size <= most
        ):
            return 0
        message.raw_properties = data[position + 19 : stop]
        message.body = data[start:behind]
        return behind + 1

    def _expect(self, message: Incoming, sink: Callable[[Incoming], None]) -> None:
        if self._message is not None:
            raise Malformed("a message within a message")
        self._message = message
        self._sink = sink
        self._missing = None

    def on_header(self, data: bytes, start: int, stop: int) -> None:
        """The content header: the properties, and how many bytes of body follow."""
        message = self._message
        if message is None or self._missing is not None:
            raise Malformed("a content header without its method")
        kind, _, size = _HEADER.unpack_from(data, start)
        if kind != BASIC or size > MAX_BODY_BYTES or stop - start < 14:
            raise Malformed(f"a content header of class {kind} for a body of {size} bytes")
        message.raw_properties = data[start + 12 : stop]
        self._missing = size
        if size == 0:
            self._arrived(message)

    def on_body(self, chunk: bytes) -> None:
        """A piece of a body, or all of it."""
        message, missing = self._message, self._missing
        if message is None or missing is None:
            raise Malformed("a body without its header")
        left = missing - len(chunk)
        if left < 0:
            raise Malformed("a body longer than announced")
        if left == 0 and not self._chunks:
            message.body = chunk
            self._arrived(message)
            return
        if not chunk:
            raise Malformed("a body frame without a body")
        self._chunks.append(chunk)
        self._missing = left
        if left == 0:
            message.body = b"".join(self._chunks)
            self._chunks.clear()
            self._arrived(message)

    def _arrived(self, message: Incoming) -> None:
        self._message = None
        self.connection.call(self._sink, message)

    def _on_return(self, returned: Returned) -> None:
        """Which publish came back: returns come in the order of the publishes, and before their confirms."""
        message = returned.message
        found = 0
        for number in range(max(self._last_returned + 1, next(iter(self._unconfirmed), 0)), self._next_publish):
            publish = self._unconfirmed.get(number)
            if publish is None or (publish.exchange, publish.routing_key) != (message.exchange, message.routing_key):
                continue
            found = found or number  # unless another has the very properties, which a server may have changed (BCC)
            if publish.raw_properties == message.raw_properties:
                found = number
                break
        if not found:
            raise Malformed(f"it returned a message that was not published: {message!r}")
        self._last_returned = found
        self._returned[found] = returned

    def on_confirm(self, number: int, multiple: bool, nacked: bool) -> None:
        """basic.ack and basic.nack from the server: it took one publish, or all up to one, or could not."""
        if self._gone:
            return
        if number >= self._next_publish:
            raise Malformed(f"a confirm of the publish {number}, which was never sent")
        if not multiple:
            publish = self._unconfirmed.pop(number, None)
            if publish is None:
                raise Malformed(f"a confirm of the publish {number}, which awaits none")
            self._resolve(number, publish, nacked)
            return
        while self._unconfirmed and (first := next(iter(self._unconfirmed))) <= (number or first):
            self._resolve(first, self._unconfirmed.pop(first), nacked)

    def _resolve(self, number: int, publish: _Publish, nacked: bool) -> None:
        future = publish.future
        if self._returned and (returned := self._returned.pop(number, None)) is not None:
            fail(future, returned)
        elif nacked:
            fail(
                future,
                Nacked(f"the server could not take it (exchange {publish.exchange!r}, key {publish.routing_key!r})"),
            )
        elif not future.done():
            future.set_result(None)
