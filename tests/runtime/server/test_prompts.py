"""Servers that share prompts: clients of the one that decodes see one engine, and what is wrong is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetis.runtime.engine.generate import generate
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.server.asked import PromptAddresses
from hetis.runtime.server.errors import ServeError
from hetis.runtime.server.options import checked_prompts
from hetis.runtime.server.prompts import listen_for_prompts
from hetis.runtime.server.text import Tokens
from hetis.runtime.transport.tcp import listen
from tests.runtime.server.live import MODEL, Live, engine_of
from tests.runtime.server.test_workers import free_port


def test_a_client_of_the_decoding_server_gets_the_text_of_one_engine(folder: Path) -> None:
    where = ("127.0.0.1", free_port())
    body = {"model": MODEL, "prompt": "computed there, decoded here", "max_tokens": 24, "temperature": 0}
    prompt = Tokens.from_folder(folder).encode(str(body["prompt"]))
    (wanted,) = generate(engine_of(folder), [prompt], SamplingParams(max_tokens=24, ignore_eos=True))
    with (
        Live(engine_of(folder), folder, prompts=PromptAddresses(listens=where), key="k" * 16) as there,
        Live(engine_of(folder), folder, prompts=PromptAddresses(peers=(where,)), key="k" * 16) as here,
    ):
        assert here.comes_to(1, "hetis_prefill_peers_up")
        client = here.client()
        answer = client.completions.create(**body, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
        assert answer.choices[0].text == wanted.text
        assert here.comes_to(1, "hetis_prompts_received_total")
        assert there.comes_to(1, "hetis_prompts_sent_total")
        assert there.metric("hetis_prompts_sent_bytes_total") == here.metric("hetis_prompts_received_bytes_total") > 0
        there.tell()
        there.join()
        assert here.comes_to(0, "hetis_prefill_peers_up")
        answer = client.completions.create(**body, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
        assert answer.choices[0].text == wanted.text


def test_addresses_of_prompts_are_checked_and_need_a_key_where_others_reach_them() -> None:
    with pytest.raises(ServeError) as caught:
        checked_prompts("0.0.0.0:8700", ["b:1", "b:1", "b"], has_key=False, insecure=False)
    assert caught.value.messages == (
        "--kv-listen and --prefill are both given, may be one of them: an engine computes prompts for others, or has "
        "its own computed",
        "--kv-listen 0.0.0.0:8700 can be reached from other machines: give --api-key-file or HETIS_API_KEY, or "
        "--insecure",
        "--prefill is 'b', must be HOST:PORT such as 10.0.0.2:8700",
        "--prefill b:1 comes twice",
    )
    with pytest.raises(ServeError, match="--kv-listen is 'x:0', must be HOST:PORT such as"):
        checked_prompts("x:0", [], has_key=True, insecure=False)
    found = checked_prompts("0.0.0.0:8700", [], has_key=True, insecure=False)
    assert found == PromptAddresses(listens=("0.0.0.0", 8700))
    found = checked_prompts("", ["[::1]:5"], has_key=True, insecure=False)
    assert found == PromptAddresses(peers=(("::1", 5),))


def test_an_address_that_is_taken_is_told_before_anything_is_loaded() -> None:
    with listen("127.0.0.1") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"--kv-listen 127.0.0.1:{port}: address already in use"):
            listen_for_prompts(("127.0.0.1", port))
