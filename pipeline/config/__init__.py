"""The job spec: schema, files and overrides, every check that needs no data."""
