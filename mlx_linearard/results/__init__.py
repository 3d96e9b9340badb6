"""`results.json`: the numbers of a run, the statistics over them, and what they mean."""
