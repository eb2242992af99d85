"""Random models of every kind, and the numbers and names in them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from hetis.formats.models.dtypes import PRECISIONS
from hetis.solver.model import (
    DraftShape,
    GpuPrecision,
    ModelSpec,
)
from tests.models import model_of, shape_of

POSITIVE = st.floats(min_value=1e-12, max_value=1e15)


NOT_NEGATIVE = st.just(0.0) | POSITIVE


TITLES = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z")) | st.sampled_from(" #:-'\"{}[]&*!|>%@`1e5~"),
    min_size=1,
    max_size=12,
).filter(lambda text: bool(text.strip()) and text.isprintable())


SMALL = st.integers(min_value=1, max_value=64)


@st.composite
def precisions(draw: st.DrawFn) -> tuple[GpuPrecision, ...]:
    element = st.floats(min_value=0.1, max_value=16)
    return tuple(
        GpuPrecision(
            gpu=gpu,
            weights=draw(st.sampled_from(sorted(PRECISIONS))),
            weight_bytes=draw(element),
            kv_bytes=draw(element),
        )
        for gpu in draw(st.lists(TITLES, max_size=3, unique=True))
    )


def indexers(with_kv: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        shape_of,
        top_tokens=SMALL,
        heads=SMALL,
        head_dim=SMALL,
        key_bytes=st.floats(min_value=0.5, max_value=1e4),
        layers=st.none() | st.integers(1, with_kv),
    )


def compressed_layers(layers: int, head_dim: int, groups: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        shape_of,
        window=SMALL,
        sparse_layers=st.integers(1, layers // 2),
        sparse_ratio=SMALL,
        heavy_layers=st.integers(0, layers // 2),
        heavy_ratio=SMALL,
        top_entries=SMALL,
        index_heads=SMALL,
        index_head_dim=SMALL,
        index_key_bytes=st.floats(min_value=0.5, max_value=1e4),
        rope_head_dim=st.integers(0, head_dim),
        q_lora_rank=SMALL,
        o_groups=st.just(groups),
        o_lora_rank=SMALL,
    )


def linear_layers(layers: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        shape_of,
        layers=st.integers(1, layers - 1),
        params=SMALL,
        state_bytes=st.floats(min_value=1, max_value=1e9),
        token_flops=st.floats(min_value=0, max_value=1e9),
    )


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    kv_heads, group, layers = draw(SMALL), draw(SMALL), draw(st.integers(2, 100))
    latent = draw(st.booleans())
    element = st.floats(min_value=0.1, max_value=4.0)
    mla = shape_of(
        kv_lora_rank=draw(SMALL),
        qk_rope_head_dim=draw(SMALL),
        qk_nope_head_dim=draw(SMALL),
        v_head_dim=draw(SMALL),
        q_lora_rank=draw(st.none() | SMALL),
    )
    moe = shape_of(
        num_experts=draw(st.integers(8, 64)),
        active_experts=draw(st.integers(1, 8)),
        expert_intermediate=draw(SMALL),
        shared_experts=draw(st.integers(0, 2)),
        first_dense_layers=(dense := draw(st.integers(0, layers - 1))),
        every=draw(st.integers(1, min(4, layers - dense))),
    )
    linear = draw(st.none() | linear_layers(layers))
    with_kv = layers - (0 if linear is None else linear["layers"])
    window, head_dim = draw(st.none() | st.integers(1, 10_000)), draw(SMALL)
    compressed = None
    if not latent and linear is None and window is None and draw(st.booleans()):
        kv_heads, compressed = 1, draw(compressed_layers(layers, head_dim, group))
    return model_of(
        name=draw(TITLES),
        num_layers=layers,
        hidden=draw(SMALL),
        intermediate=draw(SMALL),
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=draw(SMALL),
        weight_bytes=draw(element),
        kv_bytes=draw(element),
        activation_bytes=draw(element),
        embedding_bytes=draw(element),
        gated_mlp=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        max_position=draw(st.integers(1, 10**6)),
        sliding_window=window,
        sliding_layers=draw(st.none() | st.integers(1, with_kv)) if window is not None else None,
        windows_free_kv=draw(st.booleans()),
        gated_attention=draw(st.booleans()),
        residual_streams=draw(st.integers(1, 4)),
        norms_span_heads=draw(st.booleans()),
        vision_params=draw(st.integers(0, 10**9)),
        linear=linear,
        draft=draw(st.none() | st.builds(DraftShape, tokens=st.integers(1, 16), acceptance=st.floats(0, 1))),
        indexer=draw(st.none() | indexers(with_kv)) if latent and mla["q_lora_rank"] and window is None else None,
        compressed=compressed,
        float16=draw(st.booleans()),
        mla=mla if latent else None,
        moe=moe if draw(st.booleans()) else None,
        forbidden_cuts=frozenset(draw(st.sets(st.integers(0, layers - 1), max_size=3))),
        precisions=draw(precisions()),
    )
