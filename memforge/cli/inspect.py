"""memforge inspect."""

from pathlib import Path
from typing import Annotated, Any

import typer

from memforge.cli.options import Device, Json, torch_device
from memforge.cli.runs import RunDir
from memforge.errors import StorageError, UsageError, is_text
from memforge.report.console import console, plain, print_json

# Tokens shown before and after one that read a slot.
CONTEXT_TOKENS = 8


def inspect(
    run: RunDir,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with all curves; it needs no network.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="TEXT", help="Show which slots each of its tokens reads.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help="As --text, the text of a file.")] = None,
    slot: Annotated[
        str | None,
        typer.Option(
            "--slot", metavar="NAME:INDEX", help="Of a layer or pool: show which tokens of the text read it most."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=1000, help="Slots or tokens shown of each layer.")] = 4,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Show where a run stands and how its memories are used, or what its newest checkpoint reads for a text."""
    if text is None and file is None:
        _require_no_lookup(slot, device)
        _inspect_run(run, html, as_json=json_)
    elif html is not None:
        raise UsageError("--html is the page of a run: --text and --file have no meaning with it")
    else:
        _look_up(run, _text_of(text, file), slot, top, device, as_json=json_)


def _require_no_lookup(slot: str | None, device: str | None) -> None:
    """Raises UsageError for options that need a text."""
    if slot is not None:
        raise UsageError("--slot shows which tokens read it: give them with --text or --file")
    if device is not None:
        raise UsageError("--device runs the model on a text: give it with --text or --file")


def _inspect_run(run: Path, html: Path | None, *, as_json: bool) -> None:
    from memforge.report.inspect import show_run
    from memforge.report.run import read_run, run_record
    from memforge.storage import storage_errors

    found = read_run(run)
    record = run_record(found)
    if html is not None:
        from memforge.report.html import run_page

        page = run_page(found)
        with storage_errors(html):
            html.write_text(page, encoding="utf-8")
        plain(f"wrote {html}", stderr=True)
    if as_json:
        print_json(record)
    else:
        show_run(found, record)


def _text_of(text: str | None, file: Path | None) -> str:
    """The text that is asked about. Raises UsageError when there are two or it is none, StorageError."""
    from memforge.storage import storage_errors

    if text is not None and file is not None:
        raise UsageError("--text and --file: give one of them")
    if file is not None:
        with storage_errors(file):
            raw = file.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise StorageError(f"{file}: not text in UTF-8") from None
    assert text is not None
    if not is_text(text):
        raise UsageError("--text: not text in the encoding of this terminal")
    return text


def _look_up(run: Path, text: str, slot: str | None, top: int, device: str | None, *, as_json: bool) -> None:
    from memforge.report.inspect import show_readers, show_tokens

    with console(stderr=True).status("starting torch"):
        from memforge.training.checkpoint import open_run
        from memforge.training.data.tokenizer import end_id
        from memforge.training.lookups import find_slot, reading_blocks

    plan, model, tokenizer, checkpoint = open_run(run, torch_device(device))
    reading_blocks(plan.model)
    wanted = None if slot is None else find_slot(plan.model, slot)
    tokens = [end_id(tokenizer), *tokenizer.encode(text).ids]
    opened = _Opened(plan.name, checkpoint.name, plan.model, model, tokenizer, tokens)
    found = opened.of_tokens(top) if wanted is None else opened.of_slot(wanted, top)
    if as_json:
        print_json(found)
    else:
        (show_tokens if wanted is None else show_readers)(found)


class _Opened:
    """A model and a text in its tokens."""

    def __init__(self, name: str, checkpoint: str, plan: Any, model: Any, tokenizer: Any, tokens: list[int]) -> None:
        self.plan, self.model, self.tokenizer, self.tokens = plan, model, tokenizer, tokens
        self.head = {"name": name, "checkpoint": checkpoint}

    def text(self, start: int, stop: int) -> str:
        """The text of some tokens, the end of documents included."""
        return str(self.tokenizer.decode(self.tokens[max(start, 0) : max(stop, 0)], skip_special_tokens=False))

    def of_tokens(self, top: int) -> dict[str, Any]:
        """The slots that each token reads."""
        from memforge.training.lookups import reading_blocks, token_slots

        rows = []
        for i, reads in enumerate(token_slots(self.model, self.plan, self.tokens, top)):
            slots = {path: [{"slot": slot, "weight": weight} for slot, weight in of] for path, of in reads.items()}
            rows.append({"position": i, "token": self.tokens[i], "text": self.text(i, i + 1), "reads": slots})
        return {**self.head, "layers": [block.path for block in reading_blocks(self.plan)], "tokens": rows}

    def of_slot(self, wanted: Any, top: int) -> dict[str, Any]:
        """The tokens that read a slot, with the text around them."""
        from memforge.training.lookups import slot_tokens

        layers = {
            path: [{**self._in_context(i), "weight": weight} for i, weight in found]
            for path, found in slot_tokens(self.model, self.plan, self.tokens, wanted, top).items()
        }
        slot = {"of": wanted.of, "slot": wanted.slot, "num_tokens": len(self.tokens)}
        return {**self.head, **slot, "layers": layers}

    def _in_context(self, i: int) -> dict[str, Any]:
        return {
            "position": i,
            "token": self.tokens[i],
            "before": self.text(i - CONTEXT_TOKENS, i),
            "text": self.text(i, i + 1),
            "after": self.text(i + 1, i + 1 + CONTEXT_TOKENS),
        }


COMMANDS = {"inspect": inspect}
