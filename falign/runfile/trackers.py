"""The check that the experiment trackers of ``training.report_to`` work, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from falign.errors import ConfigError

__all__ = ["check_trackers"]

NONE, ALL = "none", "all"

PACKAGES = {
    "azure_ml": "azureml-core",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "flyte": "flytekit flytekitplugins-deck-standard",
}
"""Packages to install, for trackers that are not called like their package."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that cannot work, before anything is loaded.

    Raises:
        ConfigError: A tracker is unknown, or its package is not installed.
    """
    if not names:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
        is_flytekit_available,
    )

    known = {NONE, ALL, *INTEGRATION_TO_CALLBACK}
    if unknown := sorted(set(names) - known):
        raise ConfigError(f"training.report_to={unknown[0]!r} is unknown: choose from {', '.join(sorted(known))}.")
    if len(names) > 1 and (alone := {NONE, ALL} & set(names)):
        raise ConfigError(f"training.report_to={list(names)}: {min(alone)} excludes other trackers; leave them out.")
    available = {NONE, ALL, *get_available_reporting_integrations()}
    if is_flytekit_available():  # missing from the list of transformers
        available.add("flyte")
    for name in sorted(set(names) - available):
        raise ConfigError(f"training.report_to={name!r}: {_reason(name)}, or leave it out.")


def _reason(name: str) -> str:
    """Return why a tracker cannot work, and the remedy."""
    if name == "kubeflow":
        return "no Kubeflow trainer is running (KUBEFLOW_TRAINER_SERVER_URL is not set). Start the run as its job"
    from transformers.integrations.integration_utils import is_azureml_available

    if name == "azure_ml" and is_azureml_available():
        return "the package mlflow is installed, which reports to Azure instead. Use mlflow"
    packages = PACKAGES.get(name, name)
    return f"it needs {' and '.join(packages.split())}. Install what is missing (pip install {packages})"
