"""Using a model: embeddings, likelihoods, completions, mutants, routing and attention."""
