"""A report of what became of a model's ranks during training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..allocator import Standing
from ..errors import InvalidArgumentError
from ..report import Summary, page, picture, text
from .allocator import RankAllocator
from .steps import step_number

# Entries of the history: beyond that, of all masks every second is kept, then every fourth, and so on.
MOST_ENTRIES = 1024
# Points at which the schedule is drawn.
SCHEDULE_POINTS = 400


class RankReport:
    """Budget over time, ranks by layer and module, and scores: as text, as a picture, as a page, in TensorBoard.

    >>> report = RankReport(allocator)
    >>> for step, batch in enumerate(batches):
    ...     model(**batch).loss.backward()
    ...     allocator.orthogonality()
    ...     optimizer.step()
    ...     report.record(step)
    ...     optimizer.zero_grad()
    >>> print(report.text())
    >>> report.save_html("report.html")

    The page is one file without scripts; it shows what a browser's light or dark theme asks for. The state is part of
    a training state (`save_training_state(folder, optimizer=optimizer, report=report)`), so that a resumed run's report
    is the whole run's.

    Args:
        allocator: of adapters from `adapt`, or any other (`RankAllocator.over`).
        title: what the report is headed with.

    """

    def __init__(self, allocator: RankAllocator, title: str = "AdaLoRA rank report") -> None:
        self.title = title
        self._allocator = allocator
        name = allocator.adapter_name
        layers = allocator.layers.values()
        self._shapes = [(layer.lora_A[name].shape[1], layer.lora_B[name].shape[0]) for layer in layers]
        # As the pattern has them, also where parameters are cut to what is kept.
        self._initial = [len(kept) for kept in allocator.standing().pattern]
        # A trainer's callback may take the number of steps back, and PEFT's may be changed.
        self._schedule = self._read_schedule()
        # The last step, and the last that went to TensorBoard.
        self._step = self._written = -1
        self._is_final = False
        # Ranks by adapter after a mask, for every `_every`-th of `_masks` masks.
        self._history: list[tuple[int, list[int]]] = []
        self._masks, self._every = 0, 1
        self._latest: tuple[int, list[int]] | None = None
        self._scores: list[list[float]] | None = None
        self._scores_step = -1

    def _read_schedule(self) -> tuple[int, int, int]:
        """`total_step`, `tinit`, and the step of the last mask."""
        config = self._allocator.config
        if config.total_step is not None:
            self._schedule = config.total_step, config.tinit, config.total_step - config.tfinal
        return self._schedule

    def record(self, step: int) -> None:
        """Note where the ranks stand: after every step, or after those with a mask.

        It reads from the device where a mask fell, and once more before the last mask, which clears the scores; for
        other steps nothing is read. Where processes share the parameters' rows, all of them record.

        Args:
            step: what the allocator's last step was: `update_and_allocate`'s argument, or with `AdamW`
                `optimizer.global_step - 1`.

        Raises:
            InvalidArgumentError: the step is not above the last one that was recorded, or not the allocator's.

        """
        step = step_number("step", step)
        if step <= self._step:
            raise InvalidArgumentError(f"step: expected one above {self._step}, which was recorded last, found {step}")
        allocator = self._allocator
        _, _, last_mask = self._read_schedule()
        masks = not self._is_final and (allocator.budget(step).masks or step >= last_mask)
        if masks or not self._history:
            standing = allocator.standing()
            if standing.last_step > step or (standing.last_step < step and not self._history):
                raise InvalidArgumentError(
                    f"step: expected the allocator's last one, {standing.last_step}, found {step}"
                )
            # In a step without gradients it takes no part.
            if standing.last_step == step:
                self._note(step, standing)
        self._step = step
        if not self._is_final and (masks or step + 1 == last_mask):
            scores = [scores.tolist() for scores in allocator.scores().values()]
            # `finalize` may have cleared them.
            if any(map(any, scores)):
                self._scores, self._scores_step = scores, step

    def _note(self, step: int, standing: Standing) -> None:
        """Take the ranks after a mask into the history."""
        self._latest = step, standing.ranks
        self._is_final = standing.is_final
        if self._masks % self._every == 0 or self._is_final:
            self._history.append(self._latest)
        self._masks += 1
        if len(self._history) > MOST_ENTRIES:
            self._every *= 2
            self._history = self._history[::2]

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, for a run that goes on in another process."""
        entries = self._entries()
        return {
            "layers": list(self._allocator.layers),
            "step": self._step,
            "steps": torch.tensor([step for step, _ in entries], dtype=torch.int64),
            "ranks": torch.tensor([ranks for _, ranks in entries], dtype=torch.int64).view(-1, len(self._initial)),
            "sampled": len(self._history),
            "masks": self._masks,
            "every": self._every,
            "is_final": self._is_final,
            "scores": torch.tensor([v for scores in self._scores or [] for v in scores], dtype=torch.float64),
            "scores_step": self._scores_step,
            "written": self._written,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was called. A state of other layers is refused, and changes nothing."""
        expected = self.state_dict()
        if state_dict.keys() != expected.keys():
            raise InvalidArgumentError(f"state_dict: expected the keys {list(expected)}, found {list(state_dict)}")
        layers = list(self._allocator.layers)
        if state_dict["layers"] != layers:
            raise InvalidArgumentError(
                f"layers: expected this model's {len(layers)}, found {len(state_dict['layers'])} that are not the same"
            )
        steps, ranks, scores = state_dict["steps"], state_dict["ranks"], state_dict["scores"]
        if ranks.shape != (len(steps), len(layers)):
            raise InvalidArgumentError(f"ranks: expected shape {[len(steps), len(layers)]}, found {list(ranks.shape)}")
        if scores.numel() not in (0, sum(self._initial)):
            raise InvalidArgumentError(f"scores: expected {sum(self._initial)} or none, found {scores.numel()}")
        entries = list(zip(steps.tolist(), ranks.tolist(), strict=True))
        self._history = entries[: state_dict["sampled"]]
        self._latest = entries[-1] if entries else None
        self._step, self._written = state_dict["step"], state_dict["written"]
        self._masks, self._every = state_dict["masks"], state_dict["every"]
        self._is_final = state_dict["is_final"]
        self._scores = [each.tolist() for each in scores.split(self._initial)] if scores.numel() else None
        self._scores_step = state_dict["scores_step"]

    # What it is for

    def text(self) -> str:
        """The report for a terminal or a log, in plain characters; it ends with a newline."""
        return text(self._summary())

    def save_png(self, path: str | os.PathLike[str], *, dpi: float = 150) -> None:
        """Draw the report into a file; needs matplotlib.

        Args:
            path: PNG, or another type that matplotlib writes, by its suffix.
            dpi: dots per inch.

        """
        picture(self._summary()).savefig(path, dpi=dpi)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one HTML page, which needs no other file, no network and no scripts."""
        Path(path).write_text(page(self._summary()), encoding="utf-8")

    def add_scalars(self, writer: Any) -> None:
        """Write what was recorded since the last call as TensorBoard's scalars: after each `record`, or at the end.

        `adalora/budget`, `adalora/live_triplets`, `adalora/live_parameters`, and `adalora/rank/<path>` for each layer.

        Args:
            writer: a `torch.utils.tensorboard.SummaryWriter`.

        """
        costs = [in_features + out_features + 1 for in_features, out_features in self._shapes]
        for step, ranks in self._entries():
            if step <= self._written:
                continue
            writer.add_scalar("adalora/budget", self._allocator.budget(step).budget, step)
            writer.add_scalar("adalora/live_triplets", sum(ranks), step)
            writer.add_scalar("adalora/live_parameters", sum(r * c for r, c in zip(ranks, costs, strict=True)), step)
            for path, rank in zip(self._allocator.layers, ranks, strict=True):
                writer.add_scalar(f"adalora/rank/{path}", rank, step)
            self._written = step

    def _entries(self) -> list[tuple[int, list[int]]]:
        """The history, and the latest ranks where they are not in it."""
        latest = [self._latest] if self._latest and self._latest not in self._history[-1:] else []
        return [*self._history, *latest]

    def _summary(self) -> Summary:
        allocator = self._allocator
        total_step, tinit, last_mask = self._read_schedule()
        standing = allocator.standing()
        step = max(self._step, standing.last_step)
        history = self._entries()
        if step >= 0 and (not history or history[-1][1] != standing.ranks):
            # Chosen by hand, or not recorded.
            history.append((step, standing.ranks))
        last = max(total_step - 1, 1)
        points = {k * last // SCHEDULE_POINTS for k in range(SCHEDULE_POINTS + 1)}
        points |= {tinit, last_mask}
        return Summary(
            title=self.title,
            paths=list(allocator.layers),
            shapes=self._shapes,
            initial=self._initial,
            standing=standing,
            step=step,
            total_step=total_step,
            tinit=tinit,
            last_mask=last_mask,
            unit=allocator.budget_unit,
            schedule=[(k, allocator.budget(k).budget) for k in sorted(points)],
            history=history,
            scores=self._scores,
            scores_step=self._scores_step,
        )
