"""Results on disk, reports, comparisons of several models."""
