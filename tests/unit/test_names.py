"""Names are a contract: a change here is a migration of somebody's RabbitMQ or of their stored ids."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warren.core.names import (
    NO_SESSION,
    Topology,
    command_fingerprint,
    event_id,
    event_routing_key,
    is_session_id,
    whatsapp_message_id,
)

PARTS = st.lists(st.text(max_size=12), max_size=5)


@pytest.mark.parametrize("good", ["a", "acme", "A1", "shop-1", "x_y@z+q=", "0" * 64])
def test_session_ids(good: str) -> None:
    assert is_session_id(good)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        NO_SESSION,
        "-a",
        ".",
        "..",
        "a.b",
        "a/b",
        "a b",
        "a\n",
        "\na",
        "#",
        "*",
        "a*",
        "é",
        "0" * 65,
        "a\x00",
        "@a",
    ],
)
def test_not_session_ids(bad: str) -> None:
    assert not is_session_id(bad)


@given(st.text(max_size=80))
def test_a_session_id_is_safe_as_routing_key_and_file_name(text: str) -> None:
    if is_session_id(text):
        assert text.isascii()
        assert not set(text) & set("./\\#*\0\n ")
        assert len(text) <= 64


def test_topology_is_as_the_design_says() -> None:
    t = Topology("warren")
    assert [t.control, t.commands, t.queries, t.unclaimed] == [
        "warren.control",
        "warren.commands",
        "warren.queries",
        "warren.unclaimed",
    ]
    assert [t.out, t.events, t.tap, t.unrouted, t.dead] == [
        "warren.out",
        "warren.events",
        "warren.tap",
        "warren.events.unrouted",
        "warren.dead",
    ]
    assert t.control_queue("acme") == "warren.control.acme"
    assert t.work_queue("acme") == "warren.session.acme"
    assert t.owner_queue("acme") == "warren.owner.acme"
    assert t.queries_queue("host-1") == "warren.queries.host-1"
    assert t.source == "/warren/warren"
    assert event_routing_key("acme", "message") == "acme.message"


def test_another_prefix_shares_no_name() -> None:
    def names(t: Topology) -> set[str]:
        fixed = {value for name in dir(type(t)) if isinstance(value := getattr(t, name), str) and not name.startswith("_")}
        return fixed | {t.control_queue("a"), t.work_queue("a"), t.new_queue("a"), t.owner_queue("a"), t.queries_queue("a")}

    assert len(names(Topology("one"))) == 17
    assert not names(Topology("one")) & names(Topology("two"))


def test_event_ids_stay_what_they_are() -> None:
    """Literal values: subscribers have stored ids like these, so the same parts must give them for ever."""
    assert event_id("acme", "message", "1@s.whatsapp.net", "1:2@s.whatsapp.net", "3EB0", "") == "acme/lgncinkbfgggipxd5ufzibmed2"
    assert whatsapp_message_id("acme", "order-4711") == "3EB0F72DDD34E593E17560"
    assert command_fingerprint("send", b"{}") == hashlib.sha256(b"send\0{}").hexdigest()


@given(PARTS)
def test_event_ids_are_deterministic_and_short(parts: list[str]) -> None:
    assert event_id("acme", *parts) == event_id("acme", *parts)
    assert re.fullmatch(r"acme/[a-z2-7]{26}", event_id("acme", *parts))


@given(PARTS, PARTS)
def test_event_ids_do_not_confuse_where_parts_end(one: list[str], two: list[str]) -> None:
    assert (event_id("s", *one) == event_id("s", *two)) == (one == two)


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_message_ids_look_like_whatsapp_webs_and_depend_on_session_and_command(s1: str, c1: str, s2: str, c2: str) -> None:
    one, two = whatsapp_message_id(s1, c1), whatsapp_message_id(s2, c2)
    assert re.fullmatch(r"3EB0[0-9A-F]{18}", one)
    assert (one == two) == ((s1, c1) == (s2, c2))


def test_a_fingerprint_tells_commands_and_arguments_apart() -> None:
    prints = {command_fingerprint(c, a) for c in ("send", "create") for a in (b"{}", b'{"to":"1"}')}
    assert len(prints) == 4
