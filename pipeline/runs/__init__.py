"""The directory or URI of a run: storage, manifests, logs, errors, environment."""
