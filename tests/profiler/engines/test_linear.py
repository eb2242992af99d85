"""The gated delta rule under an engine: the contents of the shipped file, and a profile that uses it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from hetis.formats import catalogue
from hetis.formats.documents import dump
from hetis.formats.positions import parse_text
from hetis.formats.profile import parse_profile
from hetis.profiler import linear
from hetis.profiler.engines import ENGINES, for_engine
from hetis.profiler.possible import implausible_fits, scope_words
from hetis.profiler.roofline import modelled_profile
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, FitRegion, FitScope, Op, Profile
from tests.models import InShort, replace
from tools import engine_kernels

B200 = catalogue.find_gpu("B200-SXM-180GB").gpu
H100 = catalogue.find_gpu("H100-SXM-80GB").gpu
A100 = catalogue.find_gpu("A100-SXM-80GB").gpu
QWEN = catalogue.find_model("Qwen/Qwen3.5-397B-A17B").model
BARE = modelled_profile(B200)
(ATTENTION,) = (fit for fit in BARE.fits if fit.op is Op.PREFILL_ATTENTION)
RULE_FLOPS = 6 * 128 * 128 + 2 * 64 * (3 * 128 + 2 * 128)  # per value head and token, in chunks of 64
# Rows of the tables: GPU, engine, value heads, tokens of a prompt, microseconds of both kernels.
PUBLISHED = (
    (B200, "vllm", 64, 8192, 481.4), (B200, "vllm", 8, 8192, 349.3), (B200, "vllm", 8, 1024, 61.8),
    (B200, "sglang", 64, 8192, 1066.5), (B200, "sglang", 8, 8192, 343.4), (B200, "sglang", 64, 1024, 152.2),
    (H100, "vllm", 64, 8192, 574.0), (H100, "vllm", 8, 8192, 432.1), (H100, "vllm", 8, 1024, 63.0),
    (H100, "sglang", 64, 8192, 1509.2), (H100, "sglang", 64, 1024, 208.5),
)  # fmt: skip


def kernel_of(engine: str, architecture: str = "Blackwell") -> linear.DeltaRuleKernel:
    (kernel,) = (k for k in linear.shipped() if (k.architecture, k.engine) == (architecture, engine))
    return kernel


def with_attention(fit: Fit) -> Profile:
    """Return the modelled profile with this fit of prefill attention."""
    return replace(BARE, fits=(*(one for one in BARE.fits if one is not ATTENTION), fit))


def rule_s(engine: str, heads: float, tokens: int, gpu: GpuType = B200) -> float:
    kernel = kernel_of(engine, gpu.architecture)
    work_s = kernel.flop * heads * tokens * RULE_FLOPS / gpu.fp16_flops
    return kernel.fixed_s + kernel.token_s * tokens + work_s


@pytest.mark.parametrize(("gpu", "engine", "heads", "tokens", "published_us"), PUBLISHED)
def test_the_file_says_what_the_tables_measured(
    gpu: GpuType, engine: str, heads: int, tokens: int, published_us: float
) -> None:
    assert rule_s(engine, heads, tokens, gpu) * 1e6 == pytest.approx(published_us, rel=0.15)


def test_every_engine_has_a_kernel_on_four_architectures_and_errors_are_known() -> None:
    kernels = linear.shipped()
    assert {(k.architecture, k.engine) for k in kernels} == set(
        itertools.product(("Hopper", "Blackwell", "RTX Blackwell", "Ada"), ENGINES)
    )
    for kernel in kernels:
        assert 1e-5 < kernel.fixed_s < 4e-5
        assert kernel.flop > 1
        assert kernel.mape < {"Ada": 0.35, "RTX Blackwell": 0.16}.get(kernel.architecture, 0.11)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_prompt_takes_the_rule_in_three_of_four_layers_and_attention_in_the_fourth(engine: str) -> None:
    tp = 4
    mean = for_engine(BARE, B200, engine).fit(Op.PREFILL_ATTENTION, QWEN, tp)
    for tokens in (64, 1024, 16384):
        heads = tokens * QWEN.q_heads / tp
        flops = QWEN.attention_flops(tokens * tokens / 2, QWEN.q_heads / tp)  # for a mean layer
        work = {"num_bytes": 1e6 * tokens, "tokens": tokens, "heads": heads}
        found = mean.seconds(flops=flops + tokens * QWEN.state_flops() / tp, **work)
        own = ATTENTION.seconds(flops=4.0 * flops, **(work | {"num_bytes": 4e6 * tokens}))
        assert found == pytest.approx(own / 4 + 0.75 * rule_s(engine, 64 / tp, tokens), rel=0.01)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_profile_of_an_engine_has_the_rule_for_models_that_have_it(engine: str) -> None:
    hosted = for_engine(BARE, B200, engine)
    half = replace(
        QWEN, linear=vars(InShort(QWEN).linear) | {"layers": 30}
    )  # unknown share: as attention, by its FLOPs
    for model in (catalogue.find_model("Llama-3.1-8B").model, half):
        assert hosted.fit(Op.PREFILL_ATTENTION, model, 1) == BARE.fit(Op.PREFILL_ATTENTION, model, 1)
    assert hosted.fit(Op.DECODE_ATTENTION, QWEN, 1) == BARE.fit(Op.DECODE_ATTENTION, QWEN, 1)
    assert list(implausible_fits(hosted, B200)) == []
    assert for_engine(hosted, B200, engine) == hosted
    assert parse_profile(*parse_text(dump(hosted), "p.yaml")) == hosted


def test_attention_fits_of_the_models_heads_have_the_rule_too_and_those_of_other_heads_do_not() -> None:
    scopes = [FitScope(head_dim=dim, queries_per_group=16) for dim in (128, 256)]
    profile = replace(BARE, fits=(*BARE.fits, *(replace(ATTENTION, scope=scope) for scope in scopes)))
    of_any, of_256 = linear.linear_fits(B200, profile, "vllm")
    assert list(scope_words(of_any.scope)) == ["linear attention, 270336 FLOP/token/head"]
    assert of_256.scope == replace(of_any.scope, head_dim=256, queries_per_group=16)
    assert for_engine(profile, B200, "vllm").fit(Op.PREFILL_ATTENTION, QWEN, 1) == of_256


def test_what_was_not_measured_is_scaled_from_hopper_and_says_so() -> None:
    (fit,) = linear.linear_fits(A100, modelled_profile(A100), "vllm")
    assert fit.provenance.origin.endswith("gated delta rule; scaled from Hopper")
    (fit,) = linear.linear_fits(B200, BARE, "vllm")
    assert fit.provenance.origin.endswith("on B200-SXM-180GB, gated delta rule")
    # The error and region of attention alone are not known for both operators together.
    assert ATTENTION.provenance.held_out_mape is not None
    stated = replace(ATTENTION, region=FitRegion(tokens=(1, 9)))
    (fit,) = linear.linear_fits(B200, with_attention(stated), "vllm")
    assert (fit.provenance.held_out_mape, fit.provenance.range_error, fit.region) == (None, None, None)


def test_a_rule_that_is_faster_than_attention_costs_what_attention_counts() -> None:
    slow = replace(ATTENTION, pieces=tuple(replace(piece, flop_s=1.0) for piece in ATTENTION.pieces))
    (fit,) = linear.linear_fits(B200, with_attention(slow), "vllm")
    assert [piece.head_s for piece in fit.pieces] == pytest.approx(
        [piece.head_s / 4 for piece in slow.pieces], rel=1e-3
    )


def test_made_up_tables_give_back_what_made_them(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    systems = {"h100_sxm": "H100-SXM-80GB", "b200_sxm": "B200-SXM-180GB", "l40s": "L40S"}
    systems["rtx_pro_6000_server"] = "RTX-PRO-6000-Server-96GB"
    engines = {"vllm": "0.24.0", "sglang": "0.5.14", "trtllm": "1.3.0rc20"}
    for (system, name), (engine, version) in itertools.product(systems.items(), engines.items()):
        rows = list[dict[str, object]]()
        peak = catalogue.find_gpu(name).gpu.fp16_flops
        for heads, tokens in itertools.product((2, 16, 64), (16, 256, 1024, 8192, 32768)):
            rule = 2e-5 + 3e-8 * tokens + 5.0 * heads * tokens * RULE_FLOPS / peak
            row = {"phase": "context", "batch_size": 1, "seq_len": tokens, "num_v_heads": heads, "model_name": "m"}
            rows += [row | {"kernel_source": "causal_conv1d_fn", "latency": 1e-3}]
            rows += [row | {"kernel_source": "chunk_gated_delta_rule_triton", "latency": rule * 1e3}]
            rows += [row | {"kernel_source": "causal_conv1d_fn", "latency": 1e3, "model_name": "no rule"}]
            for other in ({"batch_size": 2}, {"seq_len": 8}, {"phase": "generation"}):
                rows += [row | {"kernel_source": "other", "latency": 1e3} | other]
        path = tmp_path / system / "linear_attention" / engine / version / "gdn_perf.parquet"
        path.parent.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert engine_kernels.main(["linear", "--tables", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 0
    made = json.loads((tmp_path / "out.json").read_text())["kernels"]
    assert len(made) == 12
    for kernel in made:
        found = kernel["fixed_s"], kernel["token_s"], kernel["flop"]
        assert found == pytest.approx((2.1e-5, 3e-8, 5.0), rel=0.01)
        assert kernel["num_points"] == 15
    assert engine_kernels.main(["linear", "--tables", str(tmp_path / "none"), "--out", str(tmp_path / "out.json")]) == 1
