"""From benchmarks to an answer: tables, verdicts and comparisons, as text, Markdown, JSON and one page.

What is named here is imported when it is used: what a benchmark measures would pay for plots and templates.
"""

from typing import TYPE_CHECKING

from fedexec._system.lazy_names import importer

if TYPE_CHECKING:
    from fedexec._report.html_report import page
    from fedexec._report.markdown_report import markdown
    from fedexec._report.reading import UnreadableError
    from fedexec._report.summary import Summary, summarize
    from fedexec._report.terminal_report import terminal

__all__ = ["Summary", "UnreadableError", "markdown", "page", "summarize", "terminal"]

__getattr__ = importer(
    __name__,
    {
        "html_report": ("page",),
        "markdown_report": ("markdown",),
        "reading": ("UnreadableError",),
        "summary": ("Summary", "summarize"),
        "terminal_report": ("terminal",),
    },
)
