"""What `--backend` needs and what it excludes; waiting for an engine that is not there yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.config import load_settings
from shoal.errors import BackendFailed, BadConfig
from shoal.models.checkpoint import open_without_weights
from shoal.node import fronting, node_config
from shoal.node.fronting import until_it_answers

URL = "http://127.0.0.1:8000/v1"


def config(tmp_path: Path, *, serve: bool = True, env: dict[str, str] | None = None, **flags):
    home = {"SHOAL_HOME": str(tmp_path), **(env or {})}
    return node_config(load_settings({"model": "shoal-tiny", **flags}, env=home), serve=serve)


def test_without_a_backend_there_is_none(tmp_path: Path) -> None:
    assert config(tmp_path).backend is None


def test_the_key_comes_from_a_file_or_a_variable_and_is_shown_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    by_file = config(tmp_path, backend=URL, backend_key_file=str(file))
    by_variable = config(tmp_path, backend=URL, env={"SHOAL_BACKEND_KEY": "s3cret"})
    for made in (by_file, by_variable):
        assert made.backend is not None
        assert made.backend.address.key == "s3cret"
        assert "s3cret" not in repr(made)
        assert "8000" not in repr(made)
    assert "8000" not in repr(load_settings({"backend": URL}, env={"SHOAL_HOME": str(tmp_path)}))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"model": ""}, "which model"),
        ({"layers": "0:2"}, "contradict"),
        ({"dtype": "f32"}, "contradict"),
        ({"serve": False}, "contradict"),
        ({"backend": "ftp://x"}, "http or https"),
        ({"backend_key_file": "/nowhere/key"}, "key file"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, flags: dict, told: str) -> None:
    with pytest.raises(BadConfig, match=told):
        config(tmp_path, **{"backend": URL, **flags})


@pytest.mark.parametrize("flags", [{"dtype": "f32"}, {"quant": "int8"}])
def test_a_gguf_file_is_taken_as_it_is(tmp_path: Path, flags: dict) -> None:
    with pytest.raises(BadConfig, match="GGUF"):
        config(tmp_path, model="x.gguf", **flags)


def test_a_gguf_file_is_not_computed_on_a_gpu_and_a_device_has_a_name(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="computed on the CPU") as caught:
        config(tmp_path, model="x.gguf", device="cuda")
    assert "safetensors" in caught.value.hint
    with pytest.raises(BadConfig, match="'gpu' is no device"):
        config(tmp_path, device="gpu")
    assert config(tmp_path, model="m", device="cuda:1").device == "cuda:1"


def test_what_auto_would_choose_is_no_obstacle_to_a_gguf_file(tmp_path: Path) -> None:
    assert config(tmp_path, model="x.gguf").model == "x.gguf"


def test_the_engine_may_know_the_model_by_several_names(tmp_path: Path) -> None:
    checkpoint = open_without_weights("shoal-tiny")
    made = config(tmp_path, backend=URL).backend
    named = config(tmp_path, backend=URL, backend_model="their-name").backend
    assert made is not None
    assert named is not None
    assert "shoal-tiny" in made.names(checkpoint)
    assert named.names(checkpoint) == ("their-name",)


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    builtin = open_without_weights("shoal-tiny")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((builtin.folder / name).read_bytes())
    small = open_without_weights(str(tmp_path))
    assert (small.layers, small.vocab_size) == (builtin.layers, builtin.vocab_size)
    assert small.open_tokenizer().eos_ids == (0,)


@pytest.mark.anyio
async def test_an_engine_that_is_not_there_yet_is_waited_for_and_told_of_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fronting, "next_wait", lambda wait_s: 0.0001)

    class Late:
        asked = 0

        async def probe(self) -> None:
            self.asked += 1
            if self.asked < 5:
                raise BackendFailed("not yet")

    engine, told = Late(), []
    await until_it_answers(engine, told.append)  # type: ignore[arg-type]
    assert engine.asked == 5
    assert len(told) == 1
