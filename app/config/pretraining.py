"""The pretraining mix of PPO."""

from __future__ import annotations

from pydantic import Field, model_validator

from app.config.data import ColumnsConfig, FormatName, SetConfig
from app.schema import Config, InputPath


class PretrainingConfig(Config):
    """Next-token loss on other text, added to the policy's loss at every optimizer step (PPO-ptx, Ouyang et al. 2022)."""

    coef: float = Field(0.0, ge=0)
    """Weight of the mean loss per target token; 0 turns it off, and nothing is read."""
    path: InputPath | None = None
    """File, folder, glob, URL or hub name of what SFT can learn from, read and cut as `data` says; raw text is learnt whole."""
    format: FormatName = "auto"
    """Row format; `auto` looks at the first row, or at columns."""
    columns: ColumnsConfig = ColumnsConfig()
    subset: str | None = None
    """Configuration of a hub data set that has several."""
    split: str | None = None
    """Split of a hub data set, or several joined by +; all of them without one."""
    batch_size: int = Field(32, ge=1)
    """Sequences per optimizer step over all learner workers."""
    micro_batch_size: int = Field(8, ge=1)
    """Sequences per forward pass on one learner worker, where ppo.micro_batch_tokens does not rule."""

    @model_validator(mode="after")
    def _has_text(self) -> PretrainingConfig:
        if self.coef and self.path is None:
            raise ValueError(f"coef = {self.coef:g} weighs the loss on text that is not given: set path, or coef = 0")
        return self

    @property
    def source(self) -> SetConfig:
        """What is read, as a data set."""
        return SetConfig(path=self.path, format=self.format, columns=self.columns, subset=self.subset, split=self.split)
