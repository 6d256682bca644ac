"""What engines are told beside their model."""

from __future__ import annotations

import pytest

from app.config.rollout import RolloutConfig
from app.config.shared import WorkersConfig
from app.errors import RolloutError
from app.workers.engine_settings import engine_options, require_compiler


@pytest.mark.parametrize(
    ("gpus", "eager", "compiles", "disabled"), [(0, None, False, "1"), (0, False, True, "0"), (1, None, True, "0"), (1, True, False, None)]
)
def test_engines_compile_on_gpus_and_where_they_are_told_to(gpus: int, eager: bool | None, compiles: bool, disabled: str | None) -> None:
    config = RolloutConfig(engines=WorkersConfig(gpus=gpus), enforce_eager=eager)
    assert config.compiles is compiles
    assert engine_options(config, "DEFAULT")["runtime_env"]["env_vars"].get("TORCHDYNAMO_DISABLE") == disabled


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.cpp_builder import cpp_compiler_search

    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    cpp_compiler_search.cache_clear()
    with pytest.raises(RolloutError, match=r"rollout.enforce_eager = false .* install g\+\+"):
        require_compiler()
