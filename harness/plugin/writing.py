"""Writes the reports of a run, for machines and browsers, and says where it ran."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from nsa_oracle.harness.errors import one_line
from nsa_oracle.harness.plugin.reports import ReportFiles
from nsa_oracle.harness.report.document import Environment, RunReport, report_as_json
from nsa_oracle.harness.report.markdown import NOT_WRITTEN
from nsa_oracle.harness.report.page import PageContent, page
from nsa_oracle.harness.scenarios.files import MAX_PATH, replace_file

PACKAGES = ("nsa-oracle", "torch", "triton", "numpy", "hypothesis", "pytest")
"""Those that a verdict may depend on."""


def write_reports(files: ReportFiles, report: RunReport) -> list[str]:
    """Write the files, each as a whole. Returns a line for each, which says where it is or why it is not."""
    lines = []
    for name, file in files.files.items():
        text = report_as_json(report) if name == "json" else page(PageContent((("", report),)))
        try:
            replace_file(file, text)
            lines.append(f"oracle: {name} report in {_shown(file)}")
        except OSError as error:
            lines.append(f"{NOT_WRITTEN}: --oracle-{name} {_shown(file)}: {error.strerror or error}")
    return lines


def _shown(file: Path) -> str:
    """``file``, from the current folder if it lies in it."""
    near = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    return one_line(str(near), MAX_PATH)


def environment_of(device: torch.device, profile: str) -> Environment:
    """Where this process runs, and with which versions."""
    return Environment(
        device=device.type,
        gpu=torch.cuda.get_device_name() if device.type == "cuda" else "",
        platform=platform.platform(),
        profile=profile,
        versions={"python": platform.python_version(), **_versions(PACKAGES)},
    )


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that is not installed
            found[package] = ""
    return found


def utc(seconds: float) -> str:
    """A value of ``time.time()`` as date and time."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
