"""Run ``python examples/benchmarks [NAME ...]``: measure, then report."""

from cli import main

main()
