"""results.json and the run's other numbers: their types, reading and writing, statistics, and the verdict."""
