"""The launchable parts of a plan: a layout for every replica, distinct ports, and reasons for replicas left out."""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hetis.commands.endpoints import joined
from hetis.engines.cluster import IMAGE, WORKER_IMAGE
from hetis.engines.commands import WORKER_PORT, Addresses, Command, commands_of
from hetis.engines.errors import LayoutError
from hetis.engines.gpus import VENDORS
from hetis.engines.layout import Layout, layout_of
from hetis.engines.planned import kv_partners
from hetis.engines.serving import (
    KV_PORT,
    MASTER_PORT,
    PORT_STEP,
    TELL_KV,
    Serving,
    kv_dtype_of,
    missing_kv_option,
    program_of,
)
from hetis.engines.versions import VERSIONS, Engine
from hetis.formats import catalogue
from hetis.formats.models.dtypes import weights_of
from hetis.planner.export.settings import ExportSettings
from hetis.planner.use_cases.grouping import number_ranges
from hetis.planner.use_cases.record.parts import MadeFrom
from hetis.solver.cluster import node_of
from hetis.solver.errors import HetisError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import AttentionWorkerPool, KvRoute, Plan, ReplicaPlan, Role, StagePlan, served_with_classes

_TUNED = re.compile(r"(?i)instruct|chat|-it$")
# Names go into scripts and file names as they are.
_NODE = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([-A-Za-z0-9_]*[A-Za-z0-9])?(\.[A-Za-z0-9]([-A-Za-z0-9_]*[A-Za-z0-9])?)*")
WEIGHTS = "{weights}"  # placeholder in the name of a model
PUSHED = "prompts come from several stages, which needs vLLM's NixlPushConnector"  # how refusals of targets begin


class NotExportableError(HetisError):
    """No part of the plan can be launched in this way; each reason is a sentence."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__("\n".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True)
class LaunchableReplica:
    """A replica with its layout and its own ports; ``name`` is unique within the export."""

    number: int  # its position in the plan
    plan: ReplicaPlan
    layout: Layout
    serving: Serving
    addresses: Addresses
    port: int
    equals: tuple[LaunchableReplica, ...] = ()  # others like it, which are copies of its pod
    product: str = ""  # label of the nodes on which its pod may be; empty: those of it and its equals

    @property
    def copies(self) -> int:
        return 1 + len(self.equals)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes of its front end and those of its equals."""
        return tuple(dict.fromkeys(one.front_node for one in (self, *self.equals)))

    @property
    def name(self) -> str:
        return f"r{self.number}"

    @cached_property
    def commands(self) -> tuple[Command, ...]:
        """The command lines of all processes, the front end first."""
        served = self.serving.at(self.addresses.host(self.front_node), self.port)
        return commands_of(self.layout, served, self.addresses)

    @property
    def front_node(self) -> str:
        return self.layout.servers[0].node

    @property
    def endpoint(self) -> str:
        """The address for clients if processes are started as plain commands."""
        return joined(self.addresses.host(self.front_node), self.port)


@dataclass(frozen=True, kw_only=True)
class Launchable:
    """A plan whose replicas have one copy of each stage, with the launchable replicas and why the others are not."""

    plan: Plan  # the plan, with each replica of n equal copies split into n replicas
    model: ModelSpec
    engine: Engine
    settings: ExportSettings
    replicas: Mapping[int, LaunchableReplica]  # the launchable replicas, by position in ``plan``
    left_out: Mapping[int, tuple[str, ...]]  # reasons why a replica cannot be launched, by position in ``plan``
    changes: tuple[str, ...]  # what was changed to make replicas launchable, and what engines or routers do not know

    def name_of(self, one: LaunchableReplica) -> str:
        """Return the name of a replica's objects, which is distinct from those of other plans."""
        return f"{self.settings.name}-{one.name}"

    @cached_property
    def has_workers(self) -> bool:
        return any(one.layout.workers for one in self.replicas.values())

    @cached_property
    def has_roles(self) -> bool:
        return any(one.plan.role is not Role.UNIFIED for one in self.replicas.values())

    @cached_property
    def names_by_role(self) -> Mapping[Role, tuple[str, ...]]:
        """Return the names of the replicas of each role."""
        found = defaultdict[Role, list[str]](list)
        for one in self.replicas.values():
            found[one.plan.role].append(self.name_of(one))
        return {role: tuple(names) for role, names in found.items()}

    def by_node(self) -> dict[str, list[tuple[int, LaunchableReplica]]]:
        """Return, for every node, the replicas with processes there, and their positions in the plan."""
        found = dict[str, list[tuple[int, LaunchableReplica]]]()
        for number, one in self.replicas.items():
            for node in dict.fromkeys(process.node for process in one.layout.processes):
                found.setdefault(node, []).append((number, one))
        return found

    def routes(self) -> list[KvRoute]:
        """Return the plan's routes between the remaining replicas."""
        return [route for route in self.plan.kv_routes if {route.prefill, route.decode} <= self.replicas.keys()]

    def rate(self) -> float:
        """Return the saturated requests/s of the remaining replicas, as predicted by the plan."""
        rates = dict[tuple[str, ...], float]()
        for one in self.replicas.values():
            if one.plan.role is Role.UNIFIED:
                rates[one.plan.classes] = rates.get(one.plan.classes, 0.0) + one.plan.rate
        for route in self.routes():
            classes = self.plan.replicas[route.prefill].classes
            rates[classes] = rates.get(classes, 0.0) + route.rate
        return served_with_classes(self.plan.class_shares(), rates)

    def without(self, left_out: Mapping[int, tuple[str, ...]]) -> Launchable:
        """Return the plan without the replicas in ``left_out``, which the target cannot run.

        Raises:
            NotExportableError: no replica remains, or the remaining ones serve nothing without the others.
        """
        kept = {number: one for number, one in self.replicas.items() if number not in left_out}
        less = replace(self, replicas=kept, left_out={**self.left_out, **left_out})
        if not kept or less.rate() <= 0:
            raise NotExportableError(tuple(less.reasons()))
        return less

    def without_impossible(self, why_not: Callable[[Launchable, LaunchableReplica], Iterable[str]]) -> Launchable:
        """Return the plan `without` the replicas that have reasons why the target cannot run them."""
        reasons = {number: tuple(why_not(self, one)) for number, one in self.replicas.items()}
        return self.without({number: why for number, why in reasons.items() if why})

    def mixed_nodes(self, says: str, *, everywhere: bool = False) -> list[str]:
        """Return a sentence per node with several GPU types; ``everywhere`` includes nodes of replicas left out."""
        types = dict[str, set[str]]()
        for replica in self.plan.replicas:
            parts: list[StagePlan | AttentionWorkerPool] = [*replica.stages, *replica.attention_workers]
            for part in parts:
                for device in part.devices:
                    types.setdefault(node_of(device), set()).add(part.gpu)
        nodes = types if everywhere else self.by_node()
        return [
            f"node {node} has {' and '.join(sorted(types[node]))}: {says}" for node in nodes if len(types[node]) > 1
        ]

    def restarted_alone(self) -> Iterator[str]:
        """Yield a sentence for each replica whose target restarts its stages one by one.

        An engine does not survive the loss of a stage, but those on other nodes do not notice it: vLLM only watches
        processes of its own node (`MultiprocExecutor.start_worker_monitor`).
        """
        for number, one in self.replicas.items():
            if (count := len(one.layout.servers)) > 1:
                yield (
                    f"replica {number}: if one of its {count} stages ends, only that one is started again, and the "
                    "others may wait for it forever: restart all of them"
                )

    def reasons(self) -> Iterator[str]:
        """Yield a sentence for each reason why replicas are left out; those with the same reason share it."""
        numbers = dict[str, list[int]]()
        for number, reasons in sorted(self.left_out.items()):
            for reason in reasons:
                numbers.setdefault(reason, []).append(number)
        for reason, those in numbers.items():
            which = number_ranges(those).strip("[]")
            yield f"{'replica' if len(those) == 1 else 'each of replicas'} {which}: {reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The files of one target."""

    files: Mapping[str, str]  # contents by path; a path that ends in ``.sh`` is an executable
    shown: tuple[str, ...]  # the essential files, for standard output
    start: str  # instructions for starting, in Markdown
    endpoints: Mapping[int, str]  # endpoint of each replica, by its position in the plan
    # Endpoints of the routers of `pair_groups`; empty: there are none, or the target pairs replicas at their endpoints
    routers: tuple[str, ...] = ()
    listed: bool = True  # routers by weights send requests to these endpoints; otherwise the target's own router does
    not_carried: tuple[str, ...] = ()  # features of the plan that the target lacks


def launchable(plan: Plan, model: ModelSpec, settings: ExportSettings) -> Launchable:
    """Return the part of a plan that an engine can launch. Raises NotExportableError with all reasons if it is none."""
    if not plan.replicas:
        raise NotExportableError(("the plan has no replicas",))
    has_workers = any(replica.attention_workers for replica in plan.replicas)
    if settings.encrypt and not has_workers:
        raise NotExportableError(("--encrypt: the plan has no attention workers to exchange anything with",))
    engine = Engine(settings.engine or (Engine.VLLM_HETIS if has_workers else Engine.VLLM))
    if len(used := weights_used(plan, model)) > 1 and WEIGHTS not in settings.model:
        raise NotExportableError((f"the plan has weights in {' and '.join(used)}: --model must contain {WEIGHTS}",))
    requested = MadeFrom.of(plan).model
    changes = list(_other_checkpoint(used, requested, model.name, settings))
    replicas, left_out = dict[int, LaunchableReplica](), dict[int, tuple[str, ...]]()
    fronts, meetings, kv_ports, workers = Counter[str](), Counter[str](), Counter[str](), 0
    exchanging = kv_partners(plan)
    for number in range(len(plan.replicas)):
        try:
            layout = layout_of(plan, number, model, engine=engine, dtype=settings.dtype, partners=exchanging[number])
        except LayoutError as error:
            left_out[number] = error.messages
            continue
        if strange := sorted({p.node for p in layout.processes if not _NODE.fullmatch(p.node)}):
            left_out[number] = tuple(f"node {node!r} has a name that is not a valid host name" for node in strange)
            continue
        program = tuple(shlex.split(settings.program)) or program_of(engine)
        if len(layout.servers) > 1 and program[-1] != "serve":
            left_out[number] = ("only `vllm serve` and `sglang serve` start stages on several nodes: see --program",)
            continue
        node = layout.servers[0].node
        serving = Serving(
            model=settings.model.replace(WEIGHTS, weights_of(model.on(plan.replicas[number].stages[0].gpu))),
            program=program,
            device=settings.device,
            options=settings.engine_options,
            dtype=settings.dtype,
            limits_kv=True,
            encrypts=settings.encrypt,
            served_name=settings.served_name,
        )
        if why := missing_kv_option(layout, serving):
            left_out[number] = (why,)
            continue
        replicas[number] = LaunchableReplica(
            number=number,
            plan=plan.replicas[number],
            layout=layout,
            serving=serving,
            addresses=Addresses(
                hosts=settings.hosts,
                worker_port=WORKER_PORT + workers,
                master_port=MASTER_PORT + PORT_STEP * meetings[node],
                kv_port=KV_PORT + kv_ports[node],
                config_file=f"r{number}-workers.yaml",
                key_file="worker.key",
            ),
            port=settings.port + fronts[node],
        )
        fronts[node] += 1
        meetings[node] += layout.meets
        kv_ports[node] += layout.data_parallel  # one port for each copy
        workers += len(layout.attention_workers)
    untold = [one.name for one in replicas.values() if not kv_dtype_of(one.layout, one.serving)]
    if untold and any(TELL_KV in note for note in plan.notes):
        changes.append(f"KV in 16 bits ({', '.join(untold)}): {TELL_KV}")
    changes.extend(_shorter_contexts(replicas.values(), model))
    found = Launchable(
        plan=plan,
        model=model,
        engine=engine,
        settings=settings,
        replicas=replicas,
        left_out=left_out,
        changes=tuple(changes),
    )
    return found.without({})


def _shorter_contexts(replicas: Iterable[LaunchableReplica], model: ModelSpec) -> Iterator[str]:
    """Yield a sentence if some replicas have room for longer requests than others."""
    names = dict[int, list[str]]()
    for one in replicas:
        names.setdefault(one.layout.context_tokens or model.max_position, []).append(one.name)
    longest = max(names, default=0)
    shorter = [f"{', '.join(names[tokens])} up to {tokens:,} tokens" for tokens in sorted(names) if tokens < longest]
    if shorter:
        yield (
            "replicas have room for requests of different lengths, which routers do not know: "
            f"{', '.join(shorter)}, the others up to {longest:,}"
        )


def weights_used(plan: Plan, model: ModelSpec) -> list[str]:
    """Return the precisions of the weights of the plan's replicas."""
    gpus = dict.fromkeys(replica.stages[0].gpu for replica in plan.replicas if replica.stages)
    return list(dict.fromkeys(weights_of(model.on(gpu)) for gpu in gpus))


def _other_checkpoint(used: Sequence[str], requested: str, planned: str, settings: ExportSettings) -> Iterator[str]:
    """Yield a sentence if a checkpoint that the catalogue knows differs from the plan in its weights or tuning, or if
    the planned name is that of a file or a folder rather than of a checkpoint.
    """
    if (found := catalogue.known_model(settings.model)) is None:
        if settings.model == planned and "/" not in planned:
            yield (
                f"engines are started with {planned}, the name in the plan, which they may not find: set --model to "
                "the checkpoint's folder or its name at Hugging Face"
            )
        return
    if used != [kept := weights_of(found)]:
        yield (
            f"{settings.model} is stored in {kept}, but the plan needs weights in {' and '.join(used)}: set "
            "--model to such a checkpoint"
        )
    if _TUNED.search(requested) and not _TUNED.search(settings.model):
        tuned = "set --model to the tuned checkpoint"
        yield f"the plan is for {requested}, but the checkpoint is {settings.model}: {tuned}"


def images_in(text: str) -> list[tuple[str, str]]:
    """Return the vendors and images in ``IMAGE,AMD=IMAGE``; an image without a vendor is for NVIDIA's GPUs."""
    named = [part.strip().rpartition("=") for part in text.split(",")] if text else []
    return [(vendor.upper() or VENDORS[0], image) for vendor, _, image in named]


def image_in(text: str, vendor: str) -> str:
    """Return the image for a vendor's GPUs (`images_in`), or an empty string if there is none."""
    return dict(images_in(text)).get(vendor, "")


def engine_image(launchable: Launchable, one: LaunchableReplica) -> str:
    """Return the engine's image for a replica's GPUs, specified or published, or an empty string if there is none."""
    vendor = one.layout.vendor
    return image_in(launchable.settings.image, vendor) or published_image(launchable.engine, vendor)


def worker_image(launchable: Launchable, one: LaunchableReplica) -> str:
    """Return the image of a replica's attention workers, or an empty string if none is specified."""
    workers, text = one.layout.attention_workers, launchable.settings.worker_image
    return image_in(text, workers[0].vendor) if workers else ""


def missing_images(launchable: Launchable) -> list[str]:
    """Return a sentence for each image that is missing for a vendor's GPUs."""
    lacking, made = list[tuple[str, str, str]](), IMAGE if launchable.engine is Engine.VLLM_HETIS else "of the engine"
    for one in launchable.replicas.values():
        if not engine_image(launchable, one):
            lacking.append(("--image", one.layout.vendor, made))
        if (workers := one.layout.attention_workers) and not worker_image(launchable, one):
            lacking.append(("--worker-image", workers[0].vendor, WORKER_IMAGE))
    return [
        f"{option} is missing: {image}"
        if vendor == "NVIDIA"
        else f"{option} is missing for {vendor} GPUs: give {option} IMAGE,{vendor}=IMAGE"
        for option, vendor, image in dict.fromkeys(lacking)
    ]


def published_image(engine: Engine, vendor: str) -> str:
    """Return the image that the engine's makers publish for a vendor's GPUs; empty: there is none, or no single one."""
    version = VERSIONS[engine]
    return {
        (Engine.VLLM, "NVIDIA"): f"vllm/vllm-openai:v{version}",
        (Engine.VLLM, "AMD"): f"vllm/vllm-openai-rocm:v{version}",
        (Engine.SGLANG, "NVIDIA"): f"lmsysorg/sglang:v{version}",
    }.get((engine, vendor), "")


def pairs_of(launchable: Launchable) -> dict[int, int]:
    """Return the decode replica of each prefill replica that has one, along the plan's routes, the busiest first."""
    pairs, taken = dict[int, int](), set[int]()
    for route in sorted(launchable.routes(), key=lambda one: (-one.rate, one.prefill, one.decode)):
        if not {route.prefill, route.decode} & taken:
            pairs[route.prefill] = route.decode
            taken |= {route.prefill, route.decode}
    return pairs


def without_single(launchable: Launchable) -> Launchable:
    """Return the plan `without` prefill and decode replicas that have no partner of their own."""
    pairs = pairs_of(launchable)
    taken = {*pairs, *pairs.values()}
    why = ("it makes pairs of one prefill and one decode replica, and no partner is left for this one",)
    roles = (number for number, one in launchable.replicas.items() if one.plan.role is not Role.UNIFIED)
    return launchable.without(dict.fromkeys((number for number in roles if number not in taken), why))
