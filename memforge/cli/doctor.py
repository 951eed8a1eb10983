"""memforge doctor."""

from typing import Annotated, Any

import typer

from memforge.cli.options import Json
from memforge.errors import DeviceError
from memforge.report.console import console, plain, print_json


def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this CPU for predictions of step times; about a minute.")
    ] = False,
    json_: Json = False,
) -> None:
    """Say what this machine has and what memforge will use and why. Exit 3 where training cannot work."""
    from memforge.doctor import findings

    if calibrate:
        _calibrate()
    with console(stderr=True).status("looking around"):
        found = list(findings())
    broken = [finding for finding in found if finding.broken]
    if json_:
        sections: dict[str, dict[str, str]] = {}
        for finding in found:
            sections.setdefault(finding.section, {})[finding.name] = finding.found
        print_json({"ok": not broken, **sections})
        raise typer.Exit(3 if broken else 0)
    width = max(len(finding.name) for finding in found)
    section = None
    for finding in found:
        if finding.section != section:
            plain(("\n" if section else "") + finding.section)
            section = finding.section
        plain(f"  {finding.name:{width}}  {finding.found}")
    if broken:
        raise DeviceError("; ".join(f"{finding.name}: {finding.found}" for finding in broken))


def _calibrate() -> None:
    """Measure, and keep what was measured. Raises StorageError where that cannot be kept."""
    from memforge.cost.calibration import calibration_file
    from memforge.storage import storage_errors

    file = calibration_file()
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with console(stderr=True).status("starting torch") as status:
        from memforge.profile.calibrate import calibrate

        found = calibrate(lambda what: status.update(f"measuring this CPU: {what}"))
    with storage_errors(file):
        temporary = file.with_suffix(".tmp")
        temporary.write_text(found.to_json(), encoding="utf-8")
        temporary.replace(file)
    plain(f"wrote {file}", stderr=True)


COMMANDS: dict[str, Any] = {"doctor": doctor}
