"""What the checks found, as rows and as tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["CheckResult", "Report", "Status", "checks_of", "comparison_table", "status_of"]

Status = Literal["pass", "fail", "not applicable"]


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check."""

    check: str
    status: Status
    detail: str
    """What was measured, what failed, or why the check does not apply."""
    statement: str
    """What the check holds."""
    bug: str
    """The public bug that it guards against."""
    raised: bool = False
    """Whether an exception ended a check that failed, so that nothing was measured."""


@dataclass(frozen=True)
class Report:
    """The outcome of every check on one layer."""

    layer: str
    rows: tuple[CheckResult, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        return tuple(row for row in self.rows if row.status == "fail")

    def __getitem__(self, check: str) -> CheckResult:
        for row in self.rows:
            if row.check == check:
                return row
        raise KeyError(check)

    def table(self) -> str:
        """Markdown: one line per check."""
        lines = ["| check | status | detail | guards against |", "|---|---|---|---|"]
        for row in self.rows:
            cells = (row.check, row.status, row.detail, row.bug)
            lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.layer}\n\n{self.table()}"

    def raise_on_failure(self) -> None:
        """Raises AssertionError that lists every failed check, with what it measured."""
        if self.failures:
            found = "\n".join(f"  {row.check}: {row.detail}\n    guards against {row.bug}" for row in self.failures)
            raise AssertionError(f"{self.layer} fails {len(self.failures)} of {len(self.rows)} checks:\n{found}")


def comparison_table(reports: Mapping[str, Report]) -> str:
    """Markdown: one line per check, one column per layer."""
    names = list(reports)
    lines = ["| check | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    words = {"pass": "pass", "fail": "**fail**", "not applicable": "n/a"}
    for check in checks_of(reports):
        statuses = [words.get(status_of(report, check), "") for report in reports.values()]
        lines.append("| " + " | ".join((check, *statuses)) + " |")
    return "\n".join(lines)


def checks_of(reports: Mapping[str, Report]) -> list[str]:
    """The names of all checks, in order. Layers and parts alone have others."""
    return list(dict.fromkeys(row.check for report in reports.values() for row in report.rows))


def status_of(report: Report, check: str) -> str:
    """The outcome of a check, "" where the report has none of that name."""
    return next((row.status for row in report.rows if row.check == check), "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
