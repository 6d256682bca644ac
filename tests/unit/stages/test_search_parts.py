"""The parts of a search without a Ray: what is recorded, what a trial reports and restores, what schedulers remember."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
from ray.tune import Experiment, grid_search
from ray.tune.search import SearchGenerator

from app.alarms import AlarmWatch
from app.checkpoint import CheckpointStore
from app.config.loading import with_values
from app.config.recipe import Recipe
from app.config.search_space import points
from app.errors import AlarmError, CheckpointError, ConfigError, NonFiniteError, RolloutError
from app.stages.actor_learner import LoopState
from app.stages.tune import keep_model
from app.stages.tuning import trial as trials
from app.stages.tuning.records import VALUES, SearchRecords, read_ended, read_history, trial_row, write_history
from app.stages.tuning.schedules import Asha, Median, Pbt, scheduler
from app.stages.tuning.search import AtATime, optuna_search, searcher, state_to_resume
from app.stages.tuning.trial import Marked, TrialInputs, TrialReporter, kept_checkpoints, newest_checkpoint, restored_loop
from app.stages.tuning.verdicts import LOWEST_TARGET, Judge, Mark

SPACE = {"ppo.policy.lr": {"type": "loguniform", "low": 1e-6, "high": 1e-4}}


def recipe(**values: Any) -> Recipe:
    return with_values(
        Recipe(), {"ppo.steps": 8, "tune.space": SPACE, **{name.replace("__", "."): value for name, value in values.items()}}
    )


def metrics(score: float) -> dict[str, float]:
    return {"score_mean": score, "score_std": 1.0, "kl": 1.0, "entropy": 2.0, "response_length": 9.0}


def report(step: int, score: float) -> dict[str, Any]:
    judge = Judge(Recipe().tune)
    judge.add(step, metrics(score))
    return judge.result()


class RayTrial(SimpleNamespace):
    """Only itself, like a trial of Tune's."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def ray_trial(name: str, last: dict[str, Any] | None = None, status: str = "TERMINATED", error: Exception | None = None) -> Any:
    config = {VALUES: {"ppo.policy.lr": 1e-5}}
    return RayTrial(trial_id=name, last_result=last, status=status, config=config, get_error=lambda: error)


class Notes:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.logged: list[dict[str, float]] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def log(self, stage: str, step: int, logged: dict[str, float]) -> None:
        self.logged.append(logged)


# -- records


def test_records_survive_a_kill_and_a_step_done_again_counts_once(tmp_path: Path) -> None:
    notes: Any = Notes()
    first, second = ray_trial("a", report(8, 1.5)), ray_trial("b", {**report(3, 9.0), "status": "over KL budget", "why": "KL 30 nats"})
    records = SearchRecords(tmp_path, notes, recipe(), 3)
    for step, score in ((1, 0.5), (2, 0.7), (2, 0.8), (3, math.nan)):
        records.on_trial_result(0, [], first, report(step, score))
    records.on_trial_complete(0, [], first)
    with (tmp_path / "ended.jsonl").open("a") as file:
        file.write('{"trial": "tri')  # killed in the middle of a line
    again = SearchRecords(tmp_path, notes, recipe(), 3)
    again.on_trial_complete(0, [], first)  # Tune had not noted its end
    again.on_trial_complete(0, [], second)
    again.on_trial_error(0, [], ray_trial("c", None, "ERROR", RuntimeError("traceback\nRuntimeError: out of memory")))
    assert list(read_ended(tmp_path)) == ["trial_a", "trial_b"]
    assert [step["score_mean"] for step in read_history(tmp_path)["trial_a"]] == [0.5, 0.8, None]
    table = pq.read_table(write_history(tmp_path))
    assert table.column_names == ["trial", "step", "objective", "score_mean", "kl", "entropy", "response_length"]
    assert table.column("step").to_pylist() == [1, 2, 3]
    assert [line.split(": ", 1)[1] for line in notes.lines] == [
        "trial 1 of 3, trial_a: finished after 8 of 8 steps, objective 1.450",
        "trial 2 of 3, trial_b: over KL budget after 3 of 8 steps, objective 8.950: KL 30 nats",
        "trial 3 of 3, trial_c: failed: RuntimeError: out of memory",
    ]


def test_rows_tell_how_a_trial_ended() -> None:
    assert trial_row(ray_trial("a", report(8, 1.0)), 8)["status"] == "finished"
    assert trial_row(ray_trial("a", report(4, 1.0)), 8)["status"] == "stopped early"
    marked = trial_row(ray_trial("a", {**report(2, math.nan), "status": "non-finite", "why": "score nan"}), 8)
    assert (marked["status"], marked["objective"], marked["why"]) == ("non-finite", None, "score nan")
    failed = trial_row(ray_trial("a", None, "ERROR", RuntimeError("ray says\nValueError: no")), 8)
    assert (failed["status"], failed["steps"], failed["error"]) == ("failed", 0, "ValueError: no")
    assert failed["config"] == {"ppo.policy.lr": 1e-5} and failed["trial"] == "trial_a"


def test_only_the_best_trials_model_is_kept(tmp_path: Path) -> None:
    rows = [{"trial": name} for name in ("trial_a", "trial_b")]
    for row in rows:
        (tmp_path / row["trial"] / "model").mkdir(parents=True)
        (tmp_path / row["trial"] / "checkpoints").mkdir()
    keep_model(tmp_path, rows, rows[1])
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")) == ["trial_b/model"]


# -- trials


@dataclasses.dataclass
class Reports:
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    pointers: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def report(self, result: dict[str, Any], checkpoint: Any = None) -> None:
        self.results.append(result)
        if checkpoint is not None:
            self.pointers.append(json.loads((Path(checkpoint.path) / "checkpoint.json").read_text()))


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Reports:
    taken = Reports()
    monkeypatch.setattr(trials.tune, "report", taken.report)
    return taken


def reporter(folder: Path, searched: Recipe) -> tuple[TrialReporter, Judge, AlarmWatch]:
    judge, watch = Judge(searched.tune), AlarmWatch(searched.alarms)
    return TrialReporter(searched, judge, watch, CheckpointStore(folder / "trial_a" / "checkpoints")), judge, watch


def steps(told: TrialReporter, watch: AlarmWatch, first: int, last: int) -> None:
    for step in range(first, last + 1):
        told.log("ppo", step, metrics(float(step)))
        watch.look(metrics(float(step)))
        told.save(step, dataclasses.asdict(LoopState(step, version=step, kl_coef=0.05)), lambda folder: None)


def test_a_trial_reports_every_step_and_keeps_a_checkpoint_where_one_is_due(tmp_path: Path, reports: Reports) -> None:
    searched = recipe(tune__save_every=3)
    told, _, watch = reporter(tmp_path, searched)
    exported: list[bool] = []
    told.export = lambda: exported.append(True)
    steps(told, watch, 1, 8)
    assert [result["step"] for result in reports.results] == list(range(1, 9))
    assert [result.get("done", False) for result in reports.results] == [False] * 7 + [True]
    assert [pointer["checkpoint"] for pointer in reports.pointers] == ["step-00000003", "step-00000006"] and exported == [True]


def test_everything_of_a_trial_comes_back_from_its_checkpoint(tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = recipe(tune__save_every=3)
    told, judge, watch = reporter(tmp_path, searched)
    steps(told, watch, 1, 3)
    pointer = tmp_path / "checkpoint.json"
    pointer.write_text(json.dumps(reports.pointers[-1]))
    monkeypatch.setattr(trials.tune, "get_checkpoint", lambda: trials.tune.Checkpoint.from_directory(tmp_path))
    saved = newest_checkpoint(tmp_path)
    assert saved is not None and saved.step == 3
    assert Judge(searched.tune, saved.state["steps"]).result() == judge.result()
    assert AlarmWatch(searched.alarms, saved.state["alarms"]).history == watch.history
    assert restored_loop(saved.state, searched) == LoopState(3, version=3, kl_coef=0.05)
    copied = with_values(searched, {"ppo.kl.coef": 0.2})  # a population changed it: the old coefficient must not rule on
    assert restored_loop(saved.state, copied).kl_coef is None
    pointer.write_text(json.dumps({"trial": "trial_a", "checkpoint": "step-00000001"}))  # replaced since
    later = newest_checkpoint(tmp_path)
    assert later is not None and later.step == 3


@pytest.mark.parametrize("perturb_every", [2, 4, 8])
def test_a_population_keeps_checkpoints_for_trials_that_are_about_to_read_them(perturb_every: int) -> None:
    population = recipe(tune__scheduler="pbt", tune__save_every=4, tune__perturb_every=perturb_every, ppo__steps=20)
    assert kept_checkpoints(population.tune) == 4
    assert kept_checkpoints(recipe(tune__save_every=4, tune__perturb_every=perturb_every).tune) == 2


def test_a_step_that_the_loss_scaling_of_fp16_has_skipped_is_no_reason_not_to_keep_a_trial(tmp_path: Path, reports: Reports) -> None:
    """Its gradient norm is infinite, which the loop lets pass and JSON cannot hold."""
    searched = recipe(tune__save_every=3)
    told, _, watch = reporter(tmp_path, searched)
    steps(told, watch, 1, 2)
    watch.look(metrics(2.0) | {"policy_grad_norm": math.inf})
    steps(told, watch, 3, 3)
    saved = CheckpointStore(tmp_path / "trial_a" / "checkpoints").latest()
    assert saved is not None and reports.pointers
    history = AlarmWatch(searched.alarms, saved.state["alarms"]).history
    assert history[-2] == metrics(2.0) and history[-1] == metrics(3.0)


def test_a_trial_over_its_budget_is_stopped_before_anything_of_the_step_is_kept(tmp_path: Path, reports: Reports) -> None:
    told, _, watch = reporter(tmp_path, recipe(tune__kl_budget=0.5, tune__save_every=1))
    with pytest.raises(Marked) as stopped:
        steps(told, watch, 1, 1)
    assert stopped.value.mark.status == "over KL budget" and not reports.results


def test_held_out_answers_are_asked_for_when_they_are_due(tmp_path: Path, reports: Reports) -> None:
    told, _, watch = reporter(tmp_path, recipe(tune__objective="held_out", tune__eval_every=3, tune__kl_price=0.0))
    asked = iter([1.0, 2.0, 3.0, 4.0])
    told.evaluate = lambda: (next(asked), 0.5)
    steps(told, watch, 1, 8)
    assert [result["objective"] for result in reports.results] == [1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 4.0]


def run_one(folder: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], error: Exception | None = None) -> None:
    """A trial with these values, whose training raises `error`."""

    def train(*_: Any) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(trials, "train", train)
    monkeypatch.setattr(trials.tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "a"))
    monkeypatch.setattr(trials, "write_stacks_on_signal", lambda _: None)
    nothing: Any = None
    trials.run_trial({VALUES: values}, inputs=TrialInputs(recipe(), str(folder), "", "", {}, nothing, nothing))


@pytest.mark.parametrize(
    ("values", "error", "status"),
    [
        ({"ppo.minibatches": 3}, None, "refused"),
        ({"ppo.deepspeed.zero_stage": 0}, ConfigError("deepspeed.zero_stage = 0 trains wrongly in bf16"), "refused"),
        ({}, NonFiniteError("policy loss is nan"), "non-finite"),
        ({}, AlarmError("entropy", 0.0, 0.1, "raise it"), "collapsed"),
    ],
)
def test_a_trial_that_its_configuration_spoils_is_marked_and_not_tried_again(
    tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], error: Exception | None, status: str
) -> None:
    monkeypatch.setattr(trials.tune, "get_checkpoint", lambda: None)
    run_one(tmp_path, monkeypatch, values, error)
    (result,) = reports.results
    row = trial_row(ray_trial("a", result), 8)
    assert (row["status"], row["steps"], row["objective"]) == (status, 0, None) and result["done"]
    assert (str(error) if error else "ppo.batch_size = 64 is no multiple of minibatches") in row["why"]
    assert result["target"] == LOWEST_TARGET


def test_other_errors_are_tried_again(tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.tune, "get_checkpoint", lambda: None)
    with pytest.raises(RolloutError):
        run_one(tmp_path, monkeypatch, {}, RolloutError("an engine died"))
    assert not reports.results


def test_a_copy_under_refused_values_keeps_the_steps_that_it_was_copied_with(
    tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, _, watch = reporter(tmp_path, recipe(tune__save_every=3))
    steps(told, watch, 1, 3)
    (tmp_path / "checkpoint.json").write_text(json.dumps(reports.pointers[-1]))
    monkeypatch.setattr(trials.tune, "get_checkpoint", lambda: trials.tune.Checkpoint.from_directory(tmp_path))
    run_one(tmp_path, monkeypatch, {"ppo.minibatches": 3})
    last = reports.results[-1]
    assert (last["step"], last["status"], last["done"]) == (3, "refused", True) and last["target"] < last["objective"]


def test_without_its_pointer_a_trial_goes_on_from_the_newest_checkpoint_of_the_trial_that_saved_it(
    tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine was lost before `run.storage` had the pointer."""
    told, _, watch = reporter(tmp_path, recipe(tune__save_every=3))
    steps(told, watch, 1, 3)
    named = trials.tune.Checkpoint(str(tmp_path / "trial_a" / "checkpoint_000001"))
    monkeypatch.setattr(trials.tune, "get_checkpoint", lambda: named)
    saved = newest_checkpoint(tmp_path)
    assert saved is not None and saved.step == 3
    monkeypatch.setattr(trials.tune, "get_checkpoint", lambda: trials.tune.Checkpoint(str(tmp_path / "trial_b" / "checkpoint_000000")))
    assert newest_checkpoint(tmp_path) is None  # it has none at all: it begins at the start


# -- schedulers and searchers


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_scheduler_knows_the_trials_from_before_the_search_was_killed(kind: str) -> None:
    searched = recipe(tune__scheduler=kind, tune__grace_steps=2)
    past = {f"trial_{name}": [report(step, 5.0) for step in range(1, 9)] for name in "abc"}
    controller: Any = SimpleNamespace(get_trials=list, get_live_trials=list, search_alg=None)
    decisions = []
    for known in (past, {}):
        built: Any = scheduler(searched, known, lambda record: None)
        assert isinstance(built, Asha | Median)
        for name in "abc":
            built.on_trial_add(controller, ray_trial(name))
        weak = ray_trial("weak")
        built.on_trial_add(controller, weak)
        results = [built.on_trial_result(controller, weak, report(step, 1.0)) for step in (1, 2)]
        decisions.append("STOP" in results)
    assert decisions == [True, False]


def test_a_population_goes_on_from_its_last_look_and_tells_what_it_changes() -> None:
    told: list[Any] = []
    built: Any = scheduler(recipe(tune__scheduler="pbt", tune__perturb_every=2), {}, told.append)
    assert isinstance(built, Pbt)
    checkpoints = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None))
    members = []
    for name, score in (("weak", 1.0), ("strong", 2.0)):
        member = ray_trial(name, report(5, score))
        member.experiment_tag, member.run_metadata = name, SimpleNamespace(checkpoint_manager=checkpoints)
        built.on_trial_add(SimpleNamespace(search_alg=None), member)
        members.append(member)
    state = built._trial_state
    assert {s.last_perturbation_time for s in state.values()} == {4}
    weak, strong = members
    built._log_config_on_step(state[weak], state[strong], weak, strong, {VALUES: {"ppo.policy.lr": 2e-5}})
    assert told[0]["trial"] == "trial_weak" and told[0]["copied"] == "trial_strong" and told[0]["step"] == 4
    assert told[0]["before"] == {"ppo.policy.lr": 1e-5} and told[0]["after"] == {"ppo.policy.lr": 2e-5}


def test_the_configurations_of_a_search_follow_from_the_seed() -> None:
    searched = recipe(tune__trials=5).tune
    assert points(searched, 1) == points(searched, 1) != points(searched, 2)
    assert len(points(searched, 1)) == 5


def test_a_search_whose_last_state_is_cut_is_not_begun_again_in_silence(tmp_path: Path) -> None:
    assert not state_to_resume(tmp_path)
    state = tmp_path / "experiment_state-2026-01-01.json"
    state.write_text("{}")
    assert state_to_resume(tmp_path)
    state.write_text('{"trial_da')
    with pytest.raises(CheckpointError, match="to begin the search again"):
        state_to_resume(tmp_path)


def generator(searched: Recipe, folder: Path, concurrent: int, *, resumed: bool) -> Any:
    """What hands Tune the configurations of a random or grid search, as `run_search` makes it."""
    made: Any = searcher(searched, concurrent)
    if resumed:
        made.restore_from_dir(str(folder))
    else:
        known = points(searched.tune, searched.run.seed)
        config = {VALUES: grid_search(known)}
        made.add_configurations([Experiment("tune", lambda config: None, config=config, storage_path=str(folder))])
    AtATime(made, concurrent).setup()
    return made


@pytest.mark.parametrize("how", ["random", "grid"])
def test_a_search_that_goes_on_repeats_no_trial_and_takes_the_new_number_at_a_time(tmp_path: Path, how: str) -> None:
    space = {"ppo.epochs": {"type": "grid", "values": [1, 2, 3, 4, 5]}} if how == "grid" else SPACE
    searched = recipe(tune__trials=5, tune__searcher=how, tune__space=space)
    known = points(searched.tune, searched.run.seed)
    first = generator(searched, tmp_path, 2, resumed=False)
    begun = [first.next_trial(), first.next_trial()]
    assert first.next_trial() is None, "two at a time"
    first.on_trial_complete(begun[0].trial_id)
    first.save_to_dir(str(tmp_path), "1")
    again = generator(searched, tmp_path, 3, resumed=True)
    more = [again.next_trial(), again.next_trial()]
    assert None not in more and again.next_trial() is None, "three at a time, one of which was under way"
    for trial in (begun[1], *more):
        again.on_trial_complete(trial.trial_id)
    rest = [again.next_trial(), again.next_trial()]
    assert rest[1] is None and again.is_finished()
    every = [*begun, *more, rest[0]]
    assert [trial.config[VALUES] for trial in every] == known
    assert len({trial.trial_id for trial in every}) == 5


def test_optuna_takes_the_new_number_at_a_time_with_what_was_under_way(tmp_path: Path) -> None:
    searched = recipe(tune__trials=5, tune__searcher="optuna")
    first = SearchGenerator(cast(Any, searcher(searched, 1)))
    assert first.searcher.suggest("a") is not None and first.searcher.suggest("b") is None
    first.save_to_dir(str(tmp_path), "1")
    limited: Any = searcher(searched, 2)
    again = SearchGenerator(limited)
    again.restore_from_dir(str(tmp_path))
    AtATime(limited, 2).setup()
    assert limited.suggest("b") is not None and limited.suggest("c") is None
    again.on_trial_complete("a", report(8, 1.0))
    assert [trial.value for trial in limited.searcher._ot_study.trials][:1] == [report(8, 1.0)["target"]]


def test_two_objectives_are_asked_for_and_told_together() -> None:
    searched = recipe(tune__searcher="optuna", tune__multi_objective=True, tune__window=1)
    search = optuna_search(searched)
    study = search._ot_study
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    ends = {"good": (2.0, 3.0), "near": (1.0, 1.0), "beaten": (0.5, 2.0), "collapsed": (9.0, 0.5), "non-finite": (math.nan, 4.0)}
    for name, (score, kl) in ends.items():
        suggestion = search.suggest(name)
        assert suggestion is not None and 1e-6 <= suggestion[VALUES]["ppo.policy.lr"] <= 1e-4
        judge = Judge(searched.tune)
        judge.add(1, metrics(0.0))
        judge.add(2, {**metrics(score), "kl": kl})
        mark = Mark(cast(Any, name), "why") if name in ("collapsed", "non-finite") else None
        search.on_trial_complete(name, judge.result(mark))
    told = dict(zip(ends, study.trials, strict=True))
    assert all(trial.state.name == "COMPLETE" for trial in told.values())
    assert {name for name, trial in told.items() if trial in study.best_trials} == {"good", "near"}
    assert told["good"].values == [2.0, 3.0]
    search.suggest("spoilt at once")
    search.on_trial_complete("spoilt at once", Judge(searched.tune).result(Mark("non-finite", "loss is nan")))
    assert study.trials[-1].state.name == "COMPLETE" and study.trials[-1] not in study.best_trials
