"""What Prometheus is told about a model's replica. Ray adds its own tags (deployment, replica, application)."""

from __future__ import annotations

from ray.serve import metrics

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]
SEQUENCES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


class ReplicaMetrics:
    """Counters and histograms of one replica."""

    def __init__(self, model: str) -> None:
        self._model = {"model": model}
        self._requests = metrics.Counter("corral_scoring_requests", "Requests by outcome.", ("model", "outcome"))
        self._latency = metrics.Histogram("corral_scoring_latency_seconds", "From arrival to answer.", SECONDS, ("model",))
        self._queue = metrics.Histogram("corral_scoring_queue_seconds", "From arrival to the start of the batch.", SECONDS, ("model",))
        self._compute = metrics.Histogram("corral_scoring_compute_seconds", "Of one batch.", SECONDS, ("model",))
        self._batch = metrics.Histogram("corral_scoring_batch_sequences", "Sequences of one batch.", SEQUENCES, ("model",))
        self._tokens = metrics.Counter("corral_scoring_tokens", "Tokens computed, without padding.", ("model",))
        self._padding = metrics.Counter("corral_scoring_padding_tokens", "Padding computed along.", ("model",))
        self._cached = metrics.Counter("corral_scoring_cached_sequences", "Sequences answered from the cache.", ("model",))

    def request(self, outcome: str, seconds: float) -> None:
        """A request ended: `ok`, or the kind of its failure."""
        self._requests.inc(1, self._model | {"outcome": outcome})
        self._latency.observe(seconds, self._model)

    def batch(self, sequences: int, tokens: int, padding: int, seconds: float, waited: list[float]) -> None:
        """A batch was computed; waited: seconds of each of its requests."""
        self._batch.observe(sequences, self._model)
        self._compute.observe(seconds, self._model)
        self._tokens.inc(tokens, self._model)
        if padding:
            self._padding.inc(padding, self._model)
        for each in waited:
            self._queue.observe(each, self._model)

    def cached(self, sequences: int) -> None:
        """So many sequences of a request needed no computing."""
        if sequences:
            self._cached.inc(sequences, self._model)
