"""What the server tells Prometheus; names follow its conventions, meanings those of vLLM's metrics of the same kind."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trimtab.components.engine.server.recorder import Recorder
from trimtab.runtime.service.paged_engine import Event, GenerationRequest, PagedEngine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts requests and tokens, and asks the engine for its state when it is scraped."""

    def __init__(self, engine: PagedEngine, recorder: Recorder | None = None):
        self.registry = CollectorRegistry()
        how = {"registry": self.registry}
        self.requests = Counter("trimtab_requests", "Requests by how they ended", ["outcome"], **how)
        self.prompt_tokens = Counter("trimtab_prompt_tokens", "Tokens of prompts that were accepted", **how)
        self.tokens = Counter("trimtab_generated_tokens", "Tokens generated", **how)
        self.preemptions = Counter("trimtab_preemptions", "Sequences that gave their blocks back", **how)
        self.first = Histogram("trimtab_time_to_first_token_seconds", "From arrival", buckets=_SECONDS, **how)
        self.between = Histogram("trimtab_inter_token_latency_seconds", "Between tokens", buckets=_SECONDS, **how)
        self.whole = Histogram("trimtab_request_latency_seconds", "From arrival to the end", buckets=_SECONDS, **how)
        for name, text, read in (
            ("trimtab_running_sequences", "Sequences that are computed", lambda: len(engine.scheduler.running)),
            ("trimtab_waiting_sequences", "Sequences that wait", lambda: len(engine.scheduler.waiting)),
            ("trimtab_kv_blocks", "Blocks of the KV cache", lambda: engine.pool.blocks),
            ("trimtab_kv_blocks_used", "Blocks of the KV cache that are owned", lambda: engine.pool.used),
        ):
            Gauge(name, text, **how).set_function(read)
        if recorder:
            lost = Gauge("trimtab_unrecorded_requests", "Requests that could not be written down", **how)
            lost.set_function(lambda: recorder.lost)

    def observe(self, events: list[Event]) -> None:
        """Notes the events of a step."""
        for event in events:
            arrived, times = event.request.arrived, event.request.times
            if event.chosen:
                self.tokens.inc()
                if len(times) == 1:
                    self.first.observe(times[0] - arrived)
                else:
                    self.between.observe(times[-1] - times[-2])
            if event.last:
                self.whole.observe(times[-1] - arrived)

    def accepted(self, request: GenerationRequest) -> None:
        self.prompt_tokens.inc(request.prompt_tokens)

    def ended(self, request: GenerationRequest, outcome: str) -> None:
        """Notes how a request ended: stop, length, cancelled or failed."""
        self.requests.labels(outcome).inc()
        self.preemptions.inc(request.preemptions)

    def text(self) -> bytes:
        return generate_latest(self.registry)
