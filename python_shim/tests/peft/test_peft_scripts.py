"""What PEFT's users write for AdaLoRA, with one line added, on tiny models of random weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import AdaLoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn

import adalora.peft
from adalora import InvalidArgumentError
from adalora.torch.transformers import AdaLoraCallback

STEPS = 24
SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 6, "deltaT": 2, "total_step": STEPS, "lora_alpha": 16}
Batch = dict[str, Tensor]


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 40, shape)


def causal_lm() -> tuple[nn.Module, AdaLoraConfig, Callable[[], Batch]]:
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    config = AdaLoraConfig(task_type=TaskType.CAUSAL_LM, fan_in_fan_out=True, lora_dropout=0.1, **SCHEDULE)
    ids = tokens(4, 12)
    return model, config, lambda: {"input_ids": ids, "labels": ids}


def seq2seq_lm() -> tuple[nn.Module, AdaLoraConfig, Callable[[], Batch]]:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    config = AdaLoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, target_modules=["q", "v"], lora_dropout=0.01, **SCHEDULE)
    source, target = tokens(4, 10), tokens(4, 6)
    return model, config, lambda: {"input_ids": source, "labels": target}


def token_classification() -> tuple[nn.Module, AdaLoraConfig, Callable[[], Batch]]:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    model = transformers.BertForTokenClassification(transformers.BertConfig(**sizes))
    config = AdaLoraConfig(task_type=TaskType.TOKEN_CLS, target_modules=["query", "key", "value", "dense"], **SCHEDULE)
    ids = tokens(4, 10)
    return model, config, lambda: {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 3}


def image_classification() -> tuple[nn.Module, AdaLoraConfig, Callable[[], Batch]]:
    sizes = {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
    config = transformers.ResNetConfig(**sizes, layer_type="basic")
    model = transformers.ResNetForImageClassification(config)
    # No task type of PEFT's is for images: its outer model leaves the penalty out.
    adapters = AdaLoraConfig(
        target_modules=["convolution"], modules_to_save=["classifier"], orth_reg_weight=0.0, **SCHEDULE
    )
    x = torch.randn(6, 3, 32, 32)
    labels = torch.arange(6) % 3
    return model, adapters, lambda: {"pixel_values": x + 0.01 * torch.randn_like(x), "labels": labels}


def quietly(function: Callable, *args, **kwargs):
    """PEFT and transformers warn of random weights, ranks of zero and PEFT's own rank pattern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


@pytest.mark.parametrize("script", [causal_lm, seq2seq_lm, token_classification, image_classification])
def test_scripts(script, tmp_path):
    torch.manual_seed(0)
    base, config, batch = script()
    initial = {name: value.clone() for name, value in base.state_dict().items()}

    adalora.peft.install()  # The line.
    try:
        model = quietly(get_peft_model, base, config)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        model.train()
        losses = []
        for number in range(STEPS):
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            model.base_model.update_and_allocate(number)
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0]

        model.eval()
        example = batch()
        labels = example.pop("labels")
        if script is seq2seq_lm:
            example["decoder_input_ids"] = labels
        with torch.no_grad():
            expected = model(**example).logits
        kept = model.peft_config["default"].rank_pattern
        assert sum(map(sum, kept.values())) == 2 * len(kept)
        assert model.base_model.rankallocator.standing().is_final
        quietly(model.save_pretrained, tmp_path)
    finally:
        adalora.peft.uninstall()

    # Back to PEFT alone, and to the plain model.
    torch.manual_seed(0)
    base = script()[0]
    base.load_state_dict(initial)
    restored = quietly(PeftModel.from_pretrained, base, tmp_path)
    if script is image_classification:
        # Normalisation's running averages are the base model's.
        for own, other in zip(restored.buffers(), model.buffers(), strict=True):
            own.copy_(other)
    with torch.no_grad():
        torch.testing.assert_close(restored.eval()(**example).logits, expected, rtol=1e-4, atol=1e-4)
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(**example).logits, expected, rtol=1e-3, atol=1e-3)


# The Trainer of transformers


def trainer_of(folder: Path, callback: transformers.TrainerCallback, **changed) -> transformers.Trainer:
    torch.manual_seed(0)
    base, config, batch = token_classification()
    model = adalora.peft.accelerate(quietly(get_peft_model, base, config))
    rows = [{name: value[k % 4] for name, value in batch().items()} for k in range(STEPS * 4)]
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(str(folder), **{**options, **changed})
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])


class Allocate(transformers.TrainerCallback):
    """What PEFT's users have."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


@pytest.mark.parametrize("callback", [Allocate, AdaLoraCallback])
def test_trainer(callback, tmp_path):
    trainer = trainer_of(tmp_path, callback())
    quietly(trainer.train)
    model = trainer.model
    standing = model.base_model.rankallocator.standing()
    assert (standing.last_step, standing.is_final, standing.irregular) == (STEPS - 1, True, 0)
    kept = model.peft_config["default"].rank_pattern
    assert standing.live_triplets == 2 * len(kept) == sum(map(sum, kept.values()))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1]["loss"] < history[0]["loss"]
    if callback is AdaLoraCallback:
        ranks = [entry["adalora_ranks"] for entry in history]
        assert ranks[0] == 4 * len(kept)
        assert ranks[-1] == 2 * len(kept)
        assert history[-1]["adalora_budget"] == 2 * len(kept)
    # The evaluation's loss is the task's.
    penalty = model.base_model.orthogonality_loss()
    model.eval()
    example = token_classification()[2]()
    with torch.no_grad():
        outputs = model(**example)
        task = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), example["labels"].flatten())
        torch.testing.assert_close(outputs.loss, task)
    assert penalty > 0.01


@pytest.mark.parametrize("at", [5, 12, 20])
def test_trainer_resumes_bit_for_bit(at, tmp_path):
    whole = trainer_of(tmp_path, AdaLoraCallback(), save_strategy="steps", save_steps=at)
    quietly(whole.train)
    resumed = trainer_of(tmp_path, AdaLoraCallback())
    quietly(resumed.train, resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    standings = [each.model.base_model.rankallocator.standing() for each in (whole, resumed)]
    assert standings[0].selections == standings[1].selections
    assert standings[1].last_step == STEPS - 1


def test_trainer_without_tfinal_takes_the_last_mask(tmp_path):
    trainer = trainer_of(tmp_path, AdaLoraCallback())
    trainer.model.peft_config["default"].tfinal = 0
    quietly(trainer.train)
    standing = trainer.model.base_model.rankallocator.standing()
    assert standing.is_final
    assert standing.live_triplets == sum(map(sum, trainer.model.peft_config["default"].rank_pattern.values()))


def test_trainers_whose_steps_are_others_are_refused(tmp_path):
    trainer = trainer_of(tmp_path, AdaLoraCallback(), max_steps=STEPS + 1)
    with pytest.raises(InvalidArgumentError, match=r"total_step: expected the trainer's .* 25, found 24"):
        quietly(trainer.train)
