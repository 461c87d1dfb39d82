"""What the compilers said of the kernels is printed below the results."""

from collections.abc import Callable

import pytest

FIGURE = "figure"  # a property of a test, which comes with its report from whichever process ran it


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to the figures of this run."""
    return lambda line: request.node.user_properties.append((FIGURE, line))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.stats.get("passed", []):
        for name, line in report.user_properties if report.when == "call" else ():
            if name == FIGURE:
                terminalreporter.write_line(line)
