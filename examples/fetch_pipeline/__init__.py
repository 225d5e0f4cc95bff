"""A job that passes from worker to worker through the queues of RabbitMQ."""
