"""The model document inside a plan file."""

from __future__ import annotations

from collections.abc import Mapping

from hetis.formats.documents import from_data
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan


def planned_model(plan: Plan) -> ModelSpec | None:
    """Return the model that a plan was made for, or None if the plan does not contain its documents.

    Raises:
        DocumentError: the document cannot be used.
    """
    documents = plan.inputs.get("documents")
    planned = documents.get("model") if isinstance(documents, Mapping) else None
    found = None if planned is None else from_data(planned, name="inputs.documents.model")
    return found if isinstance(found, ModelSpec) else None
