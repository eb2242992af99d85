"""What Prometheus reads: vLLM's names for what every engine has, so that its dashboards and autoscalers (and
`hetis-agent --engine vllm:http://...`) work, and ``hetis_*`` for what only this one has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from hetis.runtime.engine.request import FinishReason
from hetis.runtime.server.asked import RedispatchMode
from hetis.runtime.server.moving import MovingView
from hetis.runtime.server.snapshot import EngineView, PromptsView
from hetis.runtime.steering.engine import PERMISSIONS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STEP_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class ServerMetrics:
    """Counted by the thread of the engine, read by that of the server."""

    def __init__(self, *, model: str, version: str, view: Callable[[], EngineView]) -> None:
        """``view``: the engine after its last step."""
        self.registry = CollectorRegistry()
        own = {"model_name": model, "engine": "0"}
        self._labels = own
        names = tuple(own)

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(name, meaning, (*names, *labels), registry=self.registry)

        def histogram(name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, meaning, names, buckets=buckets, registry=self.registry)
            child: Histogram = made.labels(**own)
            return child

        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of admitted requests.").labels(**own)
        self._output_tokens = counter("vllm:generation_tokens", "Tokens generated.").labels(**own)
        self._finished = counter("vllm:request_success", "Requests that ended, by reason.", "finished_reason")
        self._ttft = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", _LATENCY_S)
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.", _LATENCY_S)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", _LATENCY_S)
        self._rows = histogram("vllm:iteration_tokens_total", "Tokens per step, prompts included.", _TOKENS)
        self._step = histogram("hetis_step_seconds", "Measured time of a step.", _STEP_S)
        self._refused = counter("hetis_requests_refused", "Requests answered with an error, by HTTP status.", "status")
        self._cancelled = counter("hetis_requests_cancelled", "Requests ended by the server, by cause.", "cause")
        self._measured = counter(
            "hetis_decode_step_seconds_measured", "Time of the steps that only decode, where it was predicted."
        ).labels(**own)
        self._predicted = counter(
            "hetis_decode_step_seconds_predicted", "Predicted time of the same steps; their quotient is the error."
        ).labels(**own)
        self.registry.register(_Views(own, version, view))

    def text(self) -> bytes:
        """All of it in Prometheus' text form."""
        return generate_latest(self.registry)

    # --- by the engine's thread

    def step_done(self, *, seconds: float, predicted_s: float | None, tokens: int) -> None:
        """``tokens``: rows of the step; ``predicted_s``: only of steps that decode and nothing else."""
        self._step.observe(seconds)
        self._rows.observe(tokens)
        if predicted_s is not None:
            self._measured.inc(seconds)
            self._predicted.inc(predicted_s)

    def first_token(self, seconds: float, *, prompt_tokens: int) -> None:
        self._ttft.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)
        self._output_tokens.inc()

    def next_token(self, seconds: float) -> None:
        self._between.observe(seconds)
        self._output_tokens.inc()

    def finished(self, reason: FinishReason, seconds: float) -> None:
        self._whole.observe(seconds)
        self._finished.labels(**self._labels, finished_reason=_VLLM_REASONS[reason]).inc()

    # --- by the server

    def refused(self, status: int) -> None:
        self._refused.labels(**self._labels, status=str(status)).inc()

    def cancelled(self, cause: str) -> None:
        """``cause``: ``disconnected``, ``slow_reader``, ``timeout`` or ``drain``."""
        self._cancelled.labels(**self._labels, cause=cause).inc()


_VLLM_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.UNAVAILABLE: "error",
    FinishReason.ERROR: "error",
}


class _Views(Collector):
    """Gauges and counters that the engine keeps itself."""

    def __init__(self, labels: dict[str, str], version: str, view: Callable[[], EngineView]) -> None:
        self._labels, self._version, self._view = labels, version, view

    def collect(self) -> Iterator[Metric]:
        view = self._view()
        yield self._gauge("vllm:num_requests_running", "Requests in the batch.", len(view.running))
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait to be admitted.", view.waiting)
        aside = "Of them, those that wait for devices that are away."
        yield self._gauge("hetis_requests_waiting_for_devices", aside, view.aside)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", view.kv_use_ratio)
        yield self._counter("vllm:num_preemptions", "Requests that gave up their KV for others.", view.preempted)
        config = GaugeMetricFamily(
            "vllm:cache_config_info",
            "How KV is kept; a page (block) belongs to one KV head.",
            labels=[*self._labels, "block_size", "num_gpu_blocks"],
        )
        pages = sum(device.pages for device in view.devices)
        config.add_metric([*self._labels.values(), str(view.page_tokens), str(pages)], 1)
        yield config
        yield self._counter("hetis_steps", "Steps of the engine.", view.steps)
        yield self._counter("hetis_moved_heads", "KV heads of running requests that moved.", view.moved_heads)
        yield from self._prompts(view.prompts)
        yield from self._moving(view.moving)
        build = GaugeMetricFamily("hetis_build", "1; its label says which software this is.", labels=["version"])
        build.add_metric([self._version], 1)
        yield build
        for name, meaning, values in (
            ("hetis_device_kv_pages", "KV pages of the device.", [d.pages for d in view.devices]),
            ("hetis_device_kv_pages_used", "Of them, in use.", [d.used_pages for d in view.devices]),
            ("hetis_device_kv_bytes", "KV memory of the device.", [d.pages * d.page_bytes for d in view.devices]),
            ("hetis_device_kv_bytes_used", "Of it, in use.", [d.used_pages * d.page_bytes for d in view.devices]),
            ("hetis_device_heads", "KV heads of running requests there.", [d.heads for d in view.devices]),
            ("hetis_device_up", "Whether it takes heads, 1 or 0.", [int(d.is_up) for d in view.devices]),
        ):
            family = GaugeMetricFamily(name, meaning, labels=[*self._labels, "device"])
            for device, value in zip(view.devices, values, strict=True):
                family.add_metric([*self._labels.values(), device.name], value)
            yield family

    def _prompts(self, prompts: Sequence[PromptsView]) -> Iterator[Metric]:
        for name, meaning, values in (
            ("hetis_prompt_kv_bytes", "Room for KV of prompts under way.", [p.most_bytes for p in prompts]),
            ("hetis_prompt_kv_bytes_used", "Of it, in use.", [p.kv_bytes for p in prompts]),
        ):
            family = GaugeMetricFamily(name, meaning, labels=[*self._labels, "stage"])
            for stage, value in zip(prompts, values, strict=True):
                family.add_metric([*self._labels.values(), str(stage.stage)], value)
            yield family

    def _moving(self, moving: MovingView) -> Iterator[Metric]:
        migrations = CounterMetricFamily(
            "hetis_migrations", "Changes that move heads, by what became of them.", labels=[*self._labels, "state"]
        )
        for state, count in (
            ("started", moving.begun),
            ("committed", moving.flipped),
            ("aborted", moving.aborted),
        ):
            migrations.add_metric([*self._labels.values(), state], count)
        yield migrations
        yield self._counter("hetis_migration_bytes", "KV that was sent for them.", moving.copied_bytes)
        yield self._counter("hetis_redispatch_looks", "Times that the solver was asked for moves.", moving.looks)
        yield self._counter("hetis_redispatch_moves", "Moves that it chose.", moving.moves)
        yield self._counter("hetis_redispatch_reliefs", "Times that moves emptied a full device.", moving.relieved)
        yield self._states("hetis_redispatch_mode", "Who moves heads.", list(RedispatchMode), moving.mode)
        yield self._gauge("hetis_planner_epoch", "Newest epoch of the planner that was obeyed.", moving.epoch)
        yield self._states(
            "hetis_planner_permission", "How far the planner's change is.", list(PERMISSIONS), moving.permission
        )

    def _states(self, name: str, meaning: str, states: list[str], now: str) -> Metric:
        """A gauge per state, 1 for the one that is."""
        family = GaugeMetricFamily(name, meaning, labels=[*self._labels, "state"])
        for state in states:
            family.add_metric([*self._labels.values(), str(state)], int(state == now))
        return family

    def _gauge(self, name: str, meaning: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, meaning, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, meaning: str, value: float) -> Metric:
        family = CounterMetricFamily(name, meaning, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family
