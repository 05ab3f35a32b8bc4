"""`lora-diffusion doctor OUTPUT`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    run: Annotated[Path, typer.Argument(help="Output folder of a finished run, or its TOML file.", metavar="OUTPUT")],
) -> None:
    """Say again what became of a finished run: learned, overfitted, too faint, and which layers are dead.

    Exit code 0 when it is good, 1 when it is not or nobody can say, 2 where there is no finished run.

    Example: `lora-diffusion doctor runs/style`
    """
    from rich.console import Console
    from rich.table import Table

    from lora_diffusion.formats.files import load_adapter
    from lora_diffusion.inspection.doctor import diagnose, facts
    from lora_diffusion.training.config import TrainConfig
    from lora_diffusion.training.results import TrainResult

    result = TrainResult.read(TrainConfig.load(run).output if run.suffix == ".toml" else run)
    assert result.adapter is not None
    verdict = diagnose(result, load_adapter(result.adapter))
    table, console = Table(show_header=False, box=None), Console()
    for name, value in facts(result, verdict):
        table.add_row(name, value)
    console.print(table)
    console.print(str(verdict), markup=False, highlight=False, soft_wrap=True)
    if verdict.word != "good":
        raise typer.Exit(1)
