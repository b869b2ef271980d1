"""The command-line flags of sampling that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jaxpaged.request import SamplingParams

SAMPLING = "Sampling"


def sampling(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=SAMPLING)


Temperature = Annotated[float | None, sampling("0 is greedy. (default: the model's own, else 1)")]
TopP = Annotated[float | None, sampling("Keep the most probable tokens of this mass.")]
TopK = Annotated[int | None, sampling("Keep so many tokens; 0: all.")]
MinP = Annotated[float | None, sampling("Least probability, relative to the most probable token.")]
Seed = Annotated[int | None, typer.Option("--sampling-seed", help="Makes sampling repeatable.", rich_help_panel=SAMPLING)]
Stop = Annotated[list[str] | None, sampling("Text that ends the output; may be given several times.")]


def given_params(**flags: Any) -> dict[str, Any]:
    """The sampling flags that were given, checked before anything is loaded or asked."""
    found = {name: value for name, value in flags.items() if value is not None}
    SamplingParams(**found)
    return found
