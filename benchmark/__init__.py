"""Benchmarks of models that decode through a Twilight daemon, beside the same models decoding densely."""
