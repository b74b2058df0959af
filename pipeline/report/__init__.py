"""The report of a run: charts, galleries, comparison."""
