"""Settings: read once, checked at the start, and never a secret in a message."""

from pathlib import Path
from typing import Any

import pytest

from falproxy.errors import SettingsError
from falproxy.fal.image_formats import FAL_FORMATS, Format
from falproxy.settings import MIB, Settings, read_environment

KEY = {"FAL_KEY": "id:secret"}


def test_a_key_is_all_that_is_needed() -> None:
    settings = Settings.from_env(KEY)
    assert settings == Settings(fal_key="id:secret")
    assert (settings.host, settings.port, settings.max_body) == ("127.0.0.1", 8080, 100 * MIB)


def test_the_key_may_come_in_two_halves() -> None:
    env = {"FAL_KEY_ID": "id", "FAL_KEY_SECRET": "secret"}
    assert Settings.from_env(env).fal_key == "id:secret"


def test_the_whole_key_wins_over_its_halves() -> None:
    env = {"FAL_KEY": "a:b", "FAL_KEY_ID": "id", "FAL_KEY_SECRET": "secret"}
    assert Settings.from_env(env).fal_key == "a:b"


def test_the_key_is_not_in_the_repr() -> None:
    assert "secret" not in repr(Settings(fal_key="id:secret"))


def test_no_password_is_in_the_repr() -> None:
    env = {**KEY, "REDIS_URL": "rediss://ann:s3cret@redis.example:6379/0"}
    settings = Settings.from_env(env)
    assert settings.redis_url == env["REDIS_URL"]
    assert "s3cret" not in repr(settings)
    assert "redis.example" not in repr(settings)


def test_the_cache_is_on_for_kontext_and_shared_for_an_hour() -> None:
    settings = Settings.from_env(KEY)
    assert (settings.cache, settings.cache_scope, settings.cache_ttl) == (True, "shared", 3600.0)
    assert (settings.cache_max_entry, settings.cache_max_size) == (16 * MIB, 1024 * MIB)
    assert all("kontext" in endpoint for endpoint in settings.cache_endpoints)


SUPABASE = {"SUPABASE_URL": "https://abc.supabase.co", "SUPABASE_KEY": "sb_secret_s3cret"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        pytest.param({}, "off", id="nothing is configured"),
        pytest.param(SUPABASE, "supabase", id="Supabase is"),
        pytest.param({"SUPABASE_URL": "https://abc.supabase.co"}, "off", id="half of it is"),
        pytest.param({"FALPROXY_SANDBOX": "1"}, "disk", id="the sandbox"),
        pytest.param({"FALPROXY_SANDBOX": "1"} | SUPABASE, "supabase", id="Supabase and sandbox"),
        pytest.param({"FALPROXY_REHOST": "off"} | SUPABASE, "off", id="said: off"),
        pytest.param({"FALPROXY_REHOST": "Disk"} | SUPABASE, "disk", id="said: disk"),
    ],
)
def test_outputs_are_kept_where_they_can_be(env: dict[str, str], place: str) -> None:
    assert Settings.from_env(KEY | env).rehost_to == place


def test_a_strict_proxy_needs_a_place_for_outputs() -> None:
    strict = KEY | {"FALPROXY_REHOST_ON_ERROR": "error"}
    with pytest.raises(SettingsError, match="SUPABASE_KEY, or FALPROXY_REHOST=disk"):
        Settings.from_env(strict)
    assert Settings.from_env(strict | {"FALPROXY_REHOST": "disk"}).rehost_on_error == "error"


def test_no_key_of_supabase_is_in_the_repr() -> None:
    settings = Settings.from_env(KEY | SUPABASE | {"SUPABASE_SIGNED_URLS": "600"})
    assert settings.project is not None
    assert (settings.project.bucket, settings.project.signed_url_ttl) == ("fal_images", 600.0)
    assert "s3cret" not in repr(settings) + repr(settings.project)


@pytest.mark.parametrize("env", [{}, {"FAL_KEY": ""}, {"FAL_KEY_ID": "id"}])
def test_a_missing_key_names_both_ways_on(env: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"FAL_KEY is not set.*--sandbox"):
        Settings.from_env(env)


def test_the_sandbox_needs_no_key() -> None:
    assert Settings.from_env({"FALPROXY_SANDBOX": "1"}).sandbox


@pytest.mark.parametrize(
    ("key", "kind", "position"),
    [
        pytest.param(" id:s3cret", "white space", 1, id="leading space"),
        pytest.param("id:s3cret\n", "white space", 10, id="trailing newline, from echo"),
        pytest.param("id:s3\tcret", "white space", 6, id="a tab inside"),
        pytest.param('"id:s3cret"', "a quote", 1, id="quotes, from a shell or a YAML file"),
        pytest.param("id:s3cret\u00a0", "white space", 10, id="a no-break space, from a web page"),
        pytest.param("id:s3\u200bcret", "not ASCII", 6, id="a zero-width space"),
        pytest.param("id:s3\u0441ret", "not ASCII", 6, id="a Cyrillic letter"),
        pytest.param("id:s3\x00cret", "a control character", 6, id="a NUL"),
        pytest.param("id:s3cret\r\nx-evil: 1", "white space", 10, id="a header"),
    ],
)
def test_a_stray_character_in_the_key_is_named_by_its_position(
    key: str, kind: str, position: int
) -> None:
    with pytest.raises(SettingsError) as error:
        Settings.from_env({"FAL_KEY": key})
    assert f"({kind}) at position {position} of {len(key)}" in str(error.value)
    assert "s3" not in str(error.value)


@pytest.mark.parametrize(
    ("variable", "value", "field", "parsed"),
    [
        ("FALPROXY_HOST", "0.0.0.0", "host", "0.0.0.0"),
        ("FALPROXY_PORT", "0", "port", 0),
        ("FALPROXY_LOG_LEVEL", "DEBUG", "log_level", "debug"),
        ("FALPROXY_MAX_BODY", "1000", "max_body", 1000),
        ("FALPROXY_MAX_BODY", "5M", "max_body", 5 * MIB),
        ("FALPROXY_MAX_BODY", "1 GiB", "max_body", 1024 * MIB),
        ("FALPROXY_MAX_BODY", "64kb", "max_body", 65536),
        ("FALPROXY_CONNECT_TIMEOUT", "2.5", "connect_timeout", 2.5),
        ("FALPROXY_UPSTREAM_TIMEOUT", "60", "upstream_timeout", 60.0),
        ("FALPROXY_UPSTREAM_ORIGIN", "http://[::1]:80/", "upstream_origin", "http://[::1]:80"),
        ("FALPROXY_DRAIN", "5", "drain", 5.0),
        ("FALPROXY_SANDBOX", "off", "sandbox", False),
        ("FALPROXY_PUBLIC_URL", "https://a.b/c/", "public_url", "https://a.b/c"),
        ("FALPROXY_PORT", "", "port", 8080),
        ("FALPROXY_IMAGE_FORMATS", "jpg, PNG,jpeg", "image_formats", (Format.JPEG, Format.PNG)),
        ("FALPROXY_IMAGE_FORMATS", "HEIC", "image_formats", (Format.HEIC,)),
        ("FALPROXY_IMAGE_FORMATS", "", "image_formats", FAL_FORMATS),
        ("FALPROXY_CHECK_REMOTE_IMAGES", "1", "check_remote_images", True),
        ("FALPROXY_CHECK_REMOTE_IMAGES", "", "check_remote_images", False),
        ("FALPROXY_CACHE", "off", "cache", False),
        ("FALPROXY_CACHE", "", "cache", True),
        ("FALPROXY_CACHE_ENDPOINTS", "a/b, c/**", "cache_endpoints", ("a/b", "c/**")),
        ("FALPROXY_CACHE_TTL", "60", "cache_ttl", 60.0),
        ("FALPROXY_CACHE_SCOPE", "Principal", "cache_scope", "principal"),
        ("FALPROXY_CACHE_SCOPE", "shared", "cache_scope", "shared"),
        ("FALPROXY_REHOST", "Supabase", "rehost", "supabase"),
        ("FALPROXY_REHOST_ON_ERROR", "Passthrough", "rehost_on_error", "passthrough"),
        ("SUPABASE_SIGNED_URLS", "3600", "supabase_signed_urls", 3600.0),
        ("FALPROXY_CACHE_MAX_ENTRY", "1M", "cache_max_entry", MIB),
        ("FALPROXY_CACHE_MAX_SIZE", "2 GB", "cache_max_size", 2048 * MIB),
        ("REDIS_URL", "redis://localhost:6379/0", "redis_url", "redis://localhost:6379/0"),
        ("REDIS_URL", "rediss://u:p%40@h:1/2", "redis_url", "rediss://u:p%40@h:1/2"),
        ("REDIS_URL", "", "redis_url", None),
    ],
)
def test_a_value_arrives_in_its_final_type(
    variable: str, value: str, field: str, parsed: object
) -> None:
    assert getattr(Settings.from_env({**KEY, variable: value}), field) == parsed


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FALPROXY_PORT", "65536"),
        ("FALPROXY_PORT", "-1"),
        ("FALPROXY_PORT", "http"),
        ("FALPROXY_LOG_LEVEL", "loud"),
        ("FALPROXY_MAX_BODY", "0"),
        ("FALPROXY_MAX_BODY", "-5"),
        ("FALPROXY_MAX_BODY", "5 apples"),
        ("FALPROXY_CONNECT_TIMEOUT", "0"),
        ("FALPROXY_UPSTREAM_TIMEOUT", "nan"),
        ("FALPROXY_DRAIN", "inf"),
        ("FALPROXY_UPSTREAM_ORIGIN", "127.0.0.1:8081"),
        ("FALPROXY_UPSTREAM_ORIGIN", "http://127.0.0.1/path"),
        ("FALPROXY_UPSTREAM_ORIGIN", "http://user:secret@127.0.0.1"),
        ("FALPROXY_UPSTREAM_ORIGIN", "http://[oops"),
        ("FALPROXY_SANDBOX", "maybe"),
        ("FALPROXY_PUBLIC_URL", "ftp://a.b"),
        ("FALPROXY_PUBLIC_URL", "http://localhost:99999"),
        ("FALPROXY_ALLOWED_ENDPOINTS", "a-*-*-*-*"),
        ("FALPROXY_IMAGE_FORMATS", "jpeg,bmp"),
        ("FALPROXY_IMAGE_FORMATS", "image/png"),
        ("FALPROXY_CHECK_REMOTE_IMAGES", "sometimes"),
        ("FALPROXY_CACHE", "redis"),
        ("FALPROXY_CACHE_ENDPOINTS", "/fal-ai/flux"),
        ("FALPROXY_CACHE_ENDPOINTS", "a-*-*-*-*"),
        ("FALPROXY_CACHE_TTL", "0"),
        ("FALPROXY_CACHE_TTL", "1h"),
        ("FALPROXY_CACHE_TTL", "inf"),
        ("FALPROXY_CACHE_SCOPE", "private"),
        ("FALPROXY_REHOST", "s3"),
        ("FALPROXY_REHOST_ON_ERROR", "ignore"),
        ("SUPABASE_URL", "abc.supabase.co"),
        ("SUPABASE_SIGNED_URLS", "0"),
        ("FALPROXY_CACHE_MAX_ENTRY", "0"),
        ("FALPROXY_CACHE_MAX_ENTRY", "much"),
        ("FALPROXY_CACHE_MAX_SIZE", "-1"),
        ("FALPROXY_CACHE_MAX_SIZE", "1.5G"),
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "http://:secret@localhost:6379"),
        ("REDIS_URL", "redis://"),
        ("REDIS_URL", "redis://:secret@local host"),
        ("REDIS_URL", "unix:///secret/redis.sock"),
    ],
)
def test_a_value_without_sense_stops_the_start_and_is_named(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{variable} must (be|have) .*[^.]\\.$") as error:
        Settings.from_env({**KEY, variable: value})
    assert "secret" not in str(error.value)


def test_a_dotenv_file_is_read_below_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / ".env"
    file.write_text('# a comment\nFAL_KEY="id:secret"  # another\nFALPROXY_PORT=1\n')
    monkeypatch.delenv("FAL_KEY", raising=False)
    monkeypatch.setenv("FALPROXY_PORT", "2")
    env = read_environment(file)
    assert (env["FAL_KEY"], env["FALPROXY_PORT"]) == ("id:secret", "2")


def test_a_missing_dotenv_file_is_fine(tmp_path: Path) -> None:
    assert "PATH" in read_environment(tmp_path / ".env")


def test_a_misspelt_setting_stops_the_start() -> None:
    """It could be the lock of the door."""
    with pytest.raises(SettingsError, match="Did you mean FALPROXY_ACCESS_KEYS"):
        Settings.from_env({**KEY, "FALPROXY_ACESS_KEYS": "ann:s3cret"})


@pytest.mark.parametrize("name", ["FALPROXY_URL", "FALPROXY_KEY"])
def test_what_the_client_reads_may_stand_beside(name: str) -> None:
    assert Settings.from_env({**KEY, name: "x"}) == Settings.from_env(KEY)


@pytest.mark.parametrize("value", [",", " , ", " "])
@pytest.mark.parametrize(
    "variable",
    [
        "FALPROXY_ACCESS_KEYS",
        "FALPROXY_ALLOWED_ENDPOINTS",
        "AI_KEYS",
        "FALPROXY_CACHE_ENDPOINTS",
        "FALPROXY_IMAGE_FORMATS",
    ],
)
def test_a_list_of_nothing_stops_the_start(variable: str, value: str) -> None:
    """As two variables that are not set make it: the door must not open for that."""
    with pytest.raises(SettingsError, match=f"^{variable} must name at least one"):
        Settings.from_env({**KEY, variable: value})


@pytest.mark.parametrize(
    "given", [{"access_key": ""}, {"access_keys": (("ann", ""),)}, {"jwt_secret": ""}]
)
def test_an_empty_secret_stops_the_start(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="would let everybody in"):
        Settings(fal_key="a:b", **given)


def test_a_dotenv_file_in_another_encoding_is_said(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("FAL_KEY=a:b\n", encoding="utf-16")
    with pytest.raises(SettingsError, match="is not in UTF-8"):
        read_environment(file)
