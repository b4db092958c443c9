"""A report of ranks under transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import InvalidStateError
from .report import RankReport

if TYPE_CHECKING:
    from .transformers import AdaLoraCallback

# Where the report's state lies in the first group of the optimiser's state dict.
_KEY = "adalora_report"


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
        self.report: RankReport | None = None
        self.title = title
        self._callback = callback
        self._restored: dict[str, Any] | None = None
        self._handle: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take what a checkpoint holds."""
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self.report, self._restored = None, optimizer.param_groups[0].pop(_KEY, None)
        if self._handle is not None:
            self._handle.remove()
        self._handle = optimizer.register_state_dict_post_hook(self._add_state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note where the ranks stand after a step."""
        if self.report is None:
            self.report = self._new_report(kwargs["model"])
            if self._restored is not None:
                self.report.load_state_dict(self._restored)
        self.report.record(state.global_step - 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the page."""
        self._handle.remove()
        if self.report is not None and args.should_save:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            self.report.save_html(Path(args.output_dir) / "rank_report.html")

    def _new_report(self, model: torch.nn.Module) -> RankReport:
        if self._callback is None or hasattr(model, "peft_config"):
            from ..peft import RankReport as PeftReport

            return PeftReport(model, self.title)
        if self._callback.allocator is None:
            raise InvalidStateError("callback: expected one that is among the trainer's callbacks, found it idle")
        return RankReport(self._callback.allocator, self.title)

    def _add_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        state = self._restored if self.report is None else self.report.state_dict()
        if state is not None:
            state_dict["param_groups"][0][_KEY] = state
