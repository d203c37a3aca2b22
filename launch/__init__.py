"""Runs on machines: where each goes, what it needs and how it ended."""

from pathlib import Path

from moe_ablm.endings import end_imports

end_imports(Path(__file__).resolve().parent)
