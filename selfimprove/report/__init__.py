"""Reports of a run folder: tables and a tree for a terminal."""

from selfimprove.report.closing import closing_rows, closing_table
from selfimprove.report.lineage import lineage_page
from selfimprove.report.read import History, history
from selfimprove.report.rewards import rewards_table
from selfimprove.report.show import render_chain, render_run

__all__ = ["History", "closing_rows", "closing_table", "history", "lineage_page", "render_chain", "render_run", "rewards_table"]
