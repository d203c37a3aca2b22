"""Numbers with uncertainty: bootstrap, ranks, scores of classifiers."""
