"""What a plan file says of itself."""

from __future__ import annotations

from collections.abc import Mapping

from hetis.formats.documents import from_data
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan


def planned_model(plan: Plan) -> ModelSpec | None:
    """The model that a plan was made for; None: its documents are not in it.

    Raises:
        DocumentError: the document cannot be used.
    """
    documents = plan.inputs.get("documents")
    planned = documents.get("model") if isinstance(documents, Mapping) else None
    found = None if planned is None else from_data(planned, name="inputs.documents.model")
    return found if isinstance(found, ModelSpec) else None
