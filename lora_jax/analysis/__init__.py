"""What was learned: comparison tables, heat maps and the report of a sweep."""

from .compare import Estimate, Row, best_rates, footnotes, mark_best, rows_of
from .heatmap import heatmap_png, write_heatmap
from .metrics import Paired, find_metric, holm, primary_metric
from .report import report_run, write_report
from .table import compare_runs, rates_table, results_table, write_summary_csv

__all__ = [
    "Estimate",
    "Paired",
    "Row",
    "best_rates",
    "compare_runs",
    "find_metric",
    "footnotes",
    "heatmap_png",
    "holm",
    "mark_best",
    "primary_metric",
    "rates_table",
    "report_run",
    "results_table",
    "rows_of",
    "write_heatmap",
    "write_report",
    "write_summary_csv",
]
