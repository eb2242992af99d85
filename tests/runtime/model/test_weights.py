"""Only what a process owns is read, and shards and stages together are the model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from hetis.runtime.model.config import read_config
from hetis.runtime.model.decoder import Decoder
from hetis.runtime.model.errors import ModelError
from hetis.runtime.model.linear import Linear, PackedLinear, make_linear, packs
from hetis.runtime.model.shard import Shard
from hetis.runtime.model.weights import load_weights
from tests.runtime.checkpoints import random_model, rewrite_config


def split_checkpoint(folder: Path, into: Path) -> Path:
    """The same model in many files with an index."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        random_model().model.save_pretrained(into, max_shard_size="20KB")
    assert (into / "model.safetensors.index.json").is_file()
    return into


def dense(decoder: Decoder, tokens: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden states or logits of a model whose attention is that every query head returns its group's value."""
    positions = decoder.positions(torch.arange(len(tokens)))
    if hidden is None:
        hidden = decoder.embed(tokens, positions)
    for layer in range(len(decoder.layers)):
        projected = decoder.project(layer, hidden, positions)
        q, v = projected[:, : decoder.q_heads], projected[:, -decoder.kv_heads :]
        values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1) + q
        hidden = decoder.finish(layer, hidden, values.reshape(len(tokens), -1))
    return decoder.output(hidden) if decoder.weights.output is not None else hidden


@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 4), ("qwen2", 2), ("qwen3", 4), ("opt", 8)])
def test_stages_give_what_the_whole_model_gives(family: str, kv_heads: int) -> None:
    folder = random_model(family, kv_heads=kv_heads, tie_word_embeddings=family == "qwen2").folder
    tokens = torch.arange(7)
    whole = Decoder.from_folder(folder)
    stages = [Decoder.from_folder(folder, layers=layers) for layers in (range(1), range(1, 3))]
    hidden = None
    for stage in stages:
        hidden = dense(stage, tokens, hidden)
    torch.testing.assert_close(hidden, dense(whole, tokens))
    assert stages[0].weights.output is None
    assert stages[1].weights.embedding is None
    assert max(stage.weights.bytes_read for stage in stages) < whole.weights.bytes_read


@pytest.mark.parametrize(
    ("family", "kv_heads", "size"), [("llama", 4, 2), ("qwen2", 2, 4), ("qwen3", 4, 4), ("opt", 8, 2)]
)
def test_ranks_together_give_what_one_gives(family: str, kv_heads: int, size: int) -> None:
    folder = (
        random_model(family, kv_heads=kv_heads, attention_bias=True).folder
        if family == "llama"
        else random_model(family, kv_heads=kv_heads).folder
    )
    config = read_config(folder)
    tokens = torch.arange(5)
    whole = Decoder.from_folder(folder)
    ranks = [Decoder.from_folder(folder, shard=Shard(rank=rank, size=size)) for rank in range(size)]
    for rank in ranks:
        assert (rank.q_heads, rank.kv_heads) == (config.q_heads // size, max(config.kv_heads // size, 1))
        assert rank.weights.bytes_read < whole.weights.bytes_read
    positions = whole.positions(torch.arange(len(tokens)))
    hidden = whole.embed(tokens, positions)
    q = whole.project(0, hidden, positions)[:, : whole.q_heads]
    parts = [rank.project(0, hidden, positions)[:, : rank.q_heads] for rank in ranks]
    torch.testing.assert_close(torch.cat(parts, dim=1), q)
    attention = q.reshape(len(tokens), -1)
    heads = config.q_heads // size * config.head_dim
    pieces = [
        rank.weights.layers[0].o(attention[:, i * heads : (i + 1) * heads].contiguous()) for i, rank in enumerate(ranks)
    ]
    torch.testing.assert_close(sum(pieces), whole.weights.layers[0].o(attention))


def test_a_checkpoint_in_many_files_is_the_same(tmp_path: Path) -> None:
    folder = random_model().folder
    split = split_checkpoint(folder, tmp_path / "split")
    assert len(list(split.glob("*.safetensors"))) > 1
    tokens = torch.arange(7)
    assert torch.equal(dense(Decoder.from_folder(split), tokens), dense(Decoder.from_folder(folder), tokens))


def test_files_of_other_layers_are_not_needed(tmp_path: Path) -> None:
    split = split_checkpoint(random_model().folder, tmp_path / "split")
    index = json.loads((split / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    needed = {file for name, file in index.items() if ".layers.1." in name}
    for file in set(index.values()) - needed:
        (split / file).unlink()
    config = read_config(split)
    load_weights(split, config, layers=range(1, 2))
    with pytest.raises(ModelError, match=r"\.safetensors"):
        load_weights(split, config)


def test_a_checkpoint_that_is_not_the_configs_is_refused(tmp_path: Path) -> None:
    folder = rewrite_config(random_model().folder, tmp_path / "model", vocab_size=98)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight has shape \[97, 64\], must be \[98, 64\] by config"):
        Decoder.from_folder(folder)
    folder = rewrite_config(random_model().folder, tmp_path / "deeper", num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.3\."):
        Decoder.from_folder(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"model\.safetensors: "):
        Decoder.from_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        Decoder.from_folder(folder)


def test_a_shard_that_does_not_divide_the_heads_is_refused() -> None:
    with pytest.raises(ModelError, match="tensor parallelism of 3 does not divide 8 query heads"):
        Decoder.from_folder(random_model().folder, shard=Shard(rank=0, size=3))


@pytest.mark.parametrize("rows", [1, 16, 33])
def test_packed_weights_give_the_same_product(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias, other = (
        torch.randn(size, generator=generator) for size in ((rows, 40), (56, 40), (56,), (rows, 56))
    )
    plain, chosen = Linear(weight, bias), make_linear(weight, bias)
    assert isinstance(chosen, PackedLinear) == packs(torch.float32)
    torch.testing.assert_close(chosen(x), plain(x))
    torch.testing.assert_close(chosen.plus(x, other.clone()), plain.plus(x, other.clone()))


def test_without_packing_plain_torch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("no such operation")

    packs.cache_clear()
    monkeypatch.setattr(PackedLinear, "__init__", missing)
    try:
        assert isinstance(make_linear(torch.ones(4, 4)), Linear)
    finally:
        packs.cache_clear()
