"""AdaLoRA under Lightning, by either of its names: `lightning` or `pytorch_lightning`.

>>> class Classifier(LightningModule):
...     def __init__(self):
...         super().__init__()
...         self.model = adapt(model, AdaLoraConfig(init_r=12, target_r=8, tinit=100, tfinal=300))
>>> trainer = Trainer(max_steps=1000, callbacks=[AdaLoraCallback()])
>>> trainer.fit(Classifier(), data)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from ..errors import UnsupportedError
from ._callback import Reporting, Run
from .allocator import RankAllocator
from .report import RankReport


class AdaLoraCallback(Callback):
    """Does a rank allocator's work within Lightning's Trainer.

    - The penalty's gradient is added once per optimiser step, after the last micro-batch's backward pass: before
      clipping, and times the scale of mixed precision where there still is one. Neither losses nor validation contain
      the penalty.
    - The allocator follows each of the optimiser's steps, also those that mixed precision leaves out. With
      `adalora.torch.AdamW` from `configure_optimizers`, the optimiser does this itself.
    - `total_step` of the configuration becomes the trainer's number of steps (`estimated_stepping_batches`) where it is
      None; another number is an error. Without `tfinal`, the last mask is taken at the last step.
    - `adalora_budget`, `adalora_ranks` (triplets kept, over all layers) and `adalora_penalty` are logged.
    - The allocator's state is in Lightning's checkpoints: what goes on from one has the same pattern, averages and
      place in the schedule. Lightning itself saves no states of random generators.
    - A run that ends before the last mask gives a warning.

    Automatic optimisation only: with one's own, the calls of `RankAllocator` are one's own, too. Parameters have to be
    whole in each process, as they are under DDP.

    Args:
        adapter_name: which adapter is trained.
        allocator: one that you made, where its options matter; None: a new one for each run.

    """

    def __init__(self, adapter_name: str = "default", *, allocator: RankAllocator | None = None) -> None:
        self.adapter_name = adapter_name
        self._given = allocator
        self._run: Run | None = None
        # A checkpoint's state, until there is an allocator.
        self._restored: dict[str, Tensor] | None = None
        # The step that the optimiser is taking.
        self._step: int | None = None

    @property
    def state_key(self) -> str:
        """Under which name the state lies in checkpoints."""
        return f"AdaLoraCallback[{self.adapter_name}]"

    @property
    def allocator(self) -> RankAllocator | None:
        """The run's allocator; before the first run, the one that was given."""
        return self._given if self._run is None else self._run.allocator

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find adapter and optimiser, and go on where the trainer goes on."""
        if not pl_module.automatic_optimization:
            raise UnsupportedError("automatic_optimization: expected True, found False: call RankAllocator's methods")
        if trainer.strategy.restore_checkpoint_after_setup:
            found = type(trainer.strategy).__name__
            raise UnsupportedError(f"strategy: expected parameters that are whole in each process, found {found}")
        restored, self._restored = self._restored, None
        if self._run is not None:
            if restored is None:
                restored = self._run.allocator.state_dict()
            self._run.close()
        steps = trainer.estimated_stepping_batches
        total_step = int(steps) if 0 < steps < math.inf else None
        self._run = Run(pl_module, trainer.optimizers[0], self.adapter_name, total_step, self._given)
        if trainer.global_step and restored is not None and self._run.optimizer is None:
            self._run.allocator.load_state_dict(restored)
        self._run.begin(trainer.global_step)
        self._step = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty's gradient."""
        self._step = trainer.global_step
        if self._run.config.orth_reg_weight:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            # Lightning has divided by the scale, unless the optimiser does.
            is_scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
            self._run.add_penalty(scaler.get_scale() if is_scaled else 1.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the allocator follow where the batch was the last of a step."""
        if self._step is None:
            return
        self._run.follow(self._step)
        self._step = None
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict({name: float(value) for name, value in self._run.logs().items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether the ranks are final."""
        self._run.end("a run that ended at step")

    def state_dict(self) -> dict[str, Tensor]:
        """The allocator's state, for the trainer's checkpoints."""
        return {} if self._run is None or self._run.optimizer is not None else self._run.allocator.state_dict()

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Keep a checkpoint's state until training begins."""
        self._restored = state_dict


class RankReportCallback(Callback):
    """Records a `RankReport`, and writes `rank_report.html` into the trainer's folder when training ends.

    The folder is the logger's (`trainer.log_dir`), or without one the trainer's `default_root_dir`.

    >>> adalora = AdaLoraCallback()
    >>> trainer = Trainer(max_steps=1000, callbacks=[adalora, RankReportCallback(adalora)])

    What was recorded is in Lightning's checkpoints, so that a resumed run's report is whole. `report` is the run's,
    from its first step on.

    Args:
        callback: the `AdaLoraCallback` beside it, and before it; None: the model is PEFT's, accelerated by
            `adalora.peft`.
        title: what the report is headed with.

    """

    def __init__(self, callback: AdaLoraCallback | None = None, title: str = "AdaLoRA rank report") -> None:
        self._reporting = Reporting(callback, title)
        # A checkpoint's state, until training begins.
        self._restored: dict[str, Any] | None = None
        self._step = 0

    @property
    def state_key(self) -> str:
        """Under which name the state lies in checkpoints."""
        return "RankReportCallback"

    @property
    def report(self) -> RankReport | None:
        """The run's report; None before its first step."""
        return self._reporting.report

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where the trainer goes on."""
        restored = self._reporting.state() if self._restored is None else self._restored
        self._reporting.begin(restored if trainer.global_step else None)
        self._restored, self._step = None, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note where the ranks stand, where the batch was the last of a step."""
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._reporting.record(pl_module, self._step - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        # All processes have to ask.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if self.report is not None and trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.report.save_html(folder / "rank_report.html")

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, for the trainer's checkpoints."""
        return self._reporting.state() or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until training begins."""
        self._restored = state_dict or None
