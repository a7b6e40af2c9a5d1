"""From benchmarks to an answer: tables, verdicts, comparisons; as text, JSON and a page. No torch."""

from fedexec.report.page import page
from fedexec.report.reading import UnreadableError
from fedexec.report.summary import Summary, summarize
from fedexec.report.text import markdown

__all__ = ["Summary", "UnreadableError", "markdown", "page", "summarize"]
