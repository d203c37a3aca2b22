"""Studies: grids of runs, planned, launched and collected."""

from pathlib import Path

from moe_ablm.endings import end_imports

end_imports(Path(__file__).resolve().parent)
