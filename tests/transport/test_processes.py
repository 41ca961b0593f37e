"""A peer in another process that dies, or only stops."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.transport import Contact
from tests.transport.nodes import AMBER, BIRCH, open_mesh

pytestmark = pytest.mark.anyio


@pytest.fixture
def birch() -> Iterator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.transport.serve"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("how", "within_s"),
    [(signal.SIGKILL, 0.5), (signal.SIGSTOP, 1.2)],  # 0.9, and what a busy machine is late by
    ids=["killed", "stopped"],
)
async def test_a_peer_whose_process_is_gone_is_noticed_in_time(
    birch: tuple[subprocess.Popen[str], str], how: signal.Signals, within_s: float
) -> None:
    process, address = birch
    async with open_mesh("tls") as mesh:
        mesh.contacts[BIRCH.node] = Contact(BIRCH.node, BIRCH.transport_key, (address,))
        amber = await mesh.node(AMBER)
        lost = asyncio.Event()
        amber.links.on_lost(lambda node, reason: lost.set())
        await amber.links.connect(BIRCH.node)
        process.send_signal(how)
        async with asyncio.timeout(within_s):
            await lost.wait()
        assert not amber.links.faults
