"""Slides made by code: for the demo, tests and benchmarks."""
