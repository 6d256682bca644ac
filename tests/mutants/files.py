"""Files that mutants are planted in, and tests that notice them."""

ADVANTAGES, GROUPS, KL = "app/numerics/advantages.py", "app/numerics/groups.py", "app/numerics/kl.py"
LOGPROBS, MASKED, LOSS = "app/numerics/logprobs.py", "app/numerics/masked.py", "app/numerics/policy_loss.py"
REWARDS, MOMENTS = "app/numerics/rewards.py", "app/numerics/moments.py"
ALGORITHM, CREDIT, SURROGATE, SHAPING = (f"app/algorithms/{name}.py" for name in ("algorithm", "credit", "surrogate", "shaping"))
LOOP, CHECKS, ACTOR_CRITIC, POOL, SAMPLING, PUSH = (
    "app/stages/actor_learner.py",
    "app/stages/step_checks.py",
    "app/workers/actor_critic.py",
    "app/workers/rollout_pool.py",
    "app/workers/sampling.py",
    "app/workers/weight_publisher.py",
)
CHECKPOINT = "app/checkpoint.py"
ENGINE, ENGINE_THREAD, STREAM = "app/workers/rollout_engine.py", "app/workers/engine_thread.py", "app/stages/rollout_stream.py"

CHECKPOINT_TESTS = ("tests/unit/test_checkpoint.py",)
GAE_TESTS = ("tests/oracle/test_literal_advantages.py", "tests/unit/numerics/test_advantages.py")
GROUP_TESTS = ("tests/oracle/test_literal_groups.py",)
KL_TESTS = ("tests/unit/numerics/test_kl.py",)
LONG_TAIL_TESTS = ("tests/unit/stages/test_long_tail.py",)
LOGPROB_TESTS = ("tests/oracle/test_literal_logprobs.py", "tests/unit/numerics/test_logprobs.py")
LOOP_TESTS = ("tests/unit/stages/test_actor_learner.py",)
LOSS_TESTS = ("tests/oracle/test_literal_losses.py", "tests/unit/numerics/test_policy_loss.py")
MASKED_TESTS = ("tests/unit/numerics/test_masked.py",)
PROPERTIES = ("tests/unit/algorithms/test_properties.py",)
REWARD_TESTS = ("tests/oracle/test_literal_rewards.py",)
SHAPING_TESTS = ("tests/unit/algorithms/test_shaping.py",)
STEP_TESTS = ("tests/oracle/test_literal_step.py",)
SURROGATE_TESTS = ("tests/unit/algorithms/test_surrogate.py",)
