"""What only real relays can do to us."""

import asyncio
import itertools
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nostr_sdk import EventBuilder, Keys, Kind, NostrSdkError, PublicKey, nip59_make_seal

from shoal.bus import nostr_events as events
from shoal.bus.letters import letter_text
from shoal.bus.nostr import NostrBus
from shoal.bus.relay import EmbeddedRelay
from shoal.errors import BadConfig, BadProof
from shoal.identity import Identity

from .nodes import AMBER, BIRCH, CLUB, CORAL, SECRET_CLUB, Ear, announcement
from .worlds import QUICK, send_event

pytestmark = pytest.mark.anyio


def keys_of(identity: Identity) -> Keys:
    return Keys.parse(identity.nostr_secret().hex())


def letter(text: str = "hello") -> str:
    return letter_text(CLUB, text.encode(), int(time.time()) + 60)


def wrap_of(seal: object, to: Identity, one_time: Keys, kind: int = events.WRAP) -> object:
    receiver = PublicKey.parse(to.node)
    content = one_time.nip44_encrypt(receiver, seal.as_json())  # type: ignore[attr-defined]
    tags = [["p", receiver.to_hex()]]
    return events._event(one_time, kind, content, tags, int(time.time()))


def seal_by(who: Identity, to: Identity, rumor: object, kind: int = 13) -> object:
    keys = keys_of(who)
    content = keys.nip44_encrypt(PublicKey.parse(to.node), rumor.as_json())  # type: ignore[attr-defined]
    return events._event(keys, kind, content, [], int(time.time()))


def rumor_by(who: Identity, text: str, kind: int = 8410) -> object:
    author = PublicKey.parse(who.node)
    return EventBuilder(Kind(kind), text).finalize_unsigned(author)


def test_a_wrap_opens_for_its_receiver_alone() -> None:
    wrap = events.wrap_event(keys_of(AMBER), BIRCH.node, "hi", created_at=1, expires_at=2)
    opened = events.unseal(keys_of(BIRCH), wrap)
    assert (opened.sender, opened.text) == (AMBER.node, "hi")
    assert wrap.author().to_bech32() != AMBER.node
    for other in (AMBER, CORAL):
        with pytest.raises(BadProof):
            events.unseal(keys_of(other), wrap)


@pytest.mark.parametrize(
    "seal",
    [
        lambda: seal_by(CORAL, BIRCH, rumor_by(AMBER, "I am amber")),
        lambda: nip59_make_seal(
            keys_of(CORAL), PublicKey.parse(BIRCH.node), rumor_by(AMBER, "I am amber")
        ),
        lambda: seal_by(CORAL, BIRCH, rumor_by(CORAL, "hi"), kind=1),
        lambda: seal_by(CORAL, BIRCH, rumor_by(CORAL, "hi", kind=14)),
    ],
    ids=["another's rumor", "sealed by the library", "not a seal", "another kind"],
)
def test_a_forged_seal_is_refused(seal: object) -> None:
    wrap = wrap_of(seal(), BIRCH, Keys.generate())  # type: ignore[operator]
    with pytest.raises(BadProof):
        events.unseal(keys_of(BIRCH), wrap)


@pytest.mark.parametrize(
    "change", [{"pubkey": PublicKey.parse(CORAL.node).to_hex()}, {"sig": "00" * 64}, {"tags": [[]]}]
)
def test_a_seal_that_was_changed_is_refused(change: dict[str, object]) -> None:
    seal = json.loads(seal_by(AMBER, BIRCH, rumor_by(AMBER, "hi")).as_json())  # type: ignore[attr-defined]

    class Changed:
        def as_json(self) -> str:
            return json.dumps({**seal, **change})

    with pytest.raises(BadProof):
        events.unseal(keys_of(BIRCH), wrap_of(Changed(), BIRCH, Keys.generate()))


@settings(max_examples=30)
@given(st.text(max_size=300))
def test_any_content_of_a_wrap_is_opened_or_refused(content: str) -> None:
    receiver, one_time = PublicKey.parse(BIRCH.node), Keys.generate()
    inner = one_time.nip44_encrypt(receiver, content) if content else content
    for text in (content, inner):
        wrap = events._event(one_time, events.WRAP, text, [], 1)
        with pytest.raises(BadProof):
            events.unseal(keys_of(BIRCH), wrap)


async def test_forged_and_replayed_wraps_are_dropped_and_counted() -> None:
    async with EmbeddedRelay() as relay:
        birch = NostrBus(BIRCH, CLUB, [relay.url], config=QUICK)
        ear = Ear().at(birch)
        async with birch:
            forged = wrap_of(
                seal_by(CORAL, BIRCH, rumor_by(AMBER, letter())), BIRCH, Keys.generate()
            )
            honest = seal_by(AMBER, BIRCH, rumor_by(AMBER, letter()))
            late = rumor_by(AMBER, letter_text(CLUB, b"", int(time.time()) - 1))
            elsewhere = rumor_by(AMBER, letter_text(SECRET_CLUB, b"", int(time.time()) + 9))
            await send_event(
                relay.url,
                forged,
                wrap_of(honest, BIRCH, Keys.generate()),
                wrap_of(honest, BIRCH, Keys.generate()),
                wrap_of(seal_by(AMBER, BIRCH, late), BIRCH, Keys.generate()),
                wrap_of(seal_by(AMBER, BIRCH, elsewhere), BIRCH, Keys.generate()),
            )
            await ear.until(lambda: birch.dropped.total() == 4)
            assert birch.dropped == {"bad_proof": 1, "replayed": 1, "bad_message": 2}
            assert ear.sealed == [(AMBER.node, b"hello")]


async def test_only_the_author_can_say_goodbye() -> None:
    """Our relay refuses such a deletion; another relay might pass it on."""
    birch = NostrBus(BIRCH, CLUB)
    ear = Ear().at(birch)
    now, address = int(time.time()), events._announcement_address(PublicKey.parse(AMBER.node))
    tags = [["a", address], ["t", CLUB.topic]]
    birch._hear(events._event(keys_of(CORAL), events.GOODBYE, "1", tags, now))
    assert birch.dropped == {"not asked for": 1}
    assert ear.gone == []
    birch._hear(events._event(keys_of(AMBER), events.GOODBYE, "1", tags, now))
    assert ear.gone == [AMBER.node]


@pytest.mark.parametrize("expiration", ["soon", "", "1e9"])
async def test_an_event_with_a_malformed_tag_is_dropped(expiration: str) -> None:
    birch = NostrBus(BIRCH, CLUB)
    tags = [["t", CLUB.topic], ["expiration", expiration]]
    birch._hear(events._event(keys_of(AMBER), events.ANNOUNCEMENT, "", tags, int(time.time())))
    assert birch.dropped == {"malformed": 1}


async def test_one_author_cannot_talk_all_the_time() -> None:
    async with EmbeddedRelay() as relay:
        birch = NostrBus(BIRCH, CLUB, [relay.url], config=QUICK)
        ear = Ear().at(birch)
        async with birch:
            text, now = announcement(CORAL).encode().decode(), int(time.time())
            stamps = [{"created_at": now - 50 + i, "expires_at": now + 99} for i in range(50)]
            chatter = [
                events.announcement_event(keys_of(CORAL), (CLUB.topic,), text, **s) for s in stamps
            ]
            await send_event(relay.url, *chatter)
            await ear.until(lambda: len(ear.announced) + birch.dropped.total() == 50)
            assert birch.dropped["too many of one author"] >= 15


async def test_a_frozen_relay_does_not_hold_us_up() -> None:
    """The process that serves it is stopped: connections stay open and nothing answers."""
    program = (
        "import asyncio\nfrom shoal.bus.relay import EmbeddedRelay\n"
        "async def main():\n"
        "    async with EmbeddedRelay() as relay:\n"
        "        print(relay.url, flush=True)\n        await asyncio.Event().wait()\n"
        "asyncio.run(main())"
    )
    frozen = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=subprocess.PIPE
    )
    try:
        assert frozen.stdout
        url = (await frozen.stdout.readline()).decode().strip()
        async with EmbeddedRelay() as relay:
            birch = NostrBus(BIRCH, CLUB, [relay.url], config=QUICK)
            ear = Ear().at(birch)
            async with birch, NostrBus(AMBER, CLUB, [url, relay.url], config=QUICK) as amber:
                await ear.until(lambda: all(s.connected for s in amber.status()))
                frozen.send_signal(signal.SIGSTOP)
                started = time.perf_counter()
                await amber.announce(announcement(AMBER))
                await amber.send_sealed(BIRCH.node, b"hello")
                assert time.perf_counter() - started < 0.5
                await ear.until(lambda: len(ear.announced) == len(ear.sealed) == 1)
                await amber.withdraw()
                await ear.until(lambda: ear.gone == [AMBER.node])
                assert time.perf_counter() - started < 3
    finally:
        frozen.kill()
        await frozen.communicate()


async def test_entering_waits_no_longer_than_the_timeout_for_dead_relays() -> None:
    started = time.perf_counter()
    config = type(QUICK)(connect_timeout_s=0.2)
    async with NostrBus(AMBER, CLUB, ["ws://127.0.0.1:9"], config=config) as bus:
        assert 0.1 < time.perf_counter() - started < 1
        (status,) = bus.status()
        assert not status.connected
        assert status.attempts >= 1
        assert status.error


async def test_a_refusal_by_the_relay_shows_in_the_status() -> None:
    async with EmbeddedRelay() as relay, NostrBus(AMBER, CLUB, [relay.url]) as amber:
        await amber.announce(announcement(AMBER))
        stale = events.announcement_event(
            keys_of(AMBER), (CLUB.topic,), "old", created_at=1000, expires_at=1 << 40
        )
        await amber._relays.send(stale)
        await Ear().until(lambda: amber.status()[0].error != "")


async def test_an_error_of_a_listener_does_not_deafen_the_bus() -> None:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: failures.append(context["exception"])
    )
    async with EmbeddedRelay() as relay:
        heard: list[int] = []
        turns = itertools.count()

        def listener(said: object) -> None:
            heard.append(next(turns))
            raise KeyError("a bug of ours")

        birch = NostrBus(BIRCH, CLUB, [relay.url], config=QUICK)
        birch.listen(listener)
        async with birch, NostrBus(AMBER, CLUB, [relay.url], config=QUICK) as amber:
            await amber.announce(announcement(AMBER, 1))
            await amber.announce(announcement(AMBER, 2))
            await Ear().until(lambda: heard == [0, 1])
    assert [type(failure) for failure in failures] == [KeyError, KeyError]


async def test_an_idle_bus_uses_next_to_no_processor_time() -> None:
    async with EmbeddedRelay() as relay:
        urls = [relay.url, "ws://127.0.0.1:9"]
        async with NostrBus(AMBER, CLUB, urls) as bus:
            await bus.announce(announcement(AMBER))
            await asyncio.sleep(0.1)
            before = resource.getrusage(resource.RUSAGE_SELF)
            await asyncio.sleep(1)
            after = resource.getrusage(resource.RUSAGE_SELF)
    used_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert used_s < 0.05


async def test_a_process_that_leaves_at_once_ends_cleanly() -> None:
    program = (
        "import asyncio\n"
        "from shoal.bus.nostr import NostrBus\nfrom shoal.bus.relay import EmbeddedRelay\n"
        "from shoal.identity import Identity, Mesh\n"
        "async def main():\n"
        "    async with EmbeddedRelay() as relay:\n"
        "        me = Identity.from_secret(b'a' * 32)\n"
        "        urls = [relay.url, 'ws://127.0.0.1:9']\n"
        "        async with NostrBus(me, Mesh.public('x'), urls) as bus:\n"
        "            await bus.send_sealed(me.node, b'hello')\n"
        "asyncio.run(main())"
    )
    for _ in range(2):
        run = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stderr=subprocess.PIPE
        )
        errors = (await run.communicate())[1]
        assert (run.returncode, errors) == (0, b"")


async def test_a_relay_with_a_folder_remembers_over_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    async with EmbeddedRelay(database=folder) as relay:
        text, now = announcement(AMBER).encode().decode(), int(time.time())
        stamps = {"created_at": now, "expires_at": now + 99}
        await send_event(
            relay.url, events.announcement_event(keys_of(AMBER), (CLUB.topic,), text, **stamps)
        )
    async with EmbeddedRelay(database=folder) as relay:
        birch = NostrBus(BIRCH, CLUB, [relay.url], config=QUICK)
        ear = Ear().at(birch)
        async with birch:
            await ear.until(lambda: ear.heard() == [(AMBER.node, 1)])


async def test_a_taken_port_is_an_error_that_says_so() -> None:
    async with EmbeddedRelay() as relay:
        with pytest.raises(BadConfig, match=str(relay.port)):
            async with EmbeddedRelay(port=relay.port):
                pass


def test_the_library_error_is_the_one_we_catch() -> None:
    with pytest.raises(NostrSdkError):
        Keys.parse("nonsense")


async def test_a_relay_on_all_addresses_is_dialled_on_this_machines_own() -> None:
    async with EmbeddedRelay(host="0.0.0.0") as relay:  # noqa: S104
        assert relay.url == f"ws://127.0.0.1:{relay.port}"
        async with NostrBus(AMBER, CLUB, [relay.url], config=QUICK) as amber:
            assert amber.status()[0].connected


async def test_a_relay_added_twice_at_once_is_one_relay() -> None:
    async with EmbeddedRelay() as relay, NostrBus(AMBER, CLUB, config=QUICK) as amber:
        await asyncio.gather(*(amber.add_relay(relay.url) for _ in range(3)))
        await Ear().until(lambda: [s.connected for s in amber.status()] == [True])
