"""MLflow: metrics go to the server or database in MLFLOW_TRACKING_URI, by default to `mlflow.db` in the run folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from app.trackers.service import Point, RunFacts

for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a run talks to what its recipe names, and to nobody else
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # what is not sent is offered again later; more retries would block for minutes
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow.entities import Metric, Param  # noqa: E402 - reads the environment
from mlflow.tracking import MlflowClient  # noqa: E402

METRICS_PER_CALL, PARAMS_PER_CALL, PARAM_CHARACTERS = 1000, 100, 6000
"""MLflow's own limits."""
REFUSED = re.compile(r"[^\w/. :-]")
"""Characters that MLflow refuses in the name of a metric."""
CREDENTIALS = re.compile(r"(?<=//)[^/@]*@")


class MlflowRun:
    """Metrics are `<stage>/<name>`; the parameters of the run are the keys of its recipe."""

    def __init__(self, facts: RunFacts) -> None:
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{facts.path / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=self._uri)
        if facts.known_id is not None:
            self._client.update_run(facts.known_id, status="RUNNING")
            self._id = facts.known_id
            return
        experiment = self._client.get_experiment_by_name(facts.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(facts.project)
        self._id = str(self._client.create_run(experiment_id, run_name=facts.name).info.run_id)
        params = [Param(name, str(value)[:PARAM_CHARACTERS]) for name, value in facts.config.items()]
        for start in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(self._id, params=params[start : start + PARAMS_PER_CALL])

    @property
    def run_id(self) -> str:
        return self._id

    @property
    def address(self) -> str:
        return f"{CREDENTIALS.sub('', self._uri)}, run {self._id}"

    def log(self, points: Sequence[Point]) -> None:
        metrics = [
            Metric(REFUSED.sub("_", f"{stage}/{name}"), value, int(time * 1000), step)
            for stage, step, time, values in points
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(self._id, metrics=metrics[start : start + METRICS_PER_CALL])

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")
