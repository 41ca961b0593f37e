"""Drafts change how many passes a text takes and nothing else: not the text, not the pages."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from shoal.engine.draft import MAX_DRAFT, NgramDrafter, Wish
from shoal.engine.request import Sampled, Sampling, TokenLogprob
from shoal.engine.sampling import SamplerState, sample, verify
from shoal.pipeline.messages import RowEntry, TokenEntry, from_frame, to_frame, tokens_in_frames
from shoal.pipeline.stage import Drop, Send
from shoal.units import NodeId, SessionId, Slice

from .small_mesh import LAYERS, VOCABULARY, SmallMesh, expected, layer
from .test_sessions import DOUBLE, SPARE, THREE, assert_all_pages_are_back, run_out

MAX_TEXT = 60


@dataclass
class Seer:
    """Knows the texts, and is right about a token with this probability."""

    skill: float
    seed: int = 0
    said: int = 0
    texts: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def __call__(self, wish: Wish) -> tuple[int, ...]:
        known = list(wish.ids)
        text = next((each for each in self.texts if each[: len(known)] == known), [])
        draft = [
            token if self.random.random() < self.skill else self.random.randrange(VOCABULARY + 2)
            for token in text[len(known) : len(known) + wish.count]
        ]
        self.said += len(draft)
        assert len(draft) <= min(wish.count, MAX_DRAFT)
        return tuple(draft)


def passes(mesh: SmallMesh) -> int:
    return sum(node.forwards for node in mesh.nodes.values() if node.layers.stop == LAYERS)


def drafting(slices: dict[str, Slice], skill: float = 1.0, seed: int = 1) -> SmallMesh:
    return SmallMesh(seed, slices, guess=Seer(skill, seed))


def ask(mesh: SmallMesh, prompt: tuple[int, ...], count: int) -> list[int]:
    """Returns the text that must come."""
    text = expected(prompt, count)
    assert isinstance(mesh.guess, Seer)
    mesh.guess.texts.append([*prompt, *text, *text])  # it would go on guessing
    mesh.ask(prompt, count)
    return text


@pytest.mark.parametrize("skill", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    "slices", [{"whole": Slice(0, 6)}, THREE], ids=["one stage", "three stages"]
)
def test_right_wrong_and_mixed_drafts_leave_the_text_as_it_is(
    slices: dict[str, Slice], skill: float
) -> None:
    mesh = drafting(slices, skill)
    texts = [ask(mesh, (3, 1, 4, 1, 5, 9, 2, 6, 5), 27), ask(mesh, (2,), 32)]
    run_out(mesh)
    assert mesh.delivered == texts
    assert mesh.guess.said > 0  # type: ignore[union-attr]
    assert_all_pages_are_back(mesh)


def test_right_drafts_save_passes_and_wrong_ones_cost_none() -> None:
    took = []
    for skill in (0.0, 1.0):
        mesh = drafting(THREE, skill)
        ask(mesh, (3, 1), 40)
        run_out(mesh)
        took.append(passes(mesh))
    assert took[0] == 40
    assert took[1] <= 8


def test_repetition_is_found_by_the_ngram_drafter() -> None:
    text, drafter = expected((3, 1, 4), 12), NgramDrafter()
    prompt = (3, 1, 4, *text, 90, 91, 3, 1, 4)
    mesh = SmallMesh(4, THREE, guess=lambda wish: drafter.draft([wish])[0])
    mesh.ask(prompt, 12)
    run_out(mesh)
    assert mesh.delivered[0] == expected(prompt, 12)


@pytest.mark.parametrize("block", range(8))
def test_under_any_schedule_of_kills_and_cancellations_nothing_is_lost_or_doubled(
    block: int,
) -> None:
    for seed in range(block * 12, block * 12 + 12):
        chance = random.Random(seed)
        mesh = drafting(DOUBLE, chance.choice([0.5, 0.9]), seed)
        mesh = SmallMesh(seed, DOUBLE, pages=chance.choice([8, 12, 40]), guess=mesh.guess)
        wanted = []
        for _ in range(chance.randint(1, 4)):
            prompt = tuple(chance.randrange(97) for _ in range(chance.randint(1, 9)))
            wanted.append(ask(mesh, prompt, chance.randint(1, 18)))
        for _ in range(chance.randint(0, 3)):
            for _ in range(chance.randint(1, 200)):
                mesh.turn()
            if chance.random() < 0.3:
                mesh.cancel(chance.randrange(len(wanted)))
            elif len(mesh.nodes) > 1:
                mesh.kill(chance.choice(sorted(mesh.nodes)))
        run_out(mesh)
        mesh.assert_pages_are_counted_right()
        for got, whole, finish in zip(mesh.delivered, wanted, mesh.finished, strict=True):
            assert finish is not None, f"seed {seed}: a generation never ended"
            assert got == whole[: len(got)], f"seed {seed}"
            assert got == whole or finish.reason != "length", f"seed {seed}"
        assert_all_pages_are_back(mesh)


def test_pages_of_a_text_with_drafts_are_found_again_and_hold_only_what_was_said() -> None:
    mesh = drafting(THREE, 0.6)
    text = ask(mesh, (3, 1, 4, 1, 5), 23)
    run_out(mesh)
    follow_up = (3, 1, 4, 1, 5, *text, 8)
    again = ask(mesh, follow_up, 9)
    run_out(mesh)
    assert mesh.delivered[1] == again
    assert max(each.hit_tokens for each in mesh.matched) >= 20


def test_many_sessions_leave_no_place_for_drafts() -> None:
    mesh = SmallMesh(3, {"whole": Slice(0, 6)}, pages=400, guess=Seer(1.0))
    wanted = [ask(mesh, (n, n + 1), 30) for n in range(20)]
    whole = mesh.nodes[NodeId("whole")]
    while len(whole.sessions) < 20:
        mesh.turn()
    before = mesh.guess.said  # type: ignore[union-attr]
    while len(whole.sessions) == 20:
        mesh.turn()
    assert mesh.guess.said == before  # type: ignore[union-attr]
    run_out(mesh)
    assert mesh.delivered == wanted


# ---- with a sampler that draws


@dataclass
class Drawing:
    """The real sampler over logits that the toy model's last value stands for."""

    state: SamplerState

    def choose(self, values: list[int], draft: Sequence[int]) -> tuple[Sampled, ...]:
        return verify(torch.stack([logits_of(value) for value in values]), [self.state], [draft])[0]


class DrawingMesh(SmallMesh):
    def make_sampler(  # type: ignore[override]
        self, sampling: Sampling, prompt: Sequence[int], output: Sequence[int]
    ) -> Drawing:
        return Drawing(SamplerState(sampling, prompt, output))


def logits_of(value: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(value)) * 3


def drawn(prompt: tuple[int, ...], sampling: Sampling) -> list[int]:
    """The text of the unsplit model, token by token."""
    state, ids, finish = SamplerState(sampling, prompt), list(prompt), ""
    while not finish:
        values = list(ids)
        for _ in range(LAYERS):
            values = [layer(values[: at + 1]) for at in range(len(values))]
        one = sample(logits_of(values[-1])[None], [state])[0]
        ids.append(one.token)
        finish = one.finish
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "wanted",
    [
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"temperature": 1.0, "repetition_penalty": 1.2, "stop_ids": tuple(range(0, 97, 9))},
    ],
)
@pytest.mark.parametrize("kill", [False, True], ids=["undisturbed", "a stage dies"])
def test_drawn_texts_are_those_without_drafts(wanted: dict[str, object], kill: bool) -> None:
    for seed in range(3):
        sampling = Sampling(seed=seed, max_tokens=30, **wanted)  # type: ignore[arg-type]
        prompt = (5, 6, seed)
        text = drawn(prompt, sampling)
        seer = Seer(0.8, seed, texts=[[*prompt, *text, *text]])
        mesh = DrawingMesh(seed, SPARE, guess=seer)
        mesh.ask_for(prompt, sampling)
        while kill and len(text) > 9 and len(mesh.delivered[0]) < 8:
            mesh.turn()
        plan = mesh.generations[0].plan
        if kill and len(text) > 9:
            assert plan is not None
            mesh.kill(plan.stops[1].node)
        run_out(mesh)
        assert mesh.delivered[0] == text
        finish = mesh.finished[0]
        assert finish is not None
        assert finish.reason == ("length" if len(text) == 30 else "stop")
        assert_all_pages_are_back(mesh)


# ---- what others may send


def running(slices: dict[str, Slice]) -> tuple[SmallMesh, SessionId]:
    mesh = drafting(slices)
    ask(mesh, (1, 2, 3), 40)
    while len(mesh.delivered[0]) < 3:
        mesh.turn()
    session = mesh.generations[0].session
    assert session is not None
    return mesh, session


def test_a_draft_of_no_vocabulary_ends_the_session_and_blames_its_sender() -> None:
    mesh, session = running(THREE)
    middle = mesh.nodes[NodeId("b")].sessions
    entry = RowEntry(session, middle._sessions[session].position, 2, (VOCABULARY,))
    told, dropped = middle.receive(entry, [1], NodeId("a"), 0.0)
    assert isinstance(told, Send)
    assert told.message.node == "a"  # type: ignore[union-attr]
    assert dropped == Drop(session)


def test_nothing_is_guessed_amid_a_prompt() -> None:
    mesh, session = running(THREE)
    this = mesh.nodes[NodeId("b")].sessions._sessions[session]
    this.position, this.draft = 1, ()
    assert this.misplaced(RowEntry(session, 1, 2), VOCABULARY) == ""
    assert this.misplaced(RowEntry(session, 1, 2, (5,)), VOCABULARY)


def test_a_row_may_begin_where_the_last_draft_did_but_not_before() -> None:
    mesh, session = running(THREE)
    middle = mesh.nodes[NodeId("b")].sessions
    this = middle._sessions[session]
    this.position, this.draft = 20, (1, 2, 3)
    assert this.misplaced(RowEntry(session, 17, 1), VOCABULARY) == ""
    assert this.misplaced(RowEntry(session, 20, 1), VOCABULARY) == ""
    assert this.misplaced(RowEntry(session, 16, 1), VOCABULARY)
    assert this.misplaced(RowEntry(session, 21, 1), VOCABULARY)


@pytest.mark.parametrize("foretold", [(7,), (1, 2, 3, 4), (2, 1)])
def test_tokens_that_were_never_guessed_end_the_session(foretold: tuple[int, ...]) -> None:
    mesh, session = running(THREE)
    first = mesh.nodes[NodeId("a")].sessions
    this = first._sessions[session]
    this.position, this.draft = 20, (1, 2, 3)
    said = tuple(Sampled(token) for token in foretold)
    entry = TokenEntry(session, 17 - this.prompt_tokens, Sampled(9), said)
    told, *_ = first.token(entry, NodeId("c"), 0.0)
    assert isinstance(told, Send)
    assert told.message.node == "c"  # type: ignore[union-attr]


def test_a_gateway_takes_no_more_tokens_than_it_asked_for() -> None:
    mesh, session = running(THREE)
    generation = mesh.generations[0]
    before = len(generation.output)
    generous = tuple(Sampled(1) for _ in range(MAX_DRAFT))
    while generation.state == "running":
        entry = TokenEntry(session, len(generation.output), Sampled(2), generous)
        generation.token(entry, NodeId("c"))
    assert before < len(generation.output) == 40


def test_a_draft_without_the_token_before_it_is_no_row() -> None:
    with pytest.raises(ValueError, match="follows one token"):
        RowEntry(SessionId("0" * 16), 5, 2, (1, 2))


def test_a_message_of_many_tokens_is_cut_before_its_header_is_too_long() -> None:
    long = Sampled(1, "", -1.5, tuple(TokenLogprob(10**9, -1.5) for _ in range(20)))
    entry = TokenEntry(SessionId("0" * 16), 1 << 31, long, (long,) * MAX_DRAFT)
    messages = list(tokens_in_frames([entry] * 64))
    assert sum(len(each.entries) for each in messages) == 64
    for message in messages:
        frame = to_frame(message)
        assert len(frame.header) <= 64 << 10
        assert from_frame(frame) == message
