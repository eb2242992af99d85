"""Random fleets through the verbs that a plan passes, and proofs of related fleets that must not contradict each other.

Two faults were found this way before it was a test: a solver that proved false optima where zones exchange KV, and
replicas of one vendor that were taken for those of another.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.catalogue import gpus, models
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.export import IN_KUBERNETES, ExportTarget
from tests.planner.command_line import hetis_plan_here

pytestmark = pytest.mark.soak
SEEDS = range(30)
SIZES = (1, 2, 4, 8)  # GPUs of a node
WORKLOADS = ("azure_conv_2023", "longbench_lengths", "humaneval_lengths", "4000/300", "500/50", "100/1000")
ENGINES = ("vllm-hetis", "vllm", "sglang")
CROSSING = 1e-6  # ratio by which value and bound, both sums of rounded numbers, may cross
SECRETS = ("--api-key-secret", "keys", "--worker-key-secret", "workers", "--worker-image", "worker")
Document = dict[str, Any]


def drawn_fleet(draw: random.Random) -> Document:
    """Return a cluster of one to four GPU types in one or two zones."""
    types = draw.sample(sorted(entry.gpu.name for entry in gpus()), draw.randint(1, 4))
    nodes = [
        {
            "name": f"n{number}",
            "count": draw.randint(1, 4),
            "gpus": [{"type": gpu, "count": draw.choice(SIZES)}],
            "zone": draw.choice(("a", "b")),
        }
        for number, gpu in enumerate(types)
    ]
    network = {"bandwidth": f"{draw.choice((10, 25, 100, 400))}Gbps", "latency": "20us"}
    return {"apiVersion": "hetis/v1", "kind": "Cluster", "name": "fleet", "nodes": nodes, "network": network}


def drawn_question(draw: random.Random) -> list[str]:
    """Return options of `place` apart from the cluster."""
    model = draw.choice(sorted(entry.model.name for entry in models()))
    words = ["-m", model, "-w", draw.choice(WORKLOADS), "--engine", draw.choice(ENGINES)]
    words += ["--ttft", draw.choice(("none", "1s", "5s", "20s")), "--tpot", draw.choice(("none", "30ms", "100ms"))]
    if draw.random() < 0.3:
        words += ["--strategy", draw.choice(("uniform", "splitwise", "hexgen", "hexgen2"))]
    if draw.random() < 0.3:
        words += ["--objective", "gpus", "--rate", draw.choice(("0.5", "5"))]
    elif draw.random() < 0.3:
        words += ["--objective", "throughput"]
    return [*words, "--time-limit", "20s"]


def run(folder: Path, *words: str, refusals: tuple[str, ...] = (), allowed: tuple[ExitCode, ...] = ()) -> ExitCode:
    """Run a verb, which succeeds or fails with an allowed code, or INVALID with a message that contains a refusal."""
    done = hetis_plan_here(*words, "-q", cwd=folder)
    is_refused = done.returncode == ExitCode.INVALID and any(refusal in done.stderr for refusal in refusals)
    said = f"hetis-plan {' '.join(words)}: {done.returncode}\n{done.stderr}"
    assert is_refused or done.returncode in (ExitCode.OK, *allowed), said
    assert "Traceback" not in done.stderr, said
    return ExitCode(done.returncode)


def placed(folder: Path, cluster: Document, question: list[str], name: str = "plan.json") -> Document | None:
    """Return the plan's document; None: the engine does not run on these GPUs, or there is no plan, or none in time."""
    (folder / "cluster.yaml").write_text(json.dumps(cluster), encoding="utf-8")
    words = ("place", "-c", "cluster.yaml", *question, "--out", name)
    code = run(
        folder,
        *words,
        refusals=(" needs ", " is not known to run on "),
        allowed=(ExitCode.INFEASIBLE, ExitCode.NO_PLAN),
    )
    return json.loads((folder / name).read_text(encoding="utf-8")) if code == ExitCode.OK else None


@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_passes_every_verb(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    if placed(tmp_path, drawn_fleet(draw), drawn_question(draw)) is None:
        return
    run(tmp_path, "check", "plan.json")
    run(tmp_path, "explain", "plan.json")
    run(tmp_path, "simulate", "plan.json", "--requests", "300")
    run(tmp_path, "report", "plan.json", "--out", "report.html")
    run(tmp_path, "diff", "plan.json", "plan.json")
    run(tmp_path, "replan", "--from", "plan.json", "-c", "cluster.yaml", refusals=("has no re-planning",))
    for target in ExportTarget:
        keys = SECRETS if target in IN_KUBERNETES else ()
        words = ("export", "plan.json", "--to", target, *keys, "--out", target)
        run(
            tmp_path,
            *words,
            refusals=(f"--to {target} runs", "--image is missing for AMD GPUs"),
            allowed=(ExitCode.INFEASIBLE, ExitCode.MISSED),
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_proofs_of_related_fleets_agree(tmp_path: Path, seed: int) -> None:
    """The order of nodes is no matter, and a fleet with one more node serves at least as much."""
    draw = random.Random(1_000 + seed)
    cluster, question = drawn_fleet(draw), [*drawn_question(draw), "--no-verify"]
    plan = placed(tmp_path, cluster, question)
    reordered = placed(tmp_path, {**cluster, "nodes": cluster["nodes"][::-1]}, question)
    more = [*cluster["nodes"], {**draw.choice(cluster["nodes"]), "name": "more", "count": 1}]
    larger = placed(tmp_path, {**cluster, "nodes": more}, question)
    least = "--objective" in question and "gpus" in question
    for smaller, other in ((plan, reordered), (reordered, plan), (plan, larger)):
        if smaller is None or other is None:
            continue  # a search that ended in time without a plan proves nothing
        value, bound = smaller["result"]["value"], other["result"]["bound"]
        crossing = bound - value if least else value - bound
        assert crossing <= CROSSING * abs(value), f"{value} contradicts the bound {bound}"
