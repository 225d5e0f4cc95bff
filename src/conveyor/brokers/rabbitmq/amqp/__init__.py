"""A lean AMQP 0-9-1 client for asyncio: connections, channels, consumers and confirmed publishing.

It stands alone: it reconnects nothing and retries nothing, but tells the truth about what happened. What travels for every
message (deliver, header, body, publish, ack, confirm) is read and built here; all other methods are pamqp's frames.

connection.py talks to one server, channel.py is a conversation within it, frames.py knows the bytes, errors.py what is raised.

What bounds the memory: deliveries by `Channel.qos`, one message by MAX_BODY_BYTES, one frame by the negotiated size (a content
header by MAX_HEADER_BYTES), what waits to be sent by `Channel.drain`, replies by the requests under way, confirms and returns by
the unconfirmed publishes.

AmqpError
├── ConnectionFailed    no host let this client in
├── ConnectionClosed    the connection is gone
├── ChannelClosed       the channel is gone; its connection still works
├── Returned            the publish reached no queue
├── Nacked              the server could not take the publish
├── OutcomeUnknown      the connection or channel went before the confirm came
└── Malformed           properties or bytes that break the protocol
"""

from conveyor.brokers.rabbitmq.amqp.channel import Channel, QueueOk
from conveyor.brokers.rabbitmq.amqp.connection import Address, Connection, connect
from conveyor.brokers.rabbitmq.amqp.errors import (
    AmqpError,
    ChannelClosed,
    ConnectionClosed,
    ConnectionFailed,
    Malformed,
    Nacked,
    OutcomeUnknown,
    Returned,
)
from conveyor.brokers.rabbitmq.amqp.frames import FieldValue, Incoming, Properties, Table

__all__ = [
    "Address",
    "AmqpError",
    "Channel",
    "ChannelClosed",
    "Connection",
    "ConnectionClosed",
    "ConnectionFailed",
    "FieldValue",
    "Incoming",
    "Malformed",
    "Nacked",
    "OutcomeUnknown",
    "Properties",
    "QueueOk",
    "Returned",
    "Table",
    "connect",
]
