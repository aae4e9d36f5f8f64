import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fastvlm_convert.errors import RecipeError, SettingsError
from fastvlm_convert.recipe import load_recipe, shipped_recipes
from fastvlm_convert.serve.settings import Settings
from fastvlm_convert.serve.settings_sources import allowed_values, load_settings, setting_facts

ROOT = Path(__file__).parent.parent.parent
SHIPPED = ROOT / "configs" / "serve.yaml"
PACKAGE = ROOT / "fastvlm_convert"

# The names and defaults of the issue, written down once more.
DEFAULTS = {
    "host": "127.0.0.1", "port": 8000, "env": "development", "model_name": None, "log_format": "auto",
    "engine": "embedded", "slots": 2, "threads": None, "batch_decode": False,
    "min_workers": 1, "max_workers": 1, "scaling_strategy": "adaptive",
    "timeout_seconds": 30, "max_queue": 64, "drain_seconds": 30,
    "breaker_failures": 5, "breaker_reset_seconds": 10,
    "max_tokens": 256, "max_question_chars": 4096, "max_images": 4, "max_image_size_mb": 20,
    "max_image_pixels": 16_000_000, "exif_orientation": True,
    "cache_enabled": True, "cache_scope": "shared", "cache_ttl_seconds": 3600, "cache_dir": None,
    "feature_cache_mb": 128, "prefix_cache_mb": 256,
    "api_key_file": None, "security_enabled": True, "rate_limit_per_minute": 100, "threat_action": "record",
    "ban_after": 0, "ban_seconds": 600, "incident_log": None, "trusted_proxies": (),
    "escalation_to": None, "escalation_threshold": None,
}  # fmt: skip


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def fault(**sources) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        load_settings(**sources)
    assert caught.value.code == "settings"
    assert "\n" not in str(caught.value)
    return caught.value


# What there is.


def test_defaults():
    loaded = load_settings()
    assert loaded.settings.model_dump() == DEFAULTS
    assert set(loaded.origins.values()) == {"default"}


def test_the_shipped_file_is_the_defaults():
    values = yaml.safe_load(SHIPPED.read_text())
    assert list(values) == list(Settings.model_fields)
    loaded = load_settings(file=SHIPPED)
    assert loaded.settings == Settings()
    assert all(origin.startswith(f"{SHIPPED}:") for origin in loaded.origins.values())


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_shipped_file_documents_every_setting(name):
    field = Settings.model_fields[name]
    found = re.search(rf"((?:^# .*\n)+){name}: ", SHIPPED.read_text(), re.MULTILINE)
    text = " ".join(found[1].replace("# ", "").split())
    assert text.endswith(f"{field.description} Allowed: {allowed_values(field)}.")


def test_the_shipped_file_is_no_recipe():
    assert "serve" not in shipped_recipes()
    with pytest.raises(RecipeError, match="unknown recipe 'serve'"):
        load_recipe("serve")
    with pytest.raises(RecipeError):
        load_recipe(SHIPPED)


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError):
        Settings().port = 1


# Where values come from.


def test_sources_in_their_order(tmp_path, monkeypatch):
    file = write(tmp_path, "# mine\nmax_queue: 1\nslots: 3\n\nport: 1111\n")
    monkeypatch.setenv("FAST_VLM_MAX_QUEUE", "2")
    monkeypatch.setenv("FAST_VLM_PORT", "2222")
    loaded = load_settings({"port": 3333, "host": None}, file)
    settings = loaded.settings
    assert (settings.port, settings.max_queue, settings.slots, settings.host) == (3333, 2, 3, "127.0.0.1")
    assert {name: loaded.origins[name] for name in ("port", "max_queue", "slots", "host")} == {
        "port": "command line, --port",
        "max_queue": "environment FAST_VLM_MAX_QUEUE",
        "slots": f"{file}:3",
        "host": "default",
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("MODEL_NAME", "fastvlm-0.5b", "fastvlm-0.5b"),
        ("CACHE_ENABLED", "false", False),
        ("TIMEOUT_SECONDS", "12.5", 12.5),
        ("SECURITY_ENABLED", "0", False),
        ("RATE_LIMIT_PER_MINUTE", "7", 7),
        ("MAX_IMAGE_SIZE_MB", "50", 50),
        ("CACHE_DIR", "/var/cache", Path("/var/cache")),
        ("CACHE_SCOPE", "key", "key"),
        ("THREADS", "null", None),
        ("TRUSTED_PROXIES", "10.0.0.0/8, ::1", ("10.0.0.0/8", "::1")),
        ("ENV", "development", "development"),
    ],
)
def test_values_from_the_environment(monkeypatch, name, text, value):
    monkeypatch.setenv(f"FAST_VLM_{name}", text)
    assert getattr(load_settings().settings, name.lower()) == value


@pytest.mark.parametrize("strategy", ["conservative", "aggressive", "adaptive", "predictive"])
def test_workers_from_the_environment(monkeypatch, strategy):
    monkeypatch.setenv("FAST_VLM_ENGINE", "processes")
    monkeypatch.setenv("FAST_VLM_MIN_WORKERS", "2")
    monkeypatch.setenv("FAST_VLM_MAX_WORKERS", "16")
    monkeypatch.setenv("FAST_VLM_SCALING_STRATEGY", strategy)
    settings = load_settings().settings
    assert (settings.min_workers, settings.max_workers, settings.scaling_strategy) == (2, 16, strategy)


def test_an_empty_variable_is_as_good_as_none(monkeypatch):
    monkeypatch.setenv("FAST_VLM_PORT", "")
    monkeypatch.setenv("FAST_VLM_ANYTHING", "")
    loaded = load_settings()
    assert (loaded.settings.port, loaded.origins["port"]) == (8000, "default")


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "trusted_proxies: [10.0.0.1]\n", "trusted_proxies: 10.0.0.1\n"]
)
def test_other_files(tmp_path, text):
    proxies = load_settings(file=write(tmp_path, text)).settings.trusted_proxies
    assert proxies == (("10.0.0.1",) if "10" in text else ())


# What is wrong, and where.


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("MAX_QUEUE", "many", "max_queue is 'many', expected an integer from 0 to 10000"),
        ("MAX_QUEUE", "-1", "max_queue is '-1', expected an integer from 0 to 10000"),
        ("MAX_QUEUE", "2.5", "max_queue is '2.5', expected an integer from 0 to 10000"),
        ("PORT", "tcp://10.0.0.1:80", "port is 'tcp://10.0.0.1:80', expected an integer from 0 to 65535"),
        ("TIMEOUT_SECONDS", "0", "timeout_seconds is '0', expected a number above 0, at most 3600"),
        ("TIMEOUT_SECONDS", "inf", "timeout_seconds is 'inf', expected a number above 0, at most 3600"),
        ("TIMEOUT_SECONDS", "nan", "timeout_seconds is 'nan', expected a number above 0, at most 3600"),
        ("FEATURE_CACHE_MB", "nan", "feature_cache_mb is 'nan', expected a number from 0 to 1000000"),
        ("ESCALATION_THRESHOLD", "1", "escalation_threshold is '1', expected a number of at most 0, or null"),
        ("CACHE_ENABLED", "maybe", "cache_enabled is 'maybe', expected true or false"),
        ("SCALING_STRATEGY", "ml", "expected conservative, aggressive, adaptive or predictive"),
        ("ENGINE", "vllm", "engine is 'vllm', expected embedded, processes or ray"),
        ("MODEL_NAME", "a b", "model_name is 'a b', expected a name of letters, digits and ._:/-, or null"),
        (
            "TRUSTED_PROXIES",
            "10.0.0.0/99",
            "trusted_proxies is '10.0.0.0/99', expected addresses or networks",
        ),
        ("MAX_WORKERS", "17", "max_workers is '17', expected an integer from 1 to 16"),
    ],
)
def test_impossible_values(monkeypatch, name, text, expected):
    monkeypatch.setenv(f"FAST_VLM_{name}", text)
    error = fault()
    assert expected in str(error)
    assert error.where == f"environment FAST_VLM_{name}"


@pytest.mark.parametrize(
    "line",
    [
        "max_queue: true",
        "cache_enabled: 1",
        "cache_dir: ''",
        "timeout_seconds: .inf",
        "port: [1]",
        "host: {}",
    ],
)
def test_impossible_values_in_a_file(tmp_path, line):
    file = write(tmp_path, f"slots: 1\n{line}\n")
    error = fault(file=file)
    assert error.where == f"{file}:2"
    assert str(error).startswith(f"{line.partition(':')[0]} is ")


def test_an_impossible_option_of_the_command_line():
    error = fault(options={"engine": "vllm"})
    assert error.where == "command line, --engine"


def test_unknown_names(tmp_path, monkeypatch):
    file = write(tmp_path, "port: 1\nmax_qeue: 3\n")
    error = fault(file=file)
    assert "no setting 'max_qeue'" in str(error)
    assert error.where == f"{file}:2"
    assert "did you mean 'max_queue'?" in error.hint
    monkeypatch.setenv("FAST_VLM_API_KEY", "sk-secret")
    error = fault()
    assert error.where == "environment FAST_VLM_API_KEY"
    assert "sk-secret" not in f"{error} {error.hint}"


def test_what_kubernetes_sets_is_explained(monkeypatch):
    monkeypatch.setenv("FAST_VLM_PORT_8000_TCP", "tcp://10.0.0.1:8000")
    assert "Service" in fault().hint


@pytest.mark.parametrize(
    "name", ["IMAGE_SIZE", "BITS", "QUANTIZATION", "CONTEXT", "CONTEXT_LENGTH", "PROMPT"]
)
def test_what_the_bundle_decides(tmp_path, monkeypatch, name):
    assert "the bundle decides it" in str(fault(file=write(tmp_path, f"{name.lower()}: 4\n")))
    monkeypatch.setenv(f"FAST_VLM_{name}", "4")
    error = fault()
    assert "the bundle decides it" in str(error)
    assert error.where == f"environment FAST_VLM_{name}"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"engine": "processes", "min_workers": 3, "max_workers": 2},
            "min_workers 3 is more than max_workers 2",
        ),
        ({"batch_decode": True}, "batch_decode true is not offered"),
        ({"max_workers": 2}, "max_workers 2 has no effect with engine embedded"),
        ({"min_workers": 2, "max_workers": 2}, "min_workers 2 has no effect with engine embedded"),
        (
            {"scaling_strategy": "predictive"},
            "scaling_strategy predictive has no effect with engine embedded",
        ),
        ({"scaling_strategy": "predictive", "engine": "ray"}, "has no effect with engine ray"),
        ({"env": "production"}, "env production needs an API key"),
        ({"escalation_to": "large"}, "given together"),
        ({"escalation_threshold": -0.5}, "given together"),
        ({"threat_action": "block", "security_enabled": False}, "has no effect with security_enabled false"),
        ({"ban_after": 3, "security_enabled": False}, "has no effect with security_enabled false"),
    ],
)
def test_settings_that_exclude_each_other(options, expected):
    error = fault(options=options)
    assert expected in str(error)
    assert all(f"{name}: " in error.where for name in error.settings)
    assert "command line" in error.where


def test_settings_that_go_together(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sk-secret\n")
    options = {"env": "production", "api_key_file": keys, "ban_after": 3, "threat_action": "block"}
    options |= {"engine": "ray", "max_workers": 4, "escalation_to": "large", "escalation_threshold": -0.5}
    settings = load_settings(options).settings
    assert {name: getattr(settings, name) for name in options} == options


def test_a_key_in_place_of_its_file_is_not_shown(monkeypatch):
    monkeypatch.setenv("FAST_VLM_API_KEY_FILE", "sk-secret")
    error = fault()
    assert "api_key_file names no file" in str(error)
    assert "sk-secret" not in f"{error} {error.hint}"


@pytest.mark.parametrize(
    "content", [b"- a\n- b\n", b"text", b"a: [", b"\xff\xfe\x00", b"port: 1\nport: 2\n", b"1: 2\n"]
)
def test_files_that_are_no_settings(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert str(path) in fault(file=path).where


def test_files_that_cannot_be_read(tmp_path):
    assert "No such file" in str(fault(file=tmp_path / "none.yaml"))
    assert fault(file=tmp_path).where == str(tmp_path)


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2)
)


@given(st.dictionaries(st.sampled_from([*Settings.model_fields, "bits", "x"]), VALUES, max_size=4))
def test_anything_gives_settings_or_an_error_of_ours(options):
    try:
        settings = load_settings(options).settings
    except SettingsError:
        return
    assert 1 <= settings.min_workers <= settings.max_workers <= 16
    assert 0 < settings.timeout_seconds < math.inf


# What is shown.


def test_facts_of_every_setting(tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    keys.write_text("sk-secret\n")
    monkeypatch.setenv("FAST_VLM_API_KEY_FILE", str(keys))
    monkeypatch.setenv("FAST_VLM_TRUSTED_PROXIES", "10.0.0.1,10.0.0.2")
    facts = {fact.name: fact for fact in setting_facts(load_settings({"port": 1}))}
    assert list(facts) == list(DEFAULTS)
    assert facts["port"].environment == "FAST_VLM_PORT"
    assert (facts["port"].value, facts["port"].default) == (1, 8000)
    assert facts["port"].origin == "command line, --port"
    assert facts["api_key_file"].value == str(keys)
    assert facts["trusted_proxies"].value == "10.0.0.1,10.0.0.2"
    assert facts["cache_enabled"].value is True
    assert all(fact.allowed and fact.description.endswith(".") for fact in facts.values())
    assert "sk-secret" not in repr(facts)


def test_every_setting_is_read_somewhere():
    """One that nobody reads would be a promise that nobody keeps."""
    own = {"settings.py", "settings_sources.py"}
    sources = [path for path in (PACKAGE / "serve").rglob("*.py") if path.name not in own]
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*sources, PACKAGE / "cli" / "serve.py"])
    unread = [name for name in Settings.model_fields if not re.search(rf"settings\.{name}\b", text)]
    assert unread == ["batch_decode"]  # which is refused
