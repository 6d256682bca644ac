"""Open-Assistant's released reward models, whose folders plain transformers does not know.

Their config.json says `gpt_neox_reward_model`: GPT-NeoX's keys and `pooling`. Their weights are those of a GPT-NeoX trunk under
`gpt_neox.` and of one linear layer with a bias, `out_proj`, over the pooled hidden state.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import nn
from transformers import AutoConfig, GPTNeoXConfig, GPTNeoXForSequenceClassification, GPTNeoXModel, GPTNeoXPreTrainedModel, PreTrainedModel

from app.errors import ModelError


class OpenAssistantConfig(GPTNeoXConfig):
    """What the folder's config.json holds."""

    model_type = "gpt_neox_reward_model"
    pooling: Literal["mean", "last"] = "last"


AutoConfig.register(OpenAssistantConfig.model_type, OpenAssistantConfig, exist_ok=True)


class _FolderLayout(GPTNeoXPreTrainedModel):
    """Modules by the names that the folder's weights have."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config)
        self.out_proj = nn.Linear(config.hidden_size, 1)
        self.post_init()


def load_open_assistant(path: str, config: OpenAssistantConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The folder at `path` as an ordinary sequence-classification model with the same scores.

    Such a model's `score` has no bias, so the bias of `out_proj` becomes `config.reward_offset` = -bias: logit - reward_offset
    is what Open-Assistant's model returns. Raises ModelError where weights are missing.
    """
    layout, report = _FolderLayout.from_pretrained(path, config=plain_config(config), dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        raise ModelError(f"{path}: no weights for {', '.join(sorted(report['missing_keys'])[:5])}; copy the whole folder again")
    layout.config.reward_offset = -layout.out_proj.bias.item()
    with torch.device("meta"):  # only its shell is used
        model = GPTNeoXForSequenceClassification(layout.config)
    model.gpt_neox = layout.gpt_neox
    model.score.weight = layout.out_proj.weight
    return cast(PreTrainedModel, model)


def plain_config(config: OpenAssistantConfig) -> GPTNeoXConfig:
    """That of the trunk with one score."""
    own = ("model_type", "architectures", "id2label", "label2id")
    plain = GPTNeoXConfig(**{key: value for key, value in config.to_dict().items() if key not in own})
    plain.num_labels = 1
    return plain
