"""Which models hetis' plugin for vLLM can run with attention workers, and what it calls them.

Plans, exports and launches ask here, so that none of them has workers that the plugin refuses when the engine starts
(`HeadGroupImpl` and `ComposedBackend` in `hetis.runtime.vllm.backend`, `_check` in its `connector`).
"""

from __future__ import annotations

from collections.abc import Sequence

from hetis.engines.attention import attends_to_chunks, has_sinks
from hetis.solver.model import Kernel, ModelSpec

LONGEST_NAME = 63  # longest name of a worker
# As in the plugin's own messages, which a test compares.
CHUNKS, SINKS = "attends to chunks of its context", "attention sinks"


def why_no_workers(model: ModelSpec) -> str | None:
    """Return why the plugin cannot place the model's head groups on attention workers, or None if it can.

    Windows are not a reason, because exports tell vLLM to keep all KV; plans for engines that free it have no workers.
    """
    reasons = {
        **{mixer.immovable: True for mixer, _ in model.mixers if mixer.immovable},
        "attention is latent (MLA), and its KV cannot be split into head groups": Kernel.LATENT in model.kernels,
        "layers have heads of unlike shape": not model.has_like_heads,
        "the plugin does not support draft tokens": model.draft is not None,
        f"the model {CHUNKS}, which the plugin does not support": attends_to_chunks(model),
        f"the model has {SINKS}, which the plugin does not support": has_sinks(model),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def worker_name(devices: Sequence[str], place: int) -> str:
    """Return the engine's name for the attention worker at a place of every stage, counted from 0.

    It joins the names of its GPUs, ``node/index`` of each stage, or numbers the place if that would be too long.
    """
    name = "+".join(dict.fromkeys(devices))
    return name if len(name) <= LONGEST_NAME else f"worker-{place}"
