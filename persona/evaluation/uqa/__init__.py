"""UQABench (arXiv 2502.19178) on its official files: seven sub-tasks, the Arrow reader, the metric and the run."""
