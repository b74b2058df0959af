"""Ray: the session, the stages of a job, submission, Kubernetes manifests."""
