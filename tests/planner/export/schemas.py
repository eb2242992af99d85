"""The fields of operators' objects, as far as exports use them; any other field is an error.

Derived from the projects' own definitions, which are 1 to 3 MB each and not part of this repository:

- LeaderWorkerSet and DisaggregatedSet v1: kubernetes-sigs/lws at 060ab4da17ee, config/crd/bases (Apache-2.0)
- LLMInferenceService v1alpha2: kserve/kserve at aaac4e294dae, config/crd/full/llmisvc (Apache-2.0)
- DynamoGraphDeployment v1beta1: ai-dynamo/dynamo at 0fddc01b3724, deploy/operator/api/v1beta1 (Apache-2.0)
- values of the chart 0.4.12: llm-d-incubation/llm-d-modelservice at 3051935eb5a4 (Apache-2.0)
- EndpointPickerConfig: llm-d/llm-d-router, the documents of the weight scorer and the label producer (Apache-2.0)
- InferencePool v1: kubernetes-sigs/gateway-api-inference-extension, api/v1; HTTPRoute v1: gateway-api (Apache-2.0)
- LLMConfig: ray 2.60.0 from PyPI, ray/llm/_internal: serve/core/configs/llm_config.py, common/placement.py (Apache-2.0)

Every export of the ten plans was also checked against the three whole CRDs of LWS and KServe and the chart's
values.schema.json when this was written (22 November 2026): 62 objects and 10 value files, no error. The test checks a
`POD` or `POD_TEMPLATE` against Kubernetes' own schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXT: Schema = {"type": "string", "minLength": 1}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
POD: Schema = {"type": "object", "required": ["containers"], "$comment": "PodSpec"}
POD_TEMPLATE: Schema = {"type": "object", "required": ["spec"], "$comment": "PodTemplateSpec"}


def of(required: str = "", **fields: Schema) -> Schema:
    """Return the schema of an object with these fields and no others."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def many(item: Schema, least: int = 0, most: int = 1000) -> Schema:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def kind(api: str, name: str, spec: Schema) -> Schema:
    metadata = of("name", name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
    return of(
        "apiVersion kind metadata spec", apiVersion={"const": api}, kind={"const": name}, metadata=metadata, spec=spec
    )


_LWS = of(
    "leaderWorkerTemplate",
    replicas=COUNT,
    startupPolicy=one_of("LeaderCreated", "LeaderReady"),
    leaderWorkerTemplate=of(
        "workerTemplate",
        size={"type": "integer", "minimum": 1},
        restartPolicy=one_of("Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"),
        leaderTemplate=POD_TEMPLATE,
        workerTemplate=POD_TEMPLATE,
    ),
)
_ROLES = many(of("name spec", name=NAME, spec=_LWS), 2, 10)
_PARALLELISM = of("", tensor=COUNT, pipeline=COUNT, data=COUNT, dataLocal=COUNT, expert={"type": "boolean"})
_WORKLOAD: Mapping[str, Schema] = {
    "replicas": COUNT,
    "parallelism": _PARALLELISM,
    "annotations": TEXTS,
    "labels": TEXTS,
    "template": POD,
    "worker": POD,
}
_WEIGHT: Schema = {"type": "integer", "minimum": 0, "maximum": 1_000_000}
_SERVICE = of(
    "model",
    model=of("uri", name=TEXT, uri=TEXT),
    storageInitializer=of("", enabled={"type": "boolean"}),
    prefill=of("", **_WORKLOAD),
    router=of("", gateway=of(), scheduler=of(), route=of("", group=NAME, weight=_WEIGHT)),
    **_WORKLOAD,
)
_COMPONENT = of(
    "name podTemplate",
    name={"type": "string", "pattern": "^[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?$", "maxLength": 63},
    type=one_of("frontend", "worker", "prefill", "decode", "planner", "epp"),
    replicas=COUNT,
    podTemplate=POD_TEMPLATE,
)
_PORT = {"type": "integer", "minimum": 1, "maximum": 65_535}
_POOL = of(
    "selector targetPorts endpointPickerRef",
    selector=of("matchLabels", matchLabels=TEXTS),
    targetPorts=many(of("number", number=_PORT), 1, 8),
    endpointPickerRef=of("name", group=TEXT, kind=TEXT, name=NAME, port=of("number", number=_PORT), failureMode=TEXT),
)
_BACKEND = of("name", group=TEXT, kind=TEXT, name=NAME, port=_PORT, weight=_WEIGHT)
_ROUTE = of(
    "parentRefs rules",
    parentRefs=many(of("name", name=NAME, namespace=NAME), 1),
    rules=many(of("backendRefs", backendRefs=many(_BACKEND, 1, 16), timeouts=of("", request=TEXT)), 1, 16),
)
_MONITOR = of(
    "selector podMetricsEndpoints",
    selector=of("matchLabels", matchLabels=TEXTS),
    podMetricsEndpoints=many(of("port", port=TEXT, path=TEXT, scheme=one_of("http", "https")), 1),
)
OBJECTS: Mapping[str, Schema] = {
    "PodMonitor": kind("monitoring.coreos.com/v1", "PodMonitor", _MONITOR),
    "InferencePool": kind("inference.networking.k8s.io/v1", "InferencePool", _POOL),
    "HTTPRoute": kind("gateway.networking.k8s.io/v1", "HTTPRoute", _ROUTE),
    "LeaderWorkerSet": kind("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", _LWS),
    "DisaggregatedSet": kind("disaggregatedset.x-k8s.io/v1", "DisaggregatedSet", of("roles", roles=_ROLES)),
    "LLMInferenceService": kind("serving.kserve.io/v1alpha2", "LLMInferenceService", _SERVICE),
    "LLMInferenceServiceConfig": kind("serving.kserve.io/v1alpha2", "LLMInferenceServiceConfig", of()),
    "DynamoGraphDeployment": kind(
        "nvidia.com/v1beta1",
        "DynamoGraphDeployment",
        of("", backendFramework=one_of("sglang", "vllm", "trtllm"), components=many(_COMPONENT, 1, 25)),
    ),
}

_ROLE_VALUES = of(
    "create replicas",
    create={"type": "boolean"},
    replicas=COUNT,
    extraConfig=of("", affinity={"type": "object"}),
    enableServiceLinks={"type": "boolean"},
    tolerations=many({"type": "object"}),
    strategy=of("type", type=one_of("RollingUpdate", "Recreate")),
    podAnnotations=TEXTS,
    parallelism=of("", tensor=COUNT, workers=COUNT, data=COUNT, dataLocal=COUNT),
    terminationGracePeriodSeconds=COUNT,
    volumes=many({"type": "object"}),
    containers=many(
        of(
            "name image modelCommand command resources",
            name=TEXT,
            image=TEXT,
            modelCommand=one_of("vllmServe", "imageDefault", "custom"),
            mountModelVolume={"type": "boolean"},
            command=many({"type": "string"}, 1),
            **{
                field: {}
                for field in (
                    *("env", "ports", "volumeMounts", "resources", "securityContext", "lifecycle"),
                    *("startupProbe", "livenessProbe", "readinessProbe"),
                )
            },
        ),
        1,
        1,
    ),
)
VALUES = of(
    "modelArtifacts decode prefill",
    fullnameOverride=NAME,
    accelerator=of(
        "", type=one_of("nvidia", "intel-i915", "intel-xe", "intel-gaudi", "amd", "google"), resources=TEXTS
    ),
    multinode={"type": "boolean"},
    modelArtifacts=of("name uri", name=TEXT, labels=TEXTS, uri={"type": "string", "pattern": "^(hf|pvc)://"}),
    routing=of("", servicePort=COUNT, proxy=of("", enabled={"type": "boolean"}, connector=TEXT)),
    decode=_ROLE_VALUES,
    prefill=_ROLE_VALUES,
)
_POSITIVE: Schema = {"type": "number", "exclusiveMinimum": 0}
_PARAMETERS: Mapping[str, Schema] = {
    "disagg-profile-handler": of("deciders", deciders=of("prefill", prefill={"const": "always-disagg-pd-decider"})),
    "label-producer": of("labels", labels=many(of("label attributeKey", label=TEXT, attributeKey=TEXT), 1)),
    "endpoint-attribute-weight-scorer": of(
        "attributeKey producer weights",
        attributeKey=TEXT,
        producer=TEXT,
        weights={"type": "object", "additionalProperties": _POSITIVE, "minProperties": 1},
    ),
    "token-load-scorer": of("queueThresholdTokens", queueThresholdTokens=COUNT),
}
_BARE = (
    *("max-score-picker", "active-request-scorer", "inflight-load-producer", "prefill-filter", "decode-filter"),
    *("disagg-headers-handler", "always-disagg-pd-decider"),
)
_PLUGINS = [of("type parameters", type={"const": t}, name=TEXT, parameters=p) for t, p in _PARAMETERS.items()]
PICKER = of(
    "apiVersion kind plugins schedulingProfiles",
    apiVersion={"const": "llm-d.ai/v1alpha1"},
    kind={"const": "EndpointPickerConfig"},
    plugins=many({"anyOf": [*_PLUGINS, of("type", type=one_of(*_BARE))]}, 1),
    schedulingProfiles=many(
        of("name plugins", name=TEXT, plugins=many(of("pluginRef", pluginRef=TEXT, weight={"type": "number"}), 1)), 1
    ),
)

_BUNDLE: Schema = {
    "type": "object",
    "properties": {"CPU": _POSITIVE, "GPU": _POSITIVE},
    "additionalProperties": _POSITIVE,
}
LLM_CONFIG = of(
    "model_loading_config",
    model_loading_config=of("model_id", model_id=TEXT, model_source=TEXT),
    engine_kwargs={"type": "object"},
    accelerator_type=one_of("H100", "H200", "H20", "B200", "B300", "A100", "L40S", "L4", "A10G", "T4", "V100", "P100"),
    placement_group_config=of(
        "bundles", bundles=many(_BUNDLE, 1), strategy=one_of("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
    ),
    deployment_config=of("", num_replicas=COUNT, max_ongoing_requests=COUNT),
    runtime_env=of("", env_vars=TEXTS),
)
SERVE = of(
    "applications",
    proxy_location=one_of("EveryNode", "HeadOnly", "Disabled"),
    http_options=of("", host=TEXT, port=COUNT),
    applications=many(
        of(
            "name import_path args",
            name=TEXT,
            route_prefix={"type": "string", "pattern": "^/"},
            import_path=one_of("ray.serve.llm:build_openai_app", "ray.serve.llm:build_pd_openai_app"),
            args={
                "anyOf": [
                    of("llm_configs", llm_configs=many(LLM_CONFIG, 1)),
                    of("prefill_config decode_config", prefill_config=LLM_CONFIG, decode_config=LLM_CONFIG),
                ]
            },
        ),
        1,
    ),
)
