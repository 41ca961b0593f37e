"""A node in a process of its own: prints its address, then listens until it is killed."""

import asyncio

from shoal.transport import Links, TlsCarrier, TlsConfig
from tests.transport.nodes import BIRCH


async def serve() -> None:
    carrier = TlsCarrier(BIRCH, TlsConfig(host="127.0.0.1"))
    async with Links(BIRCH, [carrier], resolve=lambda node: None) as links:
        print(links.addresses[0], flush=True)  # noqa: T201  read by the test
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve())
