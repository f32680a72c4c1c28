"""Side-by-side benchmarks against other tools: each one command that prints a table of ratios."""
