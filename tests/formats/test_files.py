"""Files are read with clear messages, and written completely or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Literal

import pytest
import yaml

from hetis.formats import files
from hetis.formats.documents import dump_data, load_cluster
from hetis.formats.errors import DocumentError
from hetis.formats.files import read_text, write_atomically

PAPER = Path(__file__).parent.parent.parent / "examples" / "paper.yaml"


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    target.write_text("old")
    target.chmod(0o600)
    write_atomically(target, "new")
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "plan.json"
    target.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DocumentError, match="cannot be written: No space left on device"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_ctrl_c_during_a_write_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "plan.json", "new")
    assert os.listdir(tmp_path) == []


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    write_atomically(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=f"cannot be written: no folder {tmp_path / 'nowhere'}"):
        write_atomically(tmp_path / "nowhere" / "plan.json", "text")


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no such file"):
        read_text(tmp_path / "missing.yaml")
    with pytest.raises(DocumentError, match=r"^the name of a file is empty$"):  # as of a variable that is not set
        read_text("")
    with pytest.raises(DocumentError, match="is a folder, expected a file"):
        read_text(tmp_path)


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_BYTES", 2**20)
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(DocumentError, match="is larger than 1 MiB"):
        read_text(huge)


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PAPER.read_bytes())))
    assert load_cluster("-") == load_cluster(PAPER)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"kind: Plan")))
    with pytest.raises(DocumentError, match=r"^stdin:1: kind: is 'Plan', expected Cluster$"):
        load_cluster("-")


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "paper.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + PAPER.read_bytes())
    assert load_cluster(path) == load_cluster(PAPER)


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "plan")
    assert os.read(reader, 100) == b"plan"
    os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_name_that_is_not_utf_8_is_written_in_escapes(form: Literal["yaml", "json"]) -> None:
    text = dump_data({"cluster": os.fsdecode(b"caf\xe9.yaml")}, form)
    assert text.encode()
    assert yaml.safe_load(text) == {"cluster": r"caf\xe9.yaml"}
