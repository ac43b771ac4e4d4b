"""Many WhatsApp Web sessions as one service on RabbitMQ."""

__version__ = "0.1.0"
