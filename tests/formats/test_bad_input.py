"""Every broken file in ``tests/bad_input`` gives exactly the message in its ``NAME.expected``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hetis.formats.documents import (
    load_cluster,
    load_model,
    load_plan,
    load_profile,
    load_requests,
    load_state,
    load_tenants,
    load_workload,
)
from hetis.formats.errors import DocumentError

FOLDER = Path(__file__).parent.parent / "bad_input"
FILES = sorted(path.name for path in FOLDER.iterdir() if path.suffix != ".expected")
LOADERS: dict[str, Callable[[str], object]] = {  # by the first word of the file's name
    "cluster": load_cluster,
    "model": load_model,
    "workload": load_workload,
    "profile": load_profile,
    "plan": load_plan,
    "state": load_state,
    "requests": load_requests,
    "tenants": load_tenants,
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_gives_its_one_clear_message(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)  # so that messages hold the bare file name
    with pytest.raises(DocumentError) as caught:
        LOADERS[name.partition("_")[0]](name)
    assert f"{caught.value}\n" == (FOLDER / f"{name}.expected").read_text(encoding="utf-8")


def test_there_are_many_broken_files_and_no_message_without_one() -> None:
    assert len(FILES) >= 45
    assert {path.stem for path in FOLDER.glob("*.expected")} == set(FILES)
