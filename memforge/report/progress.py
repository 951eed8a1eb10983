"""The progress of a run: a live bar on a terminal, plain lines elsewhere."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from memforge.errors import printable
from memforge.plan import Plan


class RunReporter:
    """Tells a console what the training loop does; see memforge.training.account.Reporter."""

    def __init__(self, console: Console, run_dir: str) -> None:
        self.console, self.run_dir = console, run_dir
        self.progress: Progress | None = None

    def note(self, message: str) -> None:
        target = self.console if self.progress is None else self.progress.console
        target.print(printable(message), soft_wrap=True, markup=False, highlight=False)

    def start(self, plan: Plan, corpus: Any, step: int) -> None:
        described = ", ".join(
            f"{value:,{'.2f' if isinstance(value, float) else ''}} {name.replace('_', ' ')}"
            for name, value in corpus.description.items()
            if not isinstance(value, str) and "." not in name  # those of all parts together
        )
        self.note(f"{plan.name}: {described}")
        assert plan.run.train is not None
        if step:
            self.note(f"going on from step {step:,} of {plan.run.train.steps:,}")
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.progress.add_task("training", total=plan.run.train.steps, completed=step)
            self.progress.start()

    def row(self, metrics: Mapping[str, Any], speed: Mapping[str, Any], total_steps: int) -> None:
        step, rate = metrics["step"], speed.get("tokens_per_second")
        parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
        parts += [f"{rate:,.0f} tokens/s"] if rate else []
        parts += [f"{speed['mfu']:.1%} of peak FLOPs"] if "mfu" in speed else []
        text = "  ".join(parts)
        scores = "".join(
            f"  {name.replace('_', ' ')} {value:.4f}"
            for name, value in metrics.items()
            if name.partition(".")[0] in ("held_out_loss", "recall")
        )
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=step, description=text)
            if scores:
                self.note(f"step {step}  {text}{scores}")
            return
        left = f"  ETA {(total_steps - step) * metrics['tokens'] / step / rate:.0f} s" if rate else ""
        self.note(f"step {step}/{total_steps}  {text}{left}{scores}")

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.note(f"step {step}  {prompt.strip()} -> {text.strip()}")

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.close()
        self.note(f"wrote {self.run_dir}/{summary['checkpoint']} and {self.run_dir}/report.html")

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
