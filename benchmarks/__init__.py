"""One command that measures this runtime and its peers side by side: `benchmarks.compare`."""
