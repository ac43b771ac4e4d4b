"""The permissions that docs/operations.md gives, and RabbitMQ that wants certificates: with real users and real TLS."""

from __future__ import annotations

import datetime
import ipaddress
import itertools
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import aiormq.exceptions
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.acceptance.rig import Rig
from tests.conftest import Broker

from warren.client import Client
from warren.core.names import Topology
from warren.edges.amqp_link import BusOptions, Link, QuietConnection, describe
from warren.edges.broker_node import BrokerNode
from warren.edges.settings import load_settings
from warren.errors import BrokerUnavailable

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
prefixes = itertools.count(1)


# --- permissions ------------------------------------------------------------------------------------------------------


def documented(user: str, prefix: str) -> list[str]:
    """configure, write and read for `user`, for warren's names with `prefix`."""
    (found,) = re.findall(rf"rabbitmqctl set_permissions {user} '([^']+)' '([^']+)' '([^']+)'", OPERATIONS.read_text())
    return [pattern.replace("warren", prefix) for pattern in found]


async def user_url(broker: Broker, user: str, permissions: list[str]) -> str:
    await broker.ctl("add_user", user, "secret")
    await broker.ctl("set_permissions", user, *permissions)
    return f"amqp://{user}:secret@127.0.0.1:{urlsplit(broker.url).port}/"


async def test_a_whole_life_with_the_documented_permissions_and_nothing_beyond(tmp_path: Path, broker: Broker) -> None:
    prefix = f"rights{next(prefixes)}"
    daemon = await user_url(broker, f"{prefix}-daemon", documented("warren", prefix))
    shop = await user_url(broker, f"{prefix}-shop", documented("shop", prefix))
    async with Rig(tmp_path, broker.url, prefix, WARREN_AMQP__URL=daemon) as rig, Client(shop, prefix) as client:
        rig.client = client
        async with client.subscribe("acme.#", queue="shop-events") as events, client.subscribe("#", tap=True) as tap:
            await rig.pair("acme", "15550001111")
            await rig.sim.add_phone("15559990000", "Peer")
            assert (await rig.call("send", "acme", {"to": "+15559990000", "text": "one"}, id="order-1")).ok
            assert [s["session"] for s in await client.list_sessions()] == ["acme"]
            assert (await rig.call("logout", "acme")).ok
            assert (await anext(events))["session"] == "acme"
            assert (await anext(tap))["session"] == "acme"
        log = rig.warrend.log.read_text()
        assert "ACCESS_REFUSED" not in log
        assert "refused access" not in log
    # What they must not: the daemon outside its prefix, a backend in warren's own queues or with warren's own events.
    for url, forbidden in ((daemon, "elsewhere"), (shop, f"{prefix}.session.acme"), (shop, "elsewhere")):
        async with await aio_pika.connect(url, connection_class=QuietConnection) as connection:
            channel = await connection.channel()
            with pytest.raises(aiormq.exceptions.ChannelAccessRefused):
                await channel.declare_queue(forbidden)
    for exchange in ("out", "events", "dead"):
        async with await aio_pika.connect(shop, connection_class=QuietConnection) as connection:
            channel = await connection.channel()
            forged = await channel.get_exchange(f"{prefix}.{exchange}", ensure=False)
            with pytest.raises((aiormq.exceptions.ChannelAccessRefused, aiormq.exceptions.ChannelInvalidStateError)):
                await forged.publish(aio_pika.Message(b"{}"), "acme.message", mandatory=False, timeout=10)


# --- certificates -----------------------------------------------------------------------------------------------------


class Authority:
    """A private CA, its files in `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._serials = itertools.count(1)
        self.ca_file = folder / f"{name}.pem"
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        self._write(self.ca_file, self._certificate(self._subject, self._key.public_key(), constraints))

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key of somebody at 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        cert_file, key_file = self.folder / f"{self.name}-{name}.pem", self.folder / f"{self.name}-{name}.key"
        self._write(cert_file, self._certificate(subject, key.public_key(), address))
        pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, plain))
        return cert_file, key_file

    def _certificate(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, extension: x509.ExtensionType) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key)
            .serial_number(next(self._serials))
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .sign(self._key, hashes.SHA256())
        )

    @staticmethod
    def _write(path: Path, certificate: x509.Certificate) -> None:
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def trouble(settings: dict[str, str]) -> BrokerUnavailable:
    address = load_settings(None, settings).amqp.address
    assert address is not None
    options = BusOptions(url=address, topology=Topology("tls"), instance="i")
    try:
        link = await Link.open(options, "publish")
    except Exception as error:  # whatever it is, `describe` puts it into words
        return describe(error, options)
    await link.close(1.0)
    raise AssertionError(f"RabbitMQ let us in with {settings}")


async def test_rabbitmq_that_wants_a_certificate_gets_one(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    server, (client_cert, client_key), (odd_cert, odd_key) = ours.issue("server"), ours.issue("client"), theirs.issue("client")
    port, base = free_port(), tmp_path / "broker"
    (base / "conf.d").mkdir(parents=True)
    (base / "conf.d" / "tls.conf").write_text(
        f"listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {ours.ca_file}\n"
        f"ssl_options.certfile = {server[0]}\nssl_options.keyfile = {server[1]}\n"
        "ssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n"
    )
    node = BrokerNode(base)
    try:
        plain = urlsplit((await node.start()).url)
        url = f"amqps://{plain.username}:{plain.password}@127.0.0.1:{port}/"
        tls = {"amqp.ca_file": str(ours.ca_file), "amqp.cert_file": str(client_cert), "amqp.key_file": str(client_key)}
        good = {"amqp.url": url, **tls}
        address = load_settings(None, good).amqp.address
        assert address is not None
        environment = {f"WARREN_{name.upper().replace('.', '__')}": value for name, value in tls.items()}
        (tmp_path / "rig").mkdir()
        async with Rig(tmp_path / "rig", address, "tls", WARREN_AMQP__URL=url, **environment) as rig:
            await rig.pair("acme", "15550001111")

        # No or a strange certificate, a strange CA, another host's name: each told in words, without the password.
        bare = {"amqp.url": url, "amqp.ca_file": str(ours.ca_file)}
        odd = {**bare, "amqp.cert_file": str(odd_cert), "amqp.key_file": str(odd_key)}
        unknown = {**good, "amqp.ca_file": str(theirs.ca_file)}
        elsewhere = {**good, "amqp.url": url.replace("127.0.0.1", "localhost")}
        for settings, words in (
            (bare, "RabbitMQ at"),
            (odd, "RabbitMQ at"),
            (unknown, "certificates"),
            (elsewhere, "certificates"),
        ):
            told = str(await trouble(settings))
            assert words in told
            assert str(plain.password) not in told
            print(told)
    finally:
        await node.stop(20)
