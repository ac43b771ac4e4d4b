"""A session's whole life with RabbitMQ's stock client and docs/message-api.md: `pip install pika`, then
python life.py amqp://… SESSION +15551234567 [PREFIX]: pairs, writes to that number, waits for an answer, and logs out."""

import json
import sys
import uuid

import pika

url, session, to = sys.argv[1:4]
prefix = sys.argv[4] if len(sys.argv) > 4 else "warren"

connection = pika.BlockingConnection(pika.URLParameters(url))
channel = connection.channel()
channel.confirm_delivery()
queue = channel.queue_declare(f"life-{session}", durable=True).method.queue
channel.queue_bind(queue, f"{prefix}.events", f"{session}.*")


def command(exchange, name, **args):
    """Publish a command. Whoever wants to publish it again keeps its id: that makes repeating safe."""
    body = {"command": name, "session": session, "id": f"{name}-{uuid.uuid4()}", "args": args}
    channel.basic_publish(f"{prefix}.{exchange}", session, json.dumps(body), pika.BasicProperties(delivery_mode=2))


def events():
    """Every event once; acknowledged when its handling is over."""
    seen = set()
    for method, _, body in channel.consume(queue, inactivity_timeout=300):
        if method is None:
            sys.exit("nothing happened for five minutes")
        event = json.loads(body)
        if event["id"] not in seen:
            yield event["type"].removeprefix("warren."), event["data"]
        seen.add(event["id"])
        channel.basic_ack(method.delivery_tag)


rested = False
command("control", "create", device_name="life.py")
for name, data in events():
    if name == "qr":
        print("scan:", data["code"], flush=True)
    elif name == "connected":
        print("connected:", data["jid"], flush=True)
        command("control", "logout") if rested else command("commands", "send", to=to, text="Hello! Do you read me?")
    elif name == "message" and data["kind"] == "text" and not data["from_me"]:
        print("message:", data["from"], data["text"], flush=True)
        command("control", "disconnect")
    elif name == "command_failed":
        sys.exit(f"failed: {data['command']}: {data['error']['message']} {data['error']['hint']}")
    elif name == "command_completed":
        print("done:", data["command"], data["result"], flush=True)
        if data["command"] == "disconnect":  # the phone stays linked: no QR code is needed to come back
            rested = True
            command("control", "create")
        elif data["command"] == "logout":
            break
channel.queue_delete(queue)
connection.close()
