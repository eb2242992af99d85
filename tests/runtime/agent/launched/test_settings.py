"""The file of ``--engine launch:FILE``: its meaning, and all of its errors at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetis.engines.errors import OptionError
from hetis.engines.versions import Engine
from hetis.formats.errors import DocumentError
from hetis.runtime.agent.launched.parts import EngineSettingsDocument, load_settings
from hetis.runtime.agent.options import EngineChoice, EngineKind

GOOD = """\
apiVersion: hetis/v1
kind: EngineSettings
engine: vllm
model: /models/{name}
"""


def read(folder: Path, text: str) -> EngineSettingsDocument:
    (folder / "engine.yaml").write_text(text, encoding="utf-8")
    return load_settings(folder / "engine.yaml")


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(DocumentError) as caught:
        read(folder, text)
    return [str(problem).replace(str(folder), "") for problem in caught.value.problems]


def test_four_lines_are_enough(tmp_path: Path) -> None:
    settings = read(tmp_path, GOOD)
    assert settings.served_by is Engine.VLLM
    assert settings.words == ("vllm", "serve")
    assert (settings.port, settings.device) == (8000, "cuda")


def test_words_are_a_list_or_as_a_shell_has_them(tmp_path: Path) -> None:
    listed = read(tmp_path, GOOD + 'program: [python, -m, "my vllm"]\noptions: [--max-model-len, "8192"]\n')
    spelled = read(tmp_path, GOOD + "program: python -m 'my vllm'\noptions: --max-model-len 8192\n")
    assert listed == spelled
    assert spelled.words == ("python", "-m", "my vllm")
    assert spelled.options == ["--max-model-len", "8192"]


def test_all_that_is_wrong_is_said_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
apiVersion: hetis/v1
kind: EngineSettings
engine: vlm
modle: /models
port: 70000
ready_timeout: 30
options: [--tensor-parallel-size, "2", --seed, "1"]
addresses: {a: "10.0.0.1 or so"}
attention_backend: TRITON ATTN
environment: {"NO=": "x"}
served_name: "{names}"
model: /models/{kv}
"""
    assert problems(tmp_path, text) == [
        "/engine.yaml:3: engine: 'vlm' is not one of vllm, vllm-hetis, sglang, did you mean vllm?",
        "/engine.yaml:4: modle: unknown field, did you mean model?",
        "/engine.yaml:5: port: is 70000, must be <= 65471",
        "/engine.yaml:6: ready_timeout: 30 has no unit: write it like 20us",
        "/engine.yaml:7: options: --tensor-parallel-size cannot be passed to the engine: the plan or these "
        "settings set it",
        "/engine.yaml:8: addresses.a: '10.0.0.1 or so' is not a valid address, must be an IP address or a name",
        "/engine.yaml:9: attention_backend: 'TRITON ATTN' is not a valid name of an attention backend",
        "/engine.yaml:10: environment.NO=: 'NO=' is not a valid name of an environment variable",
        "/engine.yaml:11: served_name: '{names}' may only have {name} in braces: the model's name in the plan",
        "/engine.yaml:12: model: '/models/{kv}' may only have {name} and {weights} in braces: the model's name and "
        "the precision of the replica's weights in the plan",
    ]
    assert problems(tmp_path, GOOD.replace("model: /models/{name}\n", "")) == ["/engine.yaml:1: model is missing"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("options: max 1", "'max' is not an engine option, options begin with -"),
        ('options: "\'"', "No closing quotation"),
        ("options: --ssl-keyfile k", "--ssl-keyfile cannot be passed to the engine: the agent asks it by HTTP"),
        ("options: [--uds=/run/vllm]", "--uds cannot be passed to the engine: the agent asks it by HTTP, at a port"),
        ("device: tpu", "'tpu' is not one of cuda, cpu"),
    ],
)
def test_one_problem_is_one_line(tmp_path: Path, line: str, says: str) -> None:
    (found,) = problems(tmp_path, f"{GOOD}{line}\n")
    assert found.startswith("/engine.yaml:")
    assert says in found


def test_the_agents_option_reads_the_file(tmp_path: Path) -> None:
    settings = read(tmp_path, GOOD)
    choice = EngineChoice.parse(f"launch:{tmp_path}/engine.yaml")
    assert (choice.kind, choice.settings) == (EngineKind.LAUNCH, settings)
    with pytest.raises(OptionError, match=r"no-such\.yaml"):
        EngineChoice.parse(f"launch:{tmp_path}/no-such.yaml")
