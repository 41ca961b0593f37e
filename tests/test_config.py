"""Where a setting comes from, and what happens to one that cannot be used."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import (
    Folders,
    Settings,
    load_settings,
    parse_memory,
    setting_types,
    unknown_variables,
)
from shoal.errors import BadConfig

GB = 10**9


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"SHOAL_HOME": str(tmp_path)}


def write(env: dict[str, str], text: str) -> Path:
    file = Path(env["SHOAL_HOME"]) / "config.toml"
    file.write_text(text)
    return file


def test_without_any_source_the_defaults_hold(env: dict[str, str]) -> None:
    settings = load_settings(env=env)
    assert (settings.api_host, settings.api_port) == ("127.0.0.1", 7470)
    assert set(settings.origins.values()) == {"default"}
    assert list(settings.origins) == list(setting_types())


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(env: dict[str, str]) -> None:
    write(env, 'api_port = 1\nthreads = 1\nname = "file"\n')
    env |= {"SHOAL_API_PORT": "2", "SHOAL_THREADS": "2"}
    settings = load_settings({"api_port": 3}, env=env)
    assert (settings.api_port, settings.threads, settings.name) == (3, 2, "file")
    origins = [settings.origins[name] for name in ("api_port", "threads", "name", "mesh")]
    assert origins == ["flag", "variable", "file", "default"]


def test_a_flag_that_was_not_given_says_nothing(env: dict[str, str]) -> None:
    settings = load_settings({"api_port": None}, env=env | {"SHOAL_API_PORT": "2"})
    assert (settings.api_port, settings.origins["api_port"]) == (2, "variable")


def test_an_unknown_name_in_the_file_is_refused_with_the_nearest_known_one(
    env: dict[str, str],
) -> None:
    file = write(env, "api_prot = 7471\n")
    with pytest.raises(BadConfig, match=r"'api_prot'") as refusal:
        load_settings(env=env)
    assert str(file) in refusal.value.message
    assert refusal.value.hint == "did you mean api_port?"


def test_an_unknown_name_like_no_other_lists_what_there_is(env: dict[str, str]) -> None:
    write(env, "xyzzy = 1\n")
    with pytest.raises(BadConfig) as refusal:
        load_settings(env=env)
    assert "kv_tokens" in refusal.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_port", "many"),
        ("api_port", "70000"),
        ("threads", "-1"),
        ("lan", "perhaps"),
        ("quant", "int9"),
        ("dtype", "float32"),
        ("name", "x" * 65),
    ],
)
def test_a_value_of_the_wrong_kind_names_setting_and_value(
    env: dict[str, str], name: str, value: str
) -> None:
    with pytest.raises(BadConfig) as refusal:
        load_settings(env=env | {f"SHOAL_{name.upper()}": value})
    assert name in refusal.value.message
    assert value in refusal.value.message


def test_text_is_one_line_and_a_secret_is_not_shown(env: dict[str, str]) -> None:
    with pytest.raises(BadConfig, match="control characters") as refusal:
        load_settings(env=env | {"SHOAL_API_KEY": "sesame\x07"})
    assert "sesame" not in refusal.value.message


def test_settings_that_belong_to_us_cannot_be_set_from_outside(env: dict[str, str]) -> None:
    write(env, 'folders = "/"\n')
    with pytest.raises(BadConfig, match="'folders'"):
        load_settings(env=env)


@pytest.mark.parametrize("text", ["api_port = ", "\xff\xfe", "[api"])
def test_a_file_that_is_not_toml_is_named(env: dict[str, str], text: str) -> None:
    file = write(env, "")
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadConfig, match="cannot be read") as refusal:
        load_settings(env=env)
    assert str(file) in refusal.value.message


def test_only_a_file_that_was_asked_for_has_to_exist(env: dict[str, str], tmp_path: Path) -> None:
    load_settings(env=env)
    with pytest.raises(BadConfig, match="there is no file"):
        load_settings(env=env, file=tmp_path / "other.toml")


def test_lists_and_truth_values_are_read_from_variables(env: dict[str, str]) -> None:
    env |= {"SHOAL_RELAYS": "ws://a:1, wss://b/x,", "SHOAL_LAN": "false"}
    settings = load_settings(env=env)
    assert settings.relays == ("ws://a:1", "wss://b/x")
    assert settings.lan is False


def test_lists_are_read_from_the_file(env: dict[str, str]) -> None:
    write(env, 'relays = ["ws://a:1"]\n')
    assert load_settings(env=env).relays == ("ws://a:1",)


def test_misspelt_variables_are_found() -> None:
    env = {"SHOAL_HOME": "/x", "SHOAL_MODEL": "m", "SHOAL_MODLE": "m", "PATH": "/bin"}
    assert unknown_variables(env) == ["SHOAL_MODLE"]


def test_the_api_key_is_not_shown(env: dict[str, str]) -> None:
    settings = load_settings({"api_key": "hush-hush"}, env=env)
    assert settings.api_key == "hush-hush"
    assert "hush-hush" not in repr(settings)


def test_a_refused_api_key_is_not_shown(env: dict[str, str]) -> None:
    with pytest.raises(BadConfig) as refusal:
        load_settings({"api_key": ["hush-hush"]}, env=env)
    assert "hush-hush" not in refusal.value.message


def test_shoal_home_moves_every_folder(tmp_path: Path) -> None:
    folders = Folders.find({"SHOAL_HOME": str(tmp_path)})
    places = (folders.data, folders.config, folders.cache, folders.state)
    assert all(place.is_relative_to(tmp_path) for place in places)
    assert folders.config_file == tmp_path / "config.toml"


def test_without_shoal_home_the_key_is_data_and_not_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    folders = Folders.find({})
    assert "cache" not in str(folders.identity_file).lower()
    assert folders.identity_file.parent == folders.data
    assert not folders.capability_file.is_relative_to(folders.data)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("60%", 6 * GB),
        ("100 %", 10 * GB),
        ("8GB", 8 * GB),
        ("0.5gb", GB // 2),
        ("2GiB", 2 << 30),
        ("500M", 500 * 10**6),
        ("4096B", 4096),
    ],
)
def test_memory_is_a_share_or_an_amount(text: str, amount: int) -> None:
    assert parse_memory(text, 10 * GB) == amount


@pytest.mark.parametrize(
    "text", ["", "much", "60", "-1GB", "0%", "101%", "11GB", "8 XB", "9" * 400 + "%"]
)
def test_memory_that_cannot_be_offered_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadConfig) as refusal:
        parse_memory(text, 10 * GB)
    assert "60%" in refusal.value.hint


@given(st.text(max_size=12) | st.from_regex(r"\d+(\.\d+)? ?[kmgtKMGT]?i?[bB%]", fullmatch=True))
def test_any_text_is_an_amount_of_memory_or_a_clear_refusal(text: str) -> None:
    with suppress(BadConfig):
        assert 0 < parse_memory(text, 10 * GB) <= 10 * GB


def test_every_setting_has_a_default_of_its_own_kind(env: dict[str, str]) -> None:
    defaults = load_settings(env=env)
    as_flags = {name: getattr(defaults, name) for name in setting_types()}
    again = load_settings(as_flags, env=env)
    assert isinstance(again, Settings)
    assert again == defaults


def test_importing_the_settings_loads_neither_pydantic_nor_platformdirs() -> None:
    code = "import sys, shoal.config; print(*{'pydantic', 'platformdirs'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
