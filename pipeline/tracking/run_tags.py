"""Tags by which a job's MLflow run is found again, and by which its owner and its end are marked."""

RUN_TAG = "refinedet.run"
OWNER_TAG = "refinedet.owner"
REASON_TAG = "refinedet.reason"
