"""A consumer beside services written in other languages: it fulfils orders that a payment service puts on RabbitMQ (see README.md)."""
