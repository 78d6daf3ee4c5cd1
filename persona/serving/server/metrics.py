"""Prometheus metrics of the plug-in. No label holds anything of a user."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily

from persona.serving.server.encoding import Made

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """Counters and histograms in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        kwargs = {"registry": self.registry}
        self.requests = Counter(
            "persona_requests",
            "Generation calls: personalized, plain (with the reason), refused by us, or failed behind us",
            ["route", "outcome", "reason"],
            **kwargs,
        )
        self.encode = Histogram(
            "persona_encode_seconds", "Reading the store, encoding, resampling", buckets=_SECONDS, **kwargs
        )
        self.overhead = Histogram(
            "persona_overhead_seconds", "From the whole request to handing it on", buckets=_SECONDS, **kwargs
        )
        self.blocked = Histogram(
            "persona_event_loop_seconds", "Stretches of our own work on the event loop", buckets=_SECONDS, **kwargs
        )
        self.longest_blocked = Gauge(
            "persona_event_loop_longest_seconds", "The longest of these stretches since the start", **kwargs
        )
        self.pending = Gauge("persona_pending_encodings", "Calls that wait for encoding threads", **kwargs)
        self.events = Counter("persona_events_stored", "Events stored through the API", **kwargs)
        self._longest = 0.0
        self._lookups = _Lookups()
        self.registry.register(self._lookups)

    def encoded(self, made: Made) -> None:
        """Notes what encoding a user took."""
        self.encode.observe(made.seconds)
        seen = self._lookups  # answers overtake one another
        seen.hits, seen.misses = max(seen.hits, made.hits), max(seen.misses, made.misses)

    @contextmanager
    def on_loop(self) -> Iterator[None]:
        """Times a stretch of work on the event loop."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.blocked.observe(seconds)
            if seconds > self._longest:
                self._longest = seconds
                self.longest_blocked.set(seconds)


class _Lookups:
    """The counters that the encoding keeps itself."""

    hits = misses = 0

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily("persona_state_lookups", "User states asked for", labels=["cache"])
        family.add_metric(["hit"], self.hits)
        family.add_metric(["miss"], self.misses)
        yield family
