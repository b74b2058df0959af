"""MLflow, and nothing else."""
