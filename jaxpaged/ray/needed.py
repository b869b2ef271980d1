"""Ray is optional: whoever needs it says so in one way."""

from __future__ import annotations

import importlib
from typing import Any

from jaxpaged.request import RequestError


def need(module: str) -> Any:
    """The module of Ray. RequestError names the extra if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequestError(f'jaxpaged.ray needs {module}, which cannot be imported ({error}): '
                           'pip install "jaxpaged[ray]".', "ray") from None  # fmt: skip
