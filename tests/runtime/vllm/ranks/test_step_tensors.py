"""What a step looks like to vLLM's backend: by torch, by the Triton kernel, and as the definition says."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.measuring.pretend_gpu import DEVICE, PretendGpu
from hetis.runtime.vllm.ranks import step_tensors
from hetis.runtime.vllm.ranks.head_map import RankHeadMap, StepRequests, part_of, slots_of
from hetis.runtime.vllm.ranks.step_tensors import LocalSequences, StepLimits, StepTensors
from hetis.runtime.vllm.steps import LOCAL, Admitted, Gone, Grown

GROUPS, BLOCK, BLOCKS = 3, 4, 20_000
LIMITS = StepLimits(requests=2, tokens=4, blocks=2)  # small, so that the tensors have to grow
CPU = torch.device("cpu")


class Requests:
    """Random requests, all of whose groups are here."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.heads = RankHeadMap(GROUPS, BLOCKS, rows=2, width=2)
        self.free = list(range(BLOCKS - 1, 0, -1))
        self.rng.shuffle(self.free)
        self.running: dict[int, int] = {}  # tokens, by anchor

    def step(self, *, decodes: bool) -> tuple[list[int], list[int], list[int]]:
        """Admit, end and grow requests; return the anchors, counts and lasts of a step with most of them."""
        for number in range(self.rng.randrange(3)):
            anchor = self.free.pop()
            self.running[anchor] = 0
            self.heads.admit(Admitted(anchor, number, (LOCAL,) * GROUPS))
        if len(self.running) > 3:
            gone = self.rng.choice(list(self.running))
            del self.running[gone]
            self.heads.remove(Gone(gone))
            self.free.insert(0, gone)
        batch = self.rng.sample(list(self.running), max(len(self.running) - 1, min(1, len(self.running))))
        counts = [1 if decodes else self.rng.randrange(1, 9) for _ in batch]
        for anchor, count in zip(batch, counts, strict=True):
            had = -(-self.running[anchor] // BLOCK)
            self.running[anchor] += count
            more = -(-self.running[anchor] // BLOCK) - had
            for group in range(GROUPS if more else 0):
                self.heads.grow(Grown(anchor, group, had, tuple(self.free.pop() for _ in range(more))))
        return batch, counts, [self.running[anchor] for anchor in batch]


def described(anchors: list[int], counts: list[int], lasts: list[int], *, padding: int = 0) -> Any:
    """Return a step as vLLM describes it; padding has no tokens and block 0."""
    starts = torch.tensor([0, *np.cumsum(counts), *[sum(counts)] * padding], dtype=torch.int32)
    ends = torch.tensor([*lasts, *[0] * padding], dtype=torch.int32)
    return SimpleNamespace(
        num_reqs=len(anchors) + padding,
        num_actual_tokens=sum(counts) + padding,
        max_query_len=max(counts),
        max_seq_len=max(lasts) + 2,
        block_table_tensor=torch.tensor([[one, -1] for one in [*anchors, *[0] * padding]], dtype=torch.int32),
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=ends,
        seq_lens_cpu_upper_bound=ends,
    )


def check(found: LocalSequences, heads: RankHeadMap, anchors: list[int], counts: list[int], lasts: list[int]) -> None:
    """Compare with the host's selection of all groups."""
    requests = StepRequests(rows=heads.row_of[anchors], counts=np.array(counts), lasts=np.array(lasts))
    part = part_of(requests, np.ones((len(anchors), GROUPS), np.bool_))
    width = -(-max(lasts) // BLOCK)
    tables = heads.tables[requests.rows[part.requests], part.groups, :width]
    num, tokens = len(part), part.num_tokens
    assert found.starts[: num + 1].tolist() == found.starts_cpu[: num + 1].tolist() == part.starts.tolist()
    assert set(found.starts[num:].tolist()) == set(found.starts_cpu[num:].tolist()) == {tokens}
    assert found.lasts[:num].tolist() == found.lasts_cpu[:num].tolist() == part.lasts.tolist()
    assert found.slots[:tokens].tolist() == slots_of(part, tables, BLOCK).tolist()
    assert set(found.slots[tokens:].tolist()) <= {-1}
    for sequence, last in enumerate(part.lasts):
        blocks = -(-int(last) // BLOCK)
        assert found.tables[sequence, :blocks].tolist() == tables[sequence, :blocks].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_a_step_is_gathered_as_the_host_would_select_it(seed: int) -> None:
    requests = Requests(seed)
    tensors = StepTensors(requests.heads, LIMITS, BLOCK, CPU)
    for _ in range(30):
        decodes = requests.rng.random() < 0.5
        step = requests.step(decodes=decodes)
        if not step[0]:
            continue
        padding = requests.rng.randrange(3) if max(step[1]) == 1 else 0
        found = tensors.gather(described(*step, padding=padding))
        check(found, requests.heads, *step)
        assert tensors.read_anchors(len(step[0])).tolist() == step[0]


def test_addresses_stay_once_the_largest_step_was_made() -> None:
    requests = Requests(1)
    tensors = StepTensors(requests.heads, StepLimits(requests=20, tokens=200, blocks=100), BLOCK, CPU)
    addresses = tensors.addresses
    for _ in range(20):
        step = requests.step(decodes=requests.rng.random() < 0.5)
        if step[0]:
            found = tensors.gather(described(*step))
            assert found.tables.data_ptr() == addresses[0]
    assert tensors.addresses == addresses


def test_the_host_waits_for_nothing_while_all_groups_are_here() -> None:
    """Of the map, only changes are sent, but when it has grown."""
    requests, gpu, waited = Requests(2), PretendGpu(), []
    fields = ("block_table_tensor", "query_start_loc", "seq_lens")
    with gpu:
        tensors = StepTensors(requests.heads, StepLimits(requests=20, tokens=200, blocks=100), BLOCK, DEVICE)
    for _ in range(60):
        shape = requests.heads.tables.shape
        step = requests.step(decodes=requests.rng.random() < 0.5)
        if not step[0]:
            continue
        common = described(*step)
        for name in fields:
            setattr(common, name, gpu.put(getattr(common, name)))
        before = gpu.waits
        with gpu:
            found = tensors.gather(common)
            copied = {name: getattr(found, name).inner for name in ("tables", "slots", "starts", "lasts")}
        if shape == requests.heads.tables.shape:
            waited.append(gpu.waits - before)
        check(replace(found, **copied), requests.heads, *step)
    assert waited[0] == 1, "the whole map is sent once"
    assert not any(waited[1:])
    assert len(waited) > 30
    assert gpu.queued > len(waited)


@pytest.mark.skipif(find_spec("triton") is None, reason="NOT TESTED: Triton is not installed (extra dev)")
def test_the_kernel_gathers_the_same() -> None:
    """In Triton's interpreter, which must be enabled before Triton is imported."""
    command = [sys.executable, "-m", "tests.runtime.vllm.ranks.test_step_tensors"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[4]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr


def main() -> None:
    from hetis.runtime.vllm.ranks.gather_triton import gather_by_triton

    requests = Requests(3)
    tensors = StepTensors(requests.heads, LIMITS, BLOCK, CPU)
    step_tensors.gather_on = lambda _: gather_by_triton
    for number in range(20):
        step = requests.step(decodes=number % 2 == 0)
        if step[0]:
            tensors._gather = gather_by_triton
            padding = number % 3 if max(step[1]) == 1 else 0
            check(tensors.gather(described(*step, padding=padding)), requests.heads, *step)
    print("the same")


if __name__ == "__main__":
    main()
