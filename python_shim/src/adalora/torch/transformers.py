"""AdaLoRA under `transformers.Trainer`.

>>> adapt(model, AdaLoraConfig(init_r=12, target_r=8, tinit=100, tfinal=300, task_type="SEQ_CLS"))
>>> trainer = Trainer(model, args, train_dataset=data, callbacks=[AdaLoraCallback()])
>>> trainer.train()
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import InvalidStateError, UnsupportedError
from ._callback import InOptimizer, Reporting, Run
from .allocator import RankAllocator
from .checkpoint import save_adapter
from .report import RankReport


class AdaLoraCallback(TrainerCallback):
    """Does a rank allocator's work within `transformers.Trainer`.

    - The penalty's gradient is added once per optimiser step, at the end of the last micro-batch's backward pass:
      before clipping, and times the scale of mixed precision. Neither losses nor evaluation contain the penalty.
    - The allocator follows each of the optimiser's steps, also those that mixed precision leaves out. With
      `adalora.torch.AdamW` in `Trainer(optimizers=...)`, the optimiser does this itself.
    - `total_step` of the configuration becomes the trainer's number of steps where it is None; another number is an
      error. Without `tfinal`, the last mask is taken at the last step.
    - Logs get `adalora_budget`, `adalora_ranks` (triplets kept, over all layers) and `adalora_penalty`. Reports to
      TensorBoard and others have them where this callback comes before theirs:
      `trainer.callback_handler.callbacks.insert(0, callback)`.
    - The allocator's state is in the checkpoints' `optimizer.pt`, and resuming from one goes on bit for bit. Beside it
      in the folder (not in a hyperparameter search) the adapter alone is saved, as by `save_adapter`.
    - After `load_best_model_at_end`, the allocator stands where it stood for that model. A run that ends, or whose
      best model was saved, before the last mask gives a warning.

    Not with DeepSpeed and FSDP.

    Args:
        adapter_name: which adapter is trained.
        allocator: one that you made, where its options matter; None: a new one for each run.

    """

    def __init__(self, adapter_name: str = "default", *, allocator: RankAllocator | None = None) -> None:
        self.adapter_name = adapter_name
        self._given = allocator
        self._run: Run | None = None
        self._saved = InOptimizer("adalora")
        self._handle: Any = None
        # Whether the step under way has yet to get the penalty's gradient.
        self._wants_penalty = False

    @property
    def allocator(self) -> RankAllocator | None:
        """The run's allocator; before the first run, the one that was given."""
        return self._given if self._run is None else self._run.allocator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find adapter and optimiser, and go on from a checkpoint where the trainer does."""
        if args.deepspeed or args.fsdp:
            raise UnsupportedError("TrainingArguments: expected neither deepspeed nor fsdp, found one of them")
        self._remove_hooks()
        model, self._accelerated = kwargs["model"], kwargs["optimizer"]
        optimizer = self._accelerated.optimizer
        if self._run is not None:
            self._run.close()
        self._run = run = Run(model, optimizer, self.adapter_name, state.max_steps, self._given)
        # `AdamW` saves the state itself.
        saved = self._saved.begin(optimizer, run.allocator.state_dict if run.optimizer is None else None)
        if saved is not None and run.optimizer is None:
            run.allocator.load_state_dict(saved)
        run.begin(state.global_step)
        if run.config.orth_reg_weight:
            self._handle = model.register_forward_hook(self._watch_backward)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Expect the penalty's gradient."""
        self._wants_penalty = bool(self._run.config.orth_reg_weight)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the allocator follow."""
        if self._wants_penalty:
            raise InvalidStateError(
                "AdaLoraCallback: expected a backward pass from what the model returned, found none: the penalty's "
                "gradient could not be added"
            )
        self._run.follow(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to what is logged about training."""
        if self._run is not None and logs is not None and "loss" in logs:
            values = self._run.logs()
            logs.update(values)
            state.log_history[-1].update(values)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the adapter beside what the trainer has saved."""
        if args.should_save and not state.is_hyper_param_search and self._run.tuner is None:
            save_adapter(kwargs["model"], Path(args.output_dir) / f"checkpoint-{state.global_step}", self.adapter_name)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stand where the model stands that the trainer leaves."""
        self._remove_hooks()
        reason = "a run that ended at step"
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best(Path(state.best_model_checkpoint))
            reason = "the best model at step"
        self._run.end(reason)

    def _load_best(self, folder: Path) -> None:
        path = folder / "optimizer.pt"
        if not path.is_file():
            warnings.warn(
                f"RankAllocator: expected its state for the best model in {path}, found no such file: it stands where "
                "the run ended",
                stacklevel=2,
            )
            return
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        saved = saved["allocator"] if self._run.optimizer is not None else saved["param_groups"][0][self._saved.key]
        self._run.allocator.load_state_dict(saved)

    def _remove_hooks(self) -> None:
        self._saved.end()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @torch.compiler.disable
    def _watch_backward(self, model: nn.Module, args: Any, outputs: Any) -> None:
        """Have what the model returned notice the backward pass: no event of the trainer comes before clipping."""
        if model.training and torch.is_grad_enabled():
            for tensor in _tensors(outputs):
                if tensor.requires_grad:
                    tensor.register_hook(self._in_backward)

    def _in_backward(self, grad: Tensor) -> None:
        if self._wants_penalty and self._accelerated.gradient_state.sync_gradients:
            Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        # DistributedDataParallel has put its own end of the pass into the queue by now, and this comes after it.
        Variable._execution_engine.queue_callback(self._add_penalty)

    def _add_penalty(self) -> None:
        if self._wants_penalty:
            self._wants_penalty = False
            scaler = self._accelerated.scaler
            self._run.add_penalty(1.0 if scaler is None else scaler.get_scale())


class RankReportCallback(TrainerCallback):
    """Records a `RankReport`, and writes `rank_report.html` into the trainer's output folder when training ends.

    >>> adalora = AdaLoraCallback()
    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[adalora, RankReportCallback(adalora)])

    What was recorded is in the checkpoints' `optimizer.pt`, so that a resumed run's report is whole. `report` is the
    run's, from its first step on.

    Args:
        callback: the `AdaLoraCallback` beside it; None: the model is PEFT's, accelerated by `adalora.peft`.
        title: what the report is headed with.

    """

    def __init__(self, callback: AdaLoraCallback | None = None, title: str = "AdaLoRA rank report") -> None:
        self._reporting = Reporting(callback, title)
        self._saved = InOptimizer("adalora_report")

    @property
    def report(self) -> RankReport | None:
        """The run's report; None before its first step."""
        return self._reporting.report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take what a checkpoint holds."""
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self._reporting.begin(self._saved.begin(optimizer, self._reporting.state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note where the ranks stand after a step."""
        self._reporting.record(kwargs["model"], state.global_step - 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the page."""
        self._saved.end()
        if self.report is not None and args.should_save:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            self.report.save_html(Path(args.output_dir) / "rank_report.html")


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict | list | tuple):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)
