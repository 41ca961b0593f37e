import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shoal.engine import prove as prove_module
from shoal.engine.kv import PagedKv
from shoal.engine.prove import PROVED, prove, why_not
from shoal.engine.states import Noted, SessionStates
from shoal.errors import UnsupportedModel
from shoal.models.checkpoint import Checkpoint
from shoal.models.shrink import shrink
from shoal.units import ModelId

from ..models.families import COMMON, EVERY, FAMILIES, HYBRIDS

Tiny = Callable[[str], tuple[Checkpoint, Any]]


def checkpoint_of(config: dict[str, Any]) -> Checkpoint:
    return Checkpoint("some", Path("nowhere"), config, {}, ModelId("0" * 16))


def default(model_type: str) -> dict[str, Any]:
    """The configuration that transformers would make of nothing: a real model's size."""
    missing: dict[str, dict[str, Any]] = {
        "deepseek_v2": {"num_experts_per_tok": 6},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
        "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    }
    raw = CONFIG_MAPPING[model_type]().to_dict()
    return {**raw, **missing.get(model_type, {}), "model_type": model_type}


@pytest.mark.parametrize("model_type", ["olmo2", "cohere2", "granite", "starcoder2", "glm", "phi"])
def test_a_family_that_nobody_listed_is_proved_and_served(model_type: str) -> None:
    assert model_type not in PROVED
    prove(checkpoint_of(default(model_type)))


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("llama4_text", "chunked_attention"),
        ("jamba", "its logits differ"),
        ("minimax", "uses cache of its own"),
        ("glm_moe_dsa", "indexed_attention"),
        ("falcon", "its attention cannot be replaced"),
        ("recurrent_gemma", "its parts are not named"),
        ("t5", "not a plain text decoder"),
        ("no_such_model", "transformers .* does not know models of type 'no_such_model'"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(model_type: str, why: str) -> None:
    config = (
        default(model_type)
        if model_type in CONFIG_MAPPING
        else {**COMMON, "model_type": model_type}
    )
    with pytest.raises(UnsupportedModel, match=why) as refusal:
        prove(checkpoint_of(config))
    assert model_type in str(refusal.value)


def test_every_listed_family_is_in_the_equality_test() -> None:
    assert {config["model_type"] for config in EVERY.values()} == PROVED


@pytest.mark.parametrize("model_type", ["mistral", "gpt_oss", "deepseek_v3"])
def test_another_transformers_proves_the_listed_families_again(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(prove_module, "PROVED_WITH", "4.0.")
    monkeypatch.setattr(
        prove_module, "why_not", lambda tiny: asked.append(tiny["model_type"]) or ""
    )
    prove(checkpoint_of(FAMILIES[model_type]))
    assert asked == [model_type]


@pytest.mark.parametrize("model_type", sorted(PROVED))
def test_the_tiny_copies_of_real_sizes_hold(model_type: str) -> None:
    config = default(model_type)
    tiny = shrink(config)
    assert tiny["hidden_size"] <= 64
    assert tiny["num_hidden_layers"] < 13
    assert why_not(tiny) == ""


def test_a_wrong_result_is_noticed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same proof with a cache that forgets windows: the proof must not hold."""
    monkeypatch.setattr(PagedKv, "_mask", lambda *_: None)
    assert "differ from the plain model" in why_not(FAMILIES["mistral"])


FORGETFUL: dict[str, Any] = {
    "_clear": lambda *_: None,
    "mix": lambda states, layer, mixer, x: mixer(x, Noted()),
}


@pytest.mark.parametrize("forgotten", FORGETFUL)
def test_a_state_that_is_mistaken_is_noticed(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """One that outlives its session, and one that is not kept at all."""
    monkeypatch.setattr(SessionStates, forgotten, FORGETFUL[forgotten])
    assert "differ from the plain model" in why_not(HYBRIDS["lfm2"])


def test_a_verdict_is_remembered_for_this_configuration_and_these_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []

    def verdict(config: dict[str, Any]) -> str:
        runs.append(config["model_type"])
        return "it is Tuesday"

    monkeypatch.setattr(prove_module, "why_not", verdict)
    unlisted = {**COMMON, "model_type": "olmo2"}
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match="olmo2 cannot be served yet: it is Tuesday"):
            prove(checkpoint_of(unlisted), tmp_path / "proofs")
    assert len(runs) == 1
    with pytest.raises(UnsupportedModel):
        prove(checkpoint_of({**unlisted, "attention_bias": True}), tmp_path / "proofs")
    assert len(runs) == 2
    assert len(list((tmp_path / "proofs").iterdir())) == 2


def test_a_spoilt_note_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove_module, "why_not", lambda tiny: "")
    unlisted = checkpoint_of({**COMMON, "model_type": "olmo2"})
    prove(unlisted, tmp_path)
    (note,) = tmp_path.iterdir()
    note.write_text("{")
    prove(unlisted, tmp_path)
    assert json.loads(note.read_text()) == {"failure": ""}
