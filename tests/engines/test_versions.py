"""Engines only get options that exist in the recorded version."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

import pytest

from hetis.engines.commands import Addresses, Command, commands_of
from hetis.engines.layout import layout_of
from hetis.engines.serving import Serving, program_of
from hetis.engines.versions import VERSIONS, Engine
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan, Role
from tests.engines.plans import MODEL, POOL, WITH_EXPERTS, plan_of, sharing_experts, stage_of, staged
from tests.engines.recorded import RECORDED
from tests.models import replace, shape_of

WHOLE = stage_of(kv_head_groups_kept=8)
PAIR = stage_of(num_layers=3, tp=2, devices=("a/1", "a/0"), kv_head_groups_kept=4)
TAIL = stage_of(first_layer=3, num_layers=1, tp=2, devices=("c/0", "c/1"), kv_head_groups_kept=4)
PLANS = {
    "whole": plan_of(WHOLE),
    "staged": plan_of(PAIR, TAIL, in_flight=2),
    "prefill": plan_of(PAIR, TAIL, role=Role.PREFILL, micro_batch=0, in_flight=2),
    "decode": plan_of(WHOLE, role=Role.DECODE, chunk_tokens=0),
    "experts": sharing_experts(),
}
WITH_WORKERS = {"workers": plan_of(stage_of(), pools=(POOL,)), "workers of stages": staged()}


def commands(plan: Plan, engine: Engine, **changes: object) -> tuple[Command, ...]:
    serving = Serving(
        model="/models/tiny",
        program=program_of(engine),
        options=("--host", "10.0.0.1", "--port", "8000"),
        limits_kv=True,
        dtype="bfloat16",
        served_name="tiny",
    )
    model = WITH_EXPERTS if plan == PLANS["experts"] else MODEL
    layout = layout_of(plan, 0, replace(model, kv_bytes=1.0) if engine is Engine.SGLANG else model, engine=engine)
    return commands_of(layout, replace(serving, **changes), Addresses(hosts={"a": "10.0.0.1", "c": "10.0.0.3"}))


def told(command: Command) -> dict[str, str]:
    """Return the options with their values, empty if a line has none."""
    words = [*command.shown, "--"]
    return {name: "" if value.startswith("--") else value for name, value in pairwise(words) if name.startswith("--")}


@pytest.mark.parametrize("engine", list(Engine))
def test_engines_are_told_nothing_that_was_not_recorded(engine: Engine) -> None:
    recorded, plans = RECORDED[engine], PLANS | (WITH_WORKERS if engine is Engine.VLLM_HETIS else {})
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSIONS[engine])
    for plan in plans.values():
        for command in commands(plan, engine):
            if command.process.kind.value.startswith("server"):
                assert told(command).keys() <= recorded.options.keys()
                variables = {name for name in command.environment if not name.startswith("CUDA_")}
                assert variables <= recorded.variables.keys()


def test_engines_are_told_of_the_longest_request_that_fits() -> None:
    # For 1,000 tokens of KV room; vLLM finds its own, maybe a tenth less.
    for engine, name, most in ((Engine.VLLM, "--max-model-len", "880"), (Engine.SGLANG, "--context-length", "992")):
        [one] = commands(PLANS["whole"], engine)
        assert told(one)[name] == most
        [given] = commands(PLANS["whole"], engine, options=(name, "512"))
        assert (given.shown.count(name), told(given)[name]) == (1, "512")
        if engine is Engine.VLLM:  # vLLM sizes its own KV by default, and checks the context against it
            assert name not in told(commands(PLANS["whole"], engine, limits_kv=False)[0])


def test_sglang_is_told_of_shape_room_and_meeting() -> None:
    first, second = commands(PLANS["staged"], Engine.SGLANG)
    assert first.shown[:4] == ("sglang", "serve", "--model-path", "/models/tiny")
    for rank, command in enumerate((first, second)):
        options = told(command)
        assert (options["--tp-size"], options["--pp-size"], options["--nnodes"]) == ("2", "2", "2")
        assert (options["--node-rank"], options["--dist-init-addr"]) == (str(rank), "10.0.0.1:29501")
        assert (options["--max-running-requests"], options["--pp-max-micro-batch-size"]) == ("8", "4")
        assert (options["--chunked-prefill-size"], options["--max-total-tokens"]) == ("32", "1000")
        assert command.environment["SGLANG_PP_LAYER_PARTITION"] == "3,1"
    assert (first.environment["CUDA_VISIBLE_DEVICES"], second.environment["CUDA_VISIBLE_DEVICES"]) == ("1,0", "0,1")
    [alone] = commands(PLANS["whole"], Engine.SGLANG, dtype="auto")
    assert told(alone)["--kv-cache-dtype"] == "fp8_e4m3"
    assert not {"--tp-size", "--pp-size", "--nnodes", "--dtype"} & told(alone).keys()
    [given] = commands(PLANS["whole"], Engine.SGLANG, options=("--max-running-requests", "9"))
    assert given.shown.count("--max-running-requests") == 1


def test_prefill_and_decode_are_paired_by_nixl() -> None:
    for engine in (Engine.VLLM, Engine.VLLM_HETIS):
        prefill, further = commands(PLANS["prefill"], engine)
        assert (
            told(prefill)["--kv-transfer-config"] == '{"kv_connector": "NixlPushConnector", "kv_role": "kv_producer"}'
        )
        [whole] = commands(plan_of(WHOLE, role=Role.PREFILL, micro_batch=0), engine)
        assert told(whole)["--kv-transfer-config"] == '{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}'
        assert prefill.environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.1"
        assert prefill.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "5600"
        assert "VLLM_NIXL_SIDE_CHANNEL_HOST" not in further.environment
        [decode] = commands(PLANS["decode"], engine)
        assert told(decode)["--kv-transfer-config"] == '{"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}'
        assert told(decode)["--max-num-batched-tokens"] == "4"
        assert "VLLM_NIXL_SIDE_CHANNEL_HOST" not in decode.environment
        both = replace(PLANS["decode"], replicas=(*PLANS["decode"].replicas, *PLANS["prefill"].replicas))
        [decode] = commands(both, engine)
        assert told(decode)["--kv-transfer-config"] == '{"kv_connector": "NixlPushConnector", "kv_role": "kv_consumer"}'
        assert decode.environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.1", "it is asked where to write"
    prefill, _ = commands(PLANS["prefill"], Engine.SGLANG)
    assert (told(prefill)["--disaggregation-mode"], told(prefill)["--disaggregation-bootstrap-port"]) == (
        "prefill",
        "5600",
    )
    [decode] = commands(PLANS["decode"], Engine.SGLANG)
    assert told(decode)["--disaggregation-mode"] == "decode"
    assert not {"--disaggregation-bootstrap-port", "--chunked-prefill-size"} & told(decode).keys()


def test_states_are_laid_out_as_nixl_transfers_them() -> None:
    """Its workers do not start otherwise (`is_conv_state_dim_first` in vLLM's nixl/base_worker.py)."""
    with_states = replace(MODEL, linear=shape_of(layers=2, params=1, state_bytes=1000.0))
    prefill = plan_of(WHOLE, role=Role.PREFILL, micro_batch=0)

    def variables(plan: Plan, model: ModelSpec, engine: Engine) -> Mapping[str, str]:
        [one] = commands_of(layout_of(plan, 0, model, engine=engine), Serving(model="/models/tiny"), Addresses())
        return one.environment

    for plan in (prefill, PLANS["decode"]):
        assert variables(plan, with_states, Engine.VLLM)["VLLM_SSM_CONV_STATE_LAYOUT"] == "DS"
        assert "VLLM_SSM_CONV_STATE_LAYOUT" in RECORDED[Engine.VLLM].variables
    for plan, model, engine in (
        (prefill, MODEL, Engine.VLLM),
        (PLANS["whole"], with_states, Engine.VLLM),
        (prefill, with_states, Engine.SGLANG),
    ):
        assert "VLLM_SSM_CONV_STATE_LAYOUT" not in variables(plan, model, engine)
