"""`fanfold equal`: whether a model that is split over units is the whole model."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter


def equal(
    model: str | None = None,
    /,
    *,
    layout: str,
    dtype: str = "float32",
    revision: str | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
    verbose: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Compare a model split over units with the whole: outputs, loss and every gradient; exit 5 outside the promise.

    A tiny random copy of the architecture is compared in float64, then the checkpoint itself.

    Parameters
    ----------
    model
        A model folder or a Hugging Face id; the demo model if left away.
    layout
        tensor=N, pipeline=N, context=N (context=N:ulysses, context=N:ring), expert=N, several with commas.
    dtype
        float64, float32 or bfloat16: in which the checkpoint is compared.
    revision
        The model's commit, tag or branch on the hub.
    json_
        Print the record as JSON on stdout.
    verbose
        Show tracebacks.
    """
    from fanfold.errors import DifferenceFound
    from fanfold.job.parallel import certificate
    from fanfold.job.parallel import equal as check

    try:
        record = check(model, layout=layout, dtype=dtype, revision=revision)
    except DifferenceFound as error:
        if json_:
            print(json.dumps(error.record, indent=2))  # type: ignore[attr-defined]
        raise
    print(json.dumps(record, indent=2) if json_ else certificate(record, model or "the demo model"))
    return 0
