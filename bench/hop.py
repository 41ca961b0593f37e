"""One hop of an activation between two processes on loopback, and how soon a dead peer is noticed.

Round trips of 1, 16 and 64 KiB bodies over the `tls` carrier, with framing and a msgspec header
encoded and decoded on both sides, against the naive ways in the same run, interleaved: an echo over
asyncio's TLS streams and one over its TCP streams, each with a 4-byte length and nothing else.
One way: from before encoding to after decoding in the other process (one clock for both).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import ssl
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from contract import Bench, percentile

from shoal.identity import Identity
from shoal.transport import Contact, Frame, Links, TlsCarrier, TlsConfig
from shoal.transport.certificate import client_context, server_context
from shoal.units import NodeId

HERE, THERE = Identity.from_secret(b"h" * 32), Identity.from_secret(b"t" * 32)
SIZES_KIB = (1, 16, 64)
CHANNEL = 1
BATCHES = 10

Echo = Callable[[bytes], Awaitable[None]]


class Step(msgspec.Struct, array_like=True):
    """A header as the pipeline has it: sessions, positions, and here the times."""

    sessions: list[str]
    positions: list[int]
    sent_ns: int
    received_ns: int = 0


encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(Step).decode


# The other process.


async def stream_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readexactly(4)
            writer.write(head + await reader.readexactly(struct.unpack(">I", head)[0]))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def serve() -> None:
    """Print the addresses as one line of JSON, then echo until stdin ends."""
    carrier = TlsCarrier(THERE, TlsConfig(host="127.0.0.1"))
    links = Links(THERE, [carrier], resolve=lambda node: None)

    def echo(node: NodeId, frame: Frame) -> None:
        step = decode(frame.header)
        step.received_ns = time.monotonic_ns()
        links.send(node, Frame(CHANNEL, encode(step), frame.body))

    links.on(CHANNEL, echo)
    async with links:
        context = server_context(THERE.transport_secret())
        tls = await asyncio.start_server(stream_echo, "127.0.0.1", 0, ssl=context)
        tcp = await asyncio.start_server(stream_echo, "127.0.0.1", 0)
        ports = [server.sockets[0].getsockname()[1] for server in (tls, tcp)]
        print(json.dumps({"addresses": links.addresses, "tls": ports[0], "tcp": ports[1]}))
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


# This process.


@contextmanager
def other_process() -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The echo in a process of its own, and the addresses that it printed."""
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def links_to(addresses: list[str]) -> Links:
    contact = Contact(THERE.node, THERE.transport_key, tuple(addresses))
    carrier = TlsCarrier(HERE, TlsConfig(host="127.0.0.1"))
    return Links(HERE, [carrier], resolve=lambda node: contact)


class Ours:
    """Round trips over `Links`."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._answered: asyncio.Future[None] | None = None
        self.one_way_ns: list[int] = []
        links.on(CHANNEL, self._came)

    async def echo(self, body: bytes) -> None:
        self._answered = asyncio.get_running_loop().create_future()
        step = Step(["0123456789abcdef"], [17], time.monotonic_ns())
        self._links.send(THERE.node, Frame(CHANNEL, encode(step), body))
        await self._answered

    def _came(self, node: NodeId, frame: Frame) -> None:
        step = decode(frame.header)
        self.one_way_ns.append(step.received_ns - step.sent_ns)
        assert self._answered is not None
        self._answered.set_result(None)


async def stream_client(port: int, context: ssl.SSLContext | None) -> Echo:
    name = "" if context else None
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname=name
    )

    async def echo(body: bytes) -> None:
        writer.write(struct.pack(">I", len(body)) + body)
        await writer.drain()
        head = await reader.readexactly(4)
        await reader.readexactly(struct.unpack(">I", head)[0])

    return echo


async def timed(echo: Echo, body: bytes, count: int) -> list[float]:
    """Microseconds of each round trip."""
    taken = []
    for _ in range(count):
        begin = time.perf_counter_ns()
        await echo(body)
        taken.append((time.perf_counter_ns() - begin) / 1e3)
    return taken


async def measure_size(bench: Bench, kib: int, ways: dict[str, Echo], ours: Ours) -> None:
    count, body = (40 if bench.quick else 400), os.urandom(kib << 10)
    for echo in ways.values():
        await timed(echo, body, 50)
    ours.one_way_ns.clear()
    samples: dict[str, list[float]] = {way: [] for way in ways}
    batches: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(BATCHES):
        for way, echo in ways.items():
            batch = await timed(echo, body, count)
            samples[way] += batch
            batches[way].append(statistics.median(batch))
    for way, taken in samples.items():
        report(bench, f"{way}, {kib} KiB round trip", taken)
    report(bench, f"shoal tls, {kib} KiB one way", [ns / 1e3 for ns in ours.one_way_ns])
    if kib == 16:
        ratios = [a / b for a, b in zip(batches["shoal tls"], batches["asyncio tls"], strict=True)]
        got = statistics.median(ratios)
        bench.aim(
            "shoal tls / bare asyncio TLS echo, 16 KiB p50", "<= 1.5", got=got, holds=got <= 1.5
        )


def report(bench: Bench, what: str, taken_us: list[float]) -> None:
    bench.row(
        what=what,
        p50_us=percentile(taken_us, 50),
        p99_us=percentile(taken_us, 99),
        samples=len(taken_us),
    )


async def measure_hops(bench: Bench) -> None:
    with other_process() as (process, other):
        links = links_to(other["addresses"])
        ours = Ours(links)
        async with links:
            await links.connect(THERE.node)
            ways: dict[str, Echo] = {
                "shoal tls": ours.echo,
                "asyncio tls": await stream_client(other["tls"], client_context()),
                "asyncio tcp": await stream_client(other["tcp"], None),
            }
            for kib in SIZES_KIB:
                await measure_size(bench, kib, ways, ours)
            await measure_idle(bench, process.pid)


async def measure_idle(bench: Bench, other: int) -> None:
    """Processor time of two connected nodes that have nothing to say."""
    seconds = 5.0 if bench.quick else 20.0
    begin = cpu_seconds(), cpu_seconds_of(other)
    await asyncio.sleep(seconds)
    used = cpu_seconds() - begin[0], cpu_seconds_of(other) - begin[1]
    for who, cpu in zip(("this process", "the other"), used, strict=True):
        bench.row(what=f"idle, 1 link: {who}", core_percent=100 * cpu / seconds)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def cpu_seconds_of(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return float("nan")  # not Linux
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure_death(bench: Bench, name: str, how: signal.Signals) -> None:
    """From the signal to `on_lost`, several times."""
    taken: list[float] = []
    for attempt in range(3 if bench.quick else 10):
        with other_process() as (process, other):
            links, lost = links_to(other["addresses"]), asyncio.Event()
            links.on_lost(lambda node, reason, lost=lost: lost.set())
            async with links:
                await links.connect(THERE.node)
                await asyncio.sleep(0.3 + 0.07 * attempt)  # somewhere between two beats
                begin = time.perf_counter()
                process.send_signal(how)
                await lost.wait()
                taken.append((time.perf_counter() - begin) * 1e3)
    bench.row(what=name, p50_ms=percentile(taken, 50), max_ms=max(taken), samples=len(taken))


async def main(bench: Bench) -> None:
    await measure_hops(bench)
    await measure_death(bench, "noticed: peer killed (SIGKILL)", signal.SIGKILL)
    await measure_death(bench, "noticed: peer stopped (SIGSTOP)", signal.SIGSTOP)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    bench = Bench("hop", __doc__, parser=arguments)
    if bench.options.serve:
        asyncio.run(serve())
    else:
        asyncio.run(main(bench))
        bench.finish()
