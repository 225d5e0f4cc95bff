"""Messages on RabbitMQ, through the AMQP 0-9-1 client beside this file."""
