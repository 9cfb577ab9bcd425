"""Errors as JSON: what a server answers and a client raises again."""

from __future__ import annotations

from typing import Any

from psyche_lightning.errors import CoordinatorError, ManifestMismatchError, PsycheError


def problem(error: PsycheError, *, choices: list[str] | None = None) -> dict[str, Any]:
    """``{"error", "code", "retryable"}``, with ``"differences"`` or ``"choices"`` where there are some."""
    result: dict[str, Any] = {
        "error": str(error),
        "code": getattr(error, "code", type(error).__name__),
        "retryable": getattr(error, "retryable", False),
    }
    if isinstance(error, ManifestMismatchError):
        result["differences"] = error.differences
    if choices is not None:
        result["choices"] = choices
    return result


def coordinator_error(value: Any) -> CoordinatorError:
    """The error that :func:`problem` described; anything else becomes a plain one."""
    if not isinstance(value, dict) or not isinstance(value.get("error"), str):
        return CoordinatorError("the coordinator refused without saying why")
    differences = value.get("differences")
    if isinstance(differences, list) and all(isinstance(row, list) and len(row) == 3 for row in differences):
        return ManifestMismatchError(value["error"], [(str(field), run, own) for field, run, own in differences])
    code = value.get("code")
    return CoordinatorError(
        value["error"], code=code if isinstance(code, str) else "Coordinator", retryable=value.get("retryable") is True
    )
