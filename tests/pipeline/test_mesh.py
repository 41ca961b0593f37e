"""Whole nodes but for bus and API, in one process: links over a network with delay and loss."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from shoal.engine.request import Sampling
from shoal.engine.thread import EngineThread
from shoal.errors import InvalidRequest, NoRoute, StageLost
from shoal.events import (
    Event,
    PrefixMatched,
    Recovered,
    RouteTaken,
    SessionPreempted,
    StepDone,
)
from shoal.hardware import Speed
from shoal.identity import Identity
from shoal.models.checkpoint import Checkpoint, open_checkpoint
from shoal.models.random_checkpoint import write_random_checkpoint
from shoal.pipeline import (
    Pipeline,
    Plan,
    Request,
    Serving,
    ServingConfig,
    StageWorker,
    Stop,
    Stream,
    Wish,
)
from shoal.transport import Contact, Links, MemoryConfig, MemoryNetwork
from shoal.units import NodeId, Quant, Slice
from tests.models.families import DENSE

pytestmark = pytest.mark.anyio

PROMPT = (5, 17, 99, 3, 42)
GREEDY = Sampling(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    write_random_checkpoint(DENSE["llama"], folder)
    return open_checkpoint(str(folder))


class Member:
    def __init__(
        self,
        identity: Identity,
        links: Links,
        pipeline: Pipeline,
        serving: Serving,
        events: list[Event],
    ) -> None:
        self.id: NodeId = identity.node
        self.links, self.pipeline, self.serving = links, pipeline, serving
        self.events = events

    @property
    def used(self) -> float:
        return sum(worker.sessions.pool.used_fraction for worker in self.pipeline.workers)


class Mesh:
    """Members by number; the planner takes the first that fits, in this order."""

    def __init__(self) -> None:
        self.network = MemoryNetwork(MemoryConfig(delay_s=0.002, jitter_s=0.001, loss=0.02), seed=4)
        self.members: list[Member] = []
        self.parts: Callable[[Wish], tuple[Stop, ...]] | None = None  # who runs what, otherwise
        self.contacts: dict[NodeId, Contact] = {}

    def plan(self, wish: Wish) -> Plan:
        kept = {stop.layers.start: stop for stop in wish.keep}
        stops: list[Stop] = list(self.parts(wish)) if self.parts else []
        while not stops or stops[-1].layers.stop < 4:
            start = stops[-1].layers.stop if stops else 0
            if start in kept:
                stops.append(kept[start])
                continue
            fits = [
                (member, served)
                for member in self.members
                for served in member.serving.slices
                if served.layers.start == start and member.id not in wish.avoid
            ]
            if not fits:
                raise NoRoute(f"nobody holds layer {start}")
            member, served = fits[0]
            stops.append(Stop(member.id, served.layers))
        served = next(each for member in self.members for each in member.serving.slices)
        return Plan(served.checkpoint.model_id, served.compute, tuple(stops))


async def add_member(
    mesh: Mesh,
    stack: AsyncExitStack,
    checkpoint: Checkpoint,
    layers: Slice | None,
    kv_tokens: int,
    quant: Quant,
    draft: str,
) -> Member:
    events: list[Event] = []
    identity = Identity.from_secret(bytes([len(mesh.members) + 1]) * 32)
    links = Links(identity, [mesh.network.carrier(identity)], resolve=mesh.contacts.get)
    pipeline = Pipeline(links, mesh.plan, emit=events.append, clock=time.monotonic)
    thread = await stack.enter_async_context(EngineThread(1))
    await stack.enter_async_context(pipeline)
    await stack.enter_async_context(links)
    serving = Serving(
        identity.node,
        pipeline,
        links,
        thread,
        ServingConfig(memory_bytes=1 << 28, kv_tokens=kv_tokens, quant=quant, draft=draft),
        emit=events.append,
        clock=time.monotonic,
        changed=lambda: None,
    )
    mesh.contacts[identity.node] = Contact(identity.node, identity.transport_key, links.addresses)
    if layers:
        await serving.serve(checkpoint, layers, Speed(layer_s=0.001), pinned=True)
    member = Member(identity, links, pipeline, serving, events)
    mesh.members.append(member)
    return member


@asynccontextmanager
async def mesh_of(
    checkpoint: Checkpoint,
    *slices: str,
    kv_tokens: int = 512,
    quant: Quant = "none",
    draft: str = "ngram",
) -> AsyncIterator[Mesh]:
    mesh = Mesh()
    async with AsyncExitStack() as stack:
        for layers in slices:
            held = Slice.parse(layers) if layers else None
            await add_member(mesh, stack, checkpoint, held, kv_tokens, quant, draft)
        yield mesh


def ask(member: Member, sampling: Sampling = GREEDY, prompt: tuple[int, ...] = PROMPT) -> Stream:
    return member.pipeline.gateway.generate(Request("tiny", prompt, sampling))


def workers(mesh: Mesh) -> list[StageWorker]:
    found = [each for member in mesh.members for each in member.pipeline.workers]
    return [each for each in found if isinstance(each, StageWorker)]


async def tokens_of(stream: Stream) -> list[int]:
    return [sampled.token async for sampled in stream]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def unsplit(checkpoint: Checkpoint) -> list[int]:
    async with mesh_of(checkpoint, "0:4") as mesh:
        return await tokens_of(ask(mesh.members[0]))


async def test_three_nodes_write_what_one_node_writes(checkpoint: Checkpoint) -> None:
    async with mesh_of(checkpoint, "0:1", "1:3", "3:4", "") as mesh:
        for member in mesh.members:  # any node can be the gateway, one without layers too
            assert await tokens_of(ask(member)) == await unsplit(checkpoint)
        await until(lambda: not any(member.used for member in mesh.members))


async def test_a_node_cut_off_in_mid_stream_is_replaced(checkpoint: Checkpoint) -> None:
    async with mesh_of(checkpoint, "0:1", "1:3", "3:4", "1:3") as mesh:
        stream, got = ask(mesh.members[0]), []
        async for sampled in stream:
            got.append(sampled.token)
            if len(got) == 8:
                mesh.network.cut(mesh.members[1].id)
        assert got == await unsplit(checkpoint)
        assert stream.plan is not None
        assert stream.plan.stops[1].node == mesh.members[3].id
        events = mesh.members[0].events
        assert [each.kind for each in events if isinstance(each, RouteTaken)] == ["new", "replayed"]
        (recovered,) = [each for each in events if isinstance(each, Recovered)]
        assert recovered.replayed_tokens >= len(PROMPT) + 6
        assert recovered.seconds < 5
        for member in (mesh.members[0], mesh.members[2]):  # nothing was computed again
            steps = [each for each in member.events if isinstance(each, StepDone)]
            assert sum(each.tokens for each in steps) < 2 * len(got) + len(PROMPT)
        await until(lambda: not any(mesh.members[at].used for at in (0, 2, 3)))
        assert not any(worker.sessions.history.nbytes for worker in workers(mesh))


async def test_two_nodes_of_a_route_may_go_at_the_same_time(checkpoint: Checkpoint) -> None:
    async with mesh_of(checkpoint, "0:1", "1:3", "3:4", "3:4", "1:3", "") as mesh:
        got = []
        async for sampled in ask(mesh.members[5]):
            got.append(sampled.token)
            if len(got) == 8:
                mesh.network.cut(mesh.members[1].id)
                mesh.network.freeze(mesh.members[2].id)
        assert got == await unsplit(checkpoint)


@pytest.mark.parametrize("quant", ["none", "int8"])
async def test_stages_that_overlap_run_parts_and_are_replaced_by_parts(
    checkpoint: Checkpoint, quant: Quant
) -> None:
    async with mesh_of(checkpoint, "0:4", quant=quant) as whole:
        wanted = await tokens_of(ask(whole.members[0]))
    async with mesh_of(checkpoint, "0:3", "1:4", "0:4", quant=quant) as mesh:
        first, second, third = (member.id for member in mesh.members)

        def parts(wish: Wish) -> tuple[Stop, ...]:
            last = third if second in wish.avoid else second
            return Stop(first, Slice(0, 2)), Stop(last, Slice(2, 4))

        mesh.parts, got = parts, []
        async for sampled in ask(mesh.members[0]):
            got.append(sampled.token)
            if len(got) == 8:
                mesh.network.cut(second)
        assert got == wanted
        events = mesh.members[0].events
        kinds = [each.kind for each in events if isinstance(each, RouteTaken)]
        assert kinds == ["new", "replayed"]


async def test_who_leaves_hands_its_sessions_over(checkpoint: Checkpoint) -> None:
    async with mesh_of(checkpoint, "0:1", "1:3", "3:4", "1:3") as mesh:
        stream, got = ask(mesh.members[0]), []
        leaver = mesh.members[1]
        async for sampled in stream:
            got.append(sampled.token)
            if len(got) == 8:
                leaver.serving.drain()
                leaver.pipeline.hand_over()
            if len(got) == 23:
                assert leaver.used == 0
        assert got == await unsplit(checkpoint)
        events = mesh.members[0].events
        routes = [each.kind for each in events if isinstance(each, RouteTaken)]
        assert routes == ["new", "handed over"]


async def test_a_link_that_breaks_for_a_moment_costs_no_answer(checkpoint: Checkpoint) -> None:
    async with mesh_of(checkpoint, "0:1", "1:3", "3:4") as mesh, asyncio.TaskGroup() as tasks:
        first, middle, _ = mesh.members
        stream, got = ask(first), []

        async def reunite() -> None:
            await asyncio.sleep(0.2)
            mesh.network.heal()
            await first.links.connect(middle.id)

        async for sampled in stream:
            got.append(sampled.token)
            if len(got) == 8:
                mesh.network.cut(middle.id)
                tasks.create_task(reunite())
        assert got == await unsplit(checkpoint)


async def test_a_frozen_node_without_a_spare_ends_in_one_error(checkpoint: Checkpoint) -> None:
    async with mesh_of(checkpoint, "0:1", "1:3", "3:4") as mesh:
        got: list[int] = []

        async def freeze_in_mid_stream() -> None:
            async for sampled in ask(mesh.members[0]):
                got.append(sampled.token)
                if len(got) == 8:
                    mesh.network.freeze(mesh.members[1].id)

        with pytest.raises(StageLost, match="nobody holds layer 1"):
            await freeze_in_mid_stream()
        assert got == (await unsplit(checkpoint))[: len(got)]
        await until(lambda: mesh.members[0].used == mesh.members[2].used == 0)


async def test_a_gateway_that_dies_frees_its_pages_everywhere(checkpoint: Checkpoint) -> None:
    async with mesh_of(checkpoint, "0:1", "1:3", "3:4", "") as mesh:
        endless = Sampling(temperature=0, max_tokens=400)
        iterator = ask(mesh.members[3], endless).__aiter__()
        await anext(iterator)
        assert all(member.used for member in mesh.members[:3])
        mesh.network.cut(mesh.members[3].id)
        await until(lambda: not any(member.used for member in mesh.members[:3]))


async def test_a_cancelled_stream_frees_its_pages_everywhere(checkpoint: Checkpoint) -> None:
    async with mesh_of(checkpoint, "0:1", "1:3", "3:4") as mesh:
        stream = ask(mesh.members[1], Sampling(temperature=0, max_tokens=400))
        await anext(stream.__aiter__())
        await stream.aclose()
        await until(lambda: not any(member.used for member in mesh.members))


async def test_more_sessions_than_pages_queue_and_are_all_answered(checkpoint: Checkpoint) -> None:
    async with mesh_of(checkpoint, "0:1", "1:4", kv_tokens=96) as mesh:
        streams = [ask(member) for member in mesh.members for _ in range(5)]
        answers = await asyncio.gather(*map(tokens_of, streams))
        assert answers == [await unsplit(checkpoint)] * len(streams)


async def test_in_the_exact_class_a_turn_over_kept_pages_is_that_of_the_whole_compute(
    checkpoint: Checkpoint,
) -> None:
    prompt = tuple(range(7, 60))
    async with mesh_of(checkpoint, "0:1", "1:3", "3:4", quant="int8") as mesh:
        member = mesh.members[1]
        turn = (*prompt, *await tokens_of(ask(member, prompt=prompt)), 4, 5, 6)
        await until(lambda: not any(each.used for each in mesh.members))
        answer = await tokens_of(ask(member, prompt=turn))
        for each in mesh.members:
            matched = [event for event in each.events if isinstance(event, PrefixMatched)]
            assert [event.hit_tokens for event in matched] == [0, 64]  # of 53 + 24 - 1, and 80
    async with mesh_of(checkpoint, "0:4", quant="int8") as fresh:
        assert answer == await tokens_of(ask(fresh.members[0], prompt=turn))


async def test_streams_pause_for_older_ones_when_pages_run_out_and_lose_nothing(
    checkpoint: Checkpoint,
) -> None:
    long = Sampling(temperature=0, max_tokens=100)
    async with mesh_of(checkpoint, "0:1", "1:4", kv_tokens=192) as mesh:
        streams = [ask(member, long) for member in mesh.members]
        answers = await asyncio.gather(*map(tokens_of, streams))
        assert {len(answer) for answer in answers} == {100}
        assert any(isinstance(e, SessionPreempted) for each in mesh.members for e in each.events)
        await until(lambda: not any(member.used for member in mesh.members))


async def test_a_stage_taken_out_of_service_hands_its_sessions_on(checkpoint: Checkpoint) -> None:
    async with mesh_of(checkpoint, "0:1", "1:4", "1:4") as mesh:
        got = []
        async for sampled in ask(mesh.members[0]):
            got.append(sampled.token)
            if len(got) == 8:
                mesh.members[1].serving.stop()
        assert got == await unsplit(checkpoint)


async def test_a_stage_taken_out_of_service_in_mid_forward_leaves_the_memory(
    checkpoint: Checkpoint,
) -> None:
    async with mesh_of(checkpoint, "0:4") as mesh:
        (member,) = mesh.members
        stream = ask(member, Sampling(temperature=0, max_tokens=400))  # long enough to be caught
        worker = weakref.ref(member.pipeline.workers[0])

        def computing() -> bool:
            held = worker()
            return held is not None and any(
                each.computing for each in held.sessions._sessions.values()
            )

        await until(computing)
        member.serving.stop()
        await stream.aclose()
        await until(lambda: gc.collect() >= 0 and worker() is None)


async def test_layers_that_the_model_lacks_are_refused_before_anybody_hears_of_them(
    checkpoint: Checkpoint,
) -> None:
    async with mesh_of(checkpoint, "") as mesh:
        serving = mesh.members[0].serving
        with pytest.raises(InvalidRequest, match="has 4 layers, not 9"):
            await serving.serve(checkpoint, Slice(0, 9), 0.001, pinned=True)
        assert serving.offers() == ()
