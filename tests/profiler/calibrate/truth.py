"""A replica with known true times, and the observations that it would give."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from hetis.formats.models.document import load_model
from hetis.profiler.calibrate.observed import Observation, Observed, ObservedWork
from hetis.profiler.calibrate.replica import CalibratedReplica
from hetis.profiler.defaults import shipped_profile
from hetis.solver.cluster import Link

MODEL, GPU = "Llama-3.1-8B", "H100-SXM-80GB"


@cache
def replica(tp: int = 1) -> CalibratedReplica:
    profile = shipped_profile(GPU)
    assert profile is not None
    return CalibratedReplica(load_model(MODEL), profile, tp=tp, link=Link(bytes_per_s=450e9, latency_s=0.0))


@dataclass(frozen=True)
class Truth:
    """An engine whose kernels take ``kernels`` times the profile's times, with these times on its host."""

    kernels: float = 1.25
    step_s: float = 2e-3
    sequence_s: float = 12e-6
    noise: float = 0.03

    def seconds(self, work: ObservedWork, rng: random.Random) -> float:
        price = replica().price(Observation(kind=work.kind, seconds=1.0, parts=((1.0, work),)))
        exact = self.kernels * price.kernels_s + self.step_s + self.sequence_s * price.sequences
        return exact * rng.lognormvariate(0.0, self.noise)


def works(count: int, *, seed: int = 1, alone: float = 0.05) -> Iterator[ObservedWork]:
    """Yield iterations of a server with changing load: one in five has a prompt, a share ``alone`` only prompts."""
    rng = random.Random(seed)
    for _ in range(count):
        batch = float(rng.choice((1, 4, 8, 16, 32, 64, 128)))
        kind = rng.random()
        chunk = float(rng.randrange(100, 4000)) if kind < 0.2 else 0.0
        decoding = 0.0 if kind < alone else batch
        yield ObservedWork(
            decoding=decoding,
            attended_tokens=decoding * rng.randrange(500, 3000),
            prompts=1.0 if chunk else 0.0,
            chunk_tokens=chunk,
        )


def observed(found: Sequence[ObservedWork], truth: Truth, *, seed: int = 2, least: int = 40) -> Observed:
    rng = random.Random(seed)
    seen = [Observation(kind=work.kind, seconds=truth.seconds(work, rng), parts=((1.0, work),)) for work in found]
    return Observed(what="iterations", origin="vLLM of a test", least=least, observations=tuple(seen))
