"""The plugin's configuration file: what is valid, and that all problems are reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetis.runtime.vllm.plugin import check_version
from hetis.runtime.vllm.settings import PluginSettings, SettingsError, load_settings, read_settings, require_whole_pages

VALID = """
apiVersion: hetis/v1
kind: VllmWorkers
workers:
  - name: p100-0
    addresses: ["10.0.0.7:7070"]
    keyFile: /etc/hetis/key
"""


def test_a_small_file_has_defaults_for_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "workers.yaml"
    path.write_text(VALID)
    found = load_settings(path)
    assert [worker.addresses for worker in found.workers] == [("10.0.0.7:7070",)]
    assert (found.transport, found.encrypt) == ("auto", False)
    assert (found.dispatch.policy, found.redispatch.theta) == ("solver", 0.5)


def test_all_problems_are_told_with_the_file_and_their_places(tmp_path: Path) -> None:
    path = tmp_path / "workers.yaml"
    path.write_text(VALID.replace("10.0.0.7:7070", "10.0.0.7").replace("p100-0", '""') + "timeout: 3\n")
    with pytest.raises(SettingsError) as raised:
        load_settings(path)
    message = str(raised.value)
    assert str(path) in message
    for place in ("workers.0.name", "workers.0.addresses", "timeout"):
        assert place in message


@pytest.mark.parametrize("text", ["[1, 2", "workers: x", ""])
def test_what_is_no_such_document_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "workers.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"workers\.yaml"):
        load_settings(path)


def test_two_workers_of_one_name_or_address_or_of_other_numbers_of_ranks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "workers.yaml"
    worker = VALID[VALID.index("  - name") :]
    path.write_text(VALID + worker)
    with pytest.raises(SettingsError, match="names are not unique"):
        load_settings(path)
    path.write_text(VALID + worker.replace("p100-0", "p100-1"))
    with pytest.raises(SettingsError, match=r"not unique: 10\.0\.0\.7:7070, 10\.0\.0\.7:7070"):
        load_settings(path)
    path.write_text(VALID + worker.replace("p100-0", "p100-1").replace('"10.0.0.7:7070"', '"10.0.0.8:1", "10.0.0.8:2"'))
    with pytest.raises(SettingsError, match="one for each rank"):
        load_settings(path)


def test_no_worker_has_the_name_of_the_ranks(tmp_path: Path) -> None:
    path = tmp_path / "workers.yaml"
    path.write_text(VALID.replace("p100-0", "here"))
    with pytest.raises(SettingsError, match="the ranks themselves"):
        load_settings(path)


def test_a_missing_file_is_said_and_no_variable_means_no_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HETIS_VLLM_CONFIG", raising=False)
    assert read_settings() is None
    monkeypatch.setenv("HETIS_VLLM_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(SettingsError, match="no such file"):
        read_settings()


def test_versions_of_vllm_that_were_not_tested_are_refused() -> None:
    for version in ("0.30.0", "0.31.1", "0.32.0"):
        check_version(version)
    for version in ("0.29.0", "0.320", "1.0", "unknown"):
        with pytest.raises(SettingsError, match=r"tested: 0\.30\.x, 0\.31\.x, 0\.32\.x"):
            check_version(version)


@pytest.mark.parametrize(
    ("page_tokens", "block_tokens", "is_whole"), [(16, 128, True), (64, 16, False), (24, 32, False)]
)
def test_blocks_are_whole_numbers_of_pages(page_tokens: int, block_tokens: int, is_whole: bool) -> None:
    settings = PluginSettings(api_version="hetis/v1", kind="VllmWorkers", page_tokens=page_tokens)
    if is_whole:
        require_whole_pages(settings, block_tokens)
    else:
        with pytest.raises(SettingsError, match=f"pageTokens is {page_tokens}, must divide the {block_tokens} tokens"):
            require_whole_pages(settings, block_tokens)
