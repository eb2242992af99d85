"""A replica on two nodes for the demo's model, as `hetis-launch` reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from examples.demo_serve.checkpoint import make_checkpoint
from hetis.formats.plan import plan_to_data
from hetis.runtime.replica.asking import Asked, read_asked
from hetis.solver.plan import Plan
from tests.runtime.launch.plans import POOL, plan_of, stage_of

ROOT = Path(__file__).parents[3]
PAGE_BYTES = 4096  # of the demo's model: 2 x 4 layers x 16 tokens x 8 numbers of 4 bytes
PAGES = 63  # of each KV head: 1,000 tokens


def write_plan(folder: Path, plan: Plan | None = None) -> Path:
    """By default a/0 keeps two KV heads of eight, and b/0 and b/1 have three each."""
    path = folder / "plan.json"
    plan = plan or plan_of(stage_of(), pools=(POOL,))
    path.write_text(json.dumps(plan_to_data(plan)), encoding="utf-8")
    return path


def write_model(folder: Path) -> Path:
    (folder / "models").mkdir(exist_ok=True)
    return make_checkpoint(folder / "models" / "tiny")


def documented(verb: str) -> tuple[str, str]:
    """The first command of that verb in the documentation, and the block that follows its own."""
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    section = text.partition("\n## Several machines\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    for (kind, block), (_, following) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        for line in block.splitlines():
            if kind == "bash" and line.startswith(f"hetis-launch {verb} "):
                return line.partition(" # ")[0].strip(), following
    raise LookupError(f"docs/serve.md has no hetis-launch {verb}")


def asked_for(folder: Path, *serve_options: str, kv_tokens: int | None = None) -> Asked:
    return read_asked(
        plan=write_plan(folder),
        model=write_model(folder),
        replica=0,
        kv_tokens=kv_tokens,
        page_tokens=16,
        dtype="auto",
        serve_options=serve_options,
    )
