"""Processes that take the place of lost ones, and runs that go on."""

from __future__ import annotations

from tests.mutants.files import CHECKPOINT, CHECKPOINT_TESTS, LOOP, LOOP_TESTS, POOL, SAMPLING, STREAM
from tests.mutants.mutant import Mutant

HEALING, LEARNERS = "app/stages/healing.py", "app/workers/learner_group.py"
HEALING_TESTS, POOL_TESTS = ("tests/unit/stages/test_healing.py",), ("tests/unit/workers/test_rollout_pool.py",)

MUTANTS = (
    Mutant(
        "healing",
        POOL,
        "            self._bring_up_to_date(engine)\n        except EngineDiedError:\n",
        "            pass\n        except EngineDiedError:\n",
        "an engine that replaces another one samples with the weights of its folder",
        POOL_TESTS,
    ),
    Mutant(
        "healing",
        POOL,
        "            self._current = (method, args)\n",
        "            pass\n",
        "an engine that replaces another one gets the weights of an earlier push",
        POOL_TESTS,
    ),
    Mutant(
        "healing",
        POOL,
        '            self._current = ("pid", ())\n            if',
        "            if",
        "engines that start after the learner was lost are given its weights",
        POOL_TESTS,
    ),
    Mutant(
        "healing",
        SAMPLING,
        "missing = [place for place in share.places if place not in self._rollouts]",
        "missing = share.places",
        "responses that had ended are sampled a second time",
        POOL_TESTS,
    ),
    Mutant(
        "healing",
        SAMPLING,
        "if missing and self._pool.exact:",
        "if missing and not self._pool.exact:",
        "an exact run keeps half a batch of a lost engine",
        POOL_TESTS,
    ),
    Mutant(
        "healing",
        SAMPLING,
        "seeds = [self._prompts[i].ids for i in share.places], [self._seeds[i] for i in share.places]",
        "seeds = [self._prompts[i].ids for i in share.places], self._seeds[: len(share.places)]",
        "what is sampled again has other seeds",
        POOL_TESTS,
    ),
    Mutant(
        "healing",
        SAMPLING,
        "            if self._cancelled:\n                raise\n",
        "",
        "an engine is replaced for a batch that nobody wants",
        POOL_TESTS,
    ),
    Mutant("healing", HEALING, "        self._left -= 1\n", "", "a learner that always dies is started for ever", HEALING_TESTS),
    Mutant(
        "healing",
        HEALING,
        "        if not self._forget_first:\n            self._forget()\n",
        "",
        "engines go on with what a lost learner has left with them",
        HEALING_TESTS,
    ),
    Mutant(
        "healing",
        HEALING,
        "            except WOULD_COME_AGAIN:\n                raise\n",
        "",
        "a loss that is not finite is taken for a process that died",
        HEALING_TESTS,
    ),
    Mutant(
        "healing",
        STREAM,
        "            sampling.cancel()\n",
        "            pass\n",
        "a loop that has failed leaves a thread behind that follows its batches",
        ("tests/unit/stages/test_rollout_stream.py",),
    ),
    Mutant(
        "healing",
        LOOP,
        "prompt_cursor=batch.cursor",
        "prompt_cursor=stream._drawn",
        "a run that goes on has lost the prompts that were being sampled",
        HEALING_TESTS,
    ),
    Mutant(
        "healing",
        LOOP,
        "settle(wait_for_it=ending)",
        "settle(wait_for_it=False)",
        "a run that ends does not wait for its last checkpoint",
        LOOP_TESTS,
    ),
    Mutant(
        "healing",
        CHECKPOINT,
        "        self.settle()\n        self._commit = in_thread",
        "        self._commit = in_thread",
        "two checkpoints are committed at the same time",
        CHECKPOINT_TESTS,
    ),
    Mutant(
        "healing",
        CHECKPOINT,
        "state, saved = dict(state), time.time()",
        "saved = time.time()",
        "a checkpoint's state is that of a later moment than its parts",
        CHECKPOINT_TESTS,
    ),
)
