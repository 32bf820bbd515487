"""The id and the like of a new answer."""

from __future__ import annotations

import time

from wingman.api.shapes import Naming, new_completion_id
from wingman.services.served import ServedModel


def naming_of(served: ServedModel) -> Naming:
    """What all objects of a new answer share."""
    return Naming(new_completion_id(), served.name, int(time.time()), served.info.build)
