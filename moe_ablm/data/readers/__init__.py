"""Files of sequences in, batches with the study's columns out, every row accounted for."""

from moe_ablm.data.readers.columns import parse_columns
from moe_ablm.data.readers.options import Reading
from moe_ablm.data.readers.report import Report
from moe_ablm.data.readers.source import FORMATS, Source, open_sources

__all__ = ["FORMATS", "Reading", "Report", "Source", "open_sources", "parse_columns"]
