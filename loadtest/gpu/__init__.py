"""Measures engine, kernels and limits on a bare GPU machine: no network, no HTTP, no weights. Alone in loadtest, it
imports the engine."""
