"""From benchmarks to an answer: tables, verdicts, comparisons; as text, JSON and a page. No torch."""

from fedexec._report.markdown import markdown
from fedexec._report.page import page
from fedexec._report.reading import UnreadableError
from fedexec._report.summary import Summary, summarize

__all__ = ["Summary", "UnreadableError", "markdown", "page", "summarize"]
