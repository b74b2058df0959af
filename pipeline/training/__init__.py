"""Training: the loop, the DeepSpeed engine, checkpoints. No Ray and no MLflow."""
