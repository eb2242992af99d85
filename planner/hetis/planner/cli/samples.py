"""The files written by ``hetis-plan init``: usable as they are, with comments as a guide to editing."""

from __future__ import annotations

CLUSTER = """\
# The fleet. `hetis-plan schema cluster` has every field, `hetis-plan catalog gpus` every GPU type.
apiVersion: hetis/v1
kind: Cluster
name: my-fleet
nodes:
  # `count` equal nodes are called l4-0, l4-1, ...; a node may hold several GPU types.
  - {name: h100, gpus: [{type: H100-SXM-80GB, count: 2}]}
  - {name: l4, count: 2, gpus: [{type: L4, count: 4}]}
network: {bandwidth: 100Gbps, latency: 20us}
"""

WORKLOAD = """\
# The traffic: here mean lengths. A `histogram` or the path of a CSV `trace` tells more, and `hetis-plan catalog
# workloads` lists traces that need no file at all.
apiVersion: hetis/v1
kind: Workload
name: my-traffic
mean_prompt_tokens: 2000
mean_output_tokens: 300
"""

SAMPLES = {"cluster.yaml": CLUSTER, "workload.yaml": WORKLOAD}
EXAMPLE_MODEL = "Llama-2-70B"
