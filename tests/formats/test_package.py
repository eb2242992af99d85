"""The package stays light, and its public names stay in place."""

from __future__ import annotations

import subprocess
import sys

from hetis.formats import documents


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_importing_the_package_or_units_imports_nothing_heavy() -> None:
    loaded = modules_after("import hetis.formats, hetis.formats.units, hetis.formats.errors")
    assert not {"pydantic", "numpy", "yaml"} & loaded


def test_importing_everything_needs_the_base_install_only() -> None:
    loaded = modules_after("import hetis.formats.documents, hetis.formats.models.huggingface, hetis.formats.catalogue")
    assert not {"highspy", "numba", "cvxpy", "typer", "rich", "torch"} & loaded


def test_public_names_of_documents() -> None:
    assert set(documents.__all__) == {
        "KINDS",
        "Value",
        "digest",
        "dump",
        "dump_data",
        "from_data",
        "json_schema",
        "kind_of",
        "load",
        "load_cluster",
        "load_model",
        "load_plan",
        "load_profile",
        "load_requests",
        "load_state",
        "load_tenants",
        "load_workload",
        "to_data",
        "write_atomically",
        "yaml_text",
    }
    assert all(hasattr(documents, name) for name in documents.__all__)
