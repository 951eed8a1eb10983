"""The progress of a run: a live bar on a terminal, plain lines elsewhere."""

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
    """Tells a console what the training loop does; see memforge.training.loop.Reporter."""

    def __init__(self, console: Console, run_dir: str) -> None:
        self.console, self.run_dir = console, run_dir
        self.progress: Progress | None = None

    def note(self, message: str) -> None:
        self.console.print(message, soft_wrap=True)

    def start(self, plan: Plan, corpus: Any) -> None:
        described = ", ".join(
            f"{value:,} {name.replace('_', ' ')}"
            for name, value in corpus.description.items()
            if not isinstance(value, str)
        )
        self.note(f"{plan.name}: {described}")
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
            assert plan.run.train is not None
            self.progress.add_task("training", total=plan.run.train.steps)
            self.progress.start()

    def row(self, row: dict[str, Any], total_steps: int) -> None:
        text = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
        scores = "".join(
            f"  {name.replace('_', ' ')} {row[name]:.4f}" for name in ("held_out_loss", "recall") if name in row
        )
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=row["step"], description=text)
            if scores:
                self.progress.console.print(f"step {row['step']}  {text}{scores}", soft_wrap=True)
            return
        left = (total_steps - row["step"]) * row["tokens"] / row["step"] / row["tokens_per_second"]
        self.note(f"step {row['step']}/{total_steps}  {text}  ETA {left:.0f} s{scores}")

    def finish(self, summary: dict[str, Any]) -> None:
        self.close()
        self.note(printable(f"wrote {self.run_dir}/{summary['checkpoint']}"))

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
