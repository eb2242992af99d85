"""Groups of a plan's GPUs that do the same work."""

from __future__ import annotations

from collections.abc import Sequence

from hetis.simulator.metrics import DeviceUse
from hetis.solver.plan import Plan, Role


def device_groups(plan: Plan) -> dict[str, str]:
    """Return the name of each device's group: GPU type, and its role unless that is a whole request."""
    groups: dict[str, str] = {}
    for replica in plan.replicas:
        role = "" if replica.role is Role.UNIFIED else f", {replica.role}"
        groups |= {device: f"{stage.gpu}{role}" for stage in replica.stages for device in stage.devices}
        groups |= {
            device: f"{pool.gpu}, attention worker" for pool in replica.attention_workers for device in pool.devices
        }
    return groups


def grouped_use(plan: Plan, uses: Sequence[DeviceUse]) -> list[DeviceUse]:
    """Return one use per group, under its name and number of GPUs: means of means, and the highest maximum."""
    groups = device_groups(plan)
    members: dict[str, list[DeviceUse]] = {}
    for use in uses:
        members.setdefault(groups.get(use.device, use.device), []).append(use)
    return [
        DeviceUse(
            device=f"{len(group)} × {name}",
            kv_mean=sum(use.kv_mean for use in group) / len(group),
            kv_max=max(use.kv_max for use in group),
            busy_mean=sum(use.busy_mean for use in group) / len(group),
        )
        for name, group in members.items()
    ]
