"""One thread per process, and how much hypothesis tries.

`ci` is quick and repeats itself; HYPOTHESIS_PROFILE=thorough searches at random.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

# torch's threads wait for each other in a loop: with several test processes on every core they mostly burn time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Problems are large values and a first call compiles: neither says anything about a test.
_ACCEPTED = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)

# Examples are small as they are, and shrinking one takes minutes of solving: `thorough` does it.
_NO_SHRINKING = (Phase.explicit, Phase.generate)

settings.register_profile(
    "ci",
    max_examples=18,
    deadline=None,
    derandomize=True,
    database=None,
    phases=_NO_SHRINKING,
    suppress_health_check=_ACCEPTED,
)
settings.register_profile("thorough", max_examples=1000, deadline=None, suppress_health_check=_ACCEPTED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
