"""Small models and data for the trainers' tests."""

from __future__ import annotations

import os
import warnings
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from adalora.torch import AdaLoraConfig, adapt

TARGETS = ["query", "value", "intermediate.dense"]
# The budget falls after steps 2, 4 and 6, and a last time at step 8.
SETTINGS = {
    "init_r": 4,
    "target_r": 2,
    "tinit": 1,
    "tfinal": 4,
    "deltaT": 2,
    "lora_alpha": 6,
    "orth_reg_weight": 0.3,
    "init_lora_weights": False,
    "target_modules": TARGETS,
    "task_type": "SEQ_CLS",
}
STEPS = 12


def bert(dropout: float = 0.0) -> BertForSequenceClassification:
    """A classifier with two layers and random weights, the same at every call."""
    torch.manual_seed(1)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def adapted(dropout: float = 0.0, **changed: Any) -> nn.Module:
    """The classifier with adapters."""
    model = bert(dropout)
    return adapt(model, AdaLoraConfig(**{**SETTINGS, "lora_dropout": dropout, **changed}))


def accelerated(dropout: float = 0.0, **changed: Any) -> nn.Module:
    """The classifier with PEFT's adapters, accelerated, and the values of `adapted`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        import adalora.peft
    settings = {**SETTINGS, "total_step": STEPS, "lora_dropout": dropout, **changed}
    model = adalora.peft.accelerate(peft.get_peft_model(bert(dropout), peft.AdaLoraConfig(**settings)))
    values = {
        f"base_model.model.{name}": p for name, p in adapted(dropout, **changed).named_parameters() if "lora" in name
    }
    _, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    return model


def examples(number: int = 48) -> list[dict[str, Any]]:
    """Random sentences and labels, the same at every call."""
    made = torch.Generator().manual_seed(2)
    return [
        {
            "input_ids": torch.randint(50, (8,), generator=made),
            "attention_mask": torch.ones(8, dtype=torch.int64),
            "labels": torch.randint(3, (), generator=made),
        }
        for _ in range(number)
    ]
