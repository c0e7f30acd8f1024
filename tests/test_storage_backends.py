"""The table of storage backends."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from falproxy import Settings
from falproxy.app.components import create_storage, rehosted_prefixes, serves_files
from falproxy.storage_backends import BACKENDS, REHOST_VALUES, select_backend
from falproxy.stores.files import Storage
from tests.support.settings import make_settings

PROJECT = {"supabase_url": "https://x.supabase.co/", "supabase_key": "sb_secret_a"}


def configured(rehost: str, **more: object) -> Settings:
    return make_settings(fal_key="a:b", rehost=rehost, **PROJECT | more)


def test_the_values_of_the_setting_are_the_backends_with_auto_and_off() -> None:
    assert REHOST_VALUES == ("auto", "supabase", "disk", "off")


@pytest.mark.parametrize("name", BACKENDS)
def test_the_module_of_a_backend_creates_its_storage(name: str, tmp_path: Path) -> None:
    module = import_module(BACKENDS[name].module)
    storage: Storage = module.create_storage(configured(name, data_dir=tmp_path))
    assert type(storage) is type(create_storage(configured(name, data_dir=tmp_path)))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_serves_files_if_its_storage_has_local_files(name: str, tmp_path: Path) -> None:
    settings = configured(name, data_dir=tmp_path)
    assert serves_files(settings) is (create_storage(settings).local_files is not None)


def test_without_a_backend_nothing_is_served() -> None:
    assert not serves_files(configured("off"))
    assert rehosted_prefixes(configured("off")) == []
    assert select_backend("off", configured("off")) is None


@pytest.mark.parametrize(
    ("rehost", "prefixes"),
    [
        pytest.param("disk", ["https://proxy.example/ai/files/"], id="disk"),
        pytest.param(
            "supabase",
            [
                "https://x.supabase.co/storage/v1/object/public/fal%20images/",
                "https://x.supabase.co/storage/v1/object/sign/fal%20images/",
            ],
            id="supabase",
        ),
    ],
)
def test_the_urls_of_stored_files_have_known_prefixes(rehost: str, prefixes: list[str]) -> None:
    settings = configured(
        rehost, public_url="https://proxy.example/ai/", supabase_bucket="fal images"
    )
    assert rehosted_prefixes(settings) == prefixes


def test_the_disk_has_no_known_prefix_without_a_public_url() -> None:
    assert rehosted_prefixes(configured("disk")) == []


def test_reading_the_settings_imports_no_backend() -> None:
    code = (
        "import sys, falproxy.settings as s\n"
        "s.Settings.from_env({'FAL_KEY': 'a:b', 'FALPROXY_REHOST': 'disk'})\n"
        "print([name for name in sys.modules if name.startswith('falproxy.stores')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
