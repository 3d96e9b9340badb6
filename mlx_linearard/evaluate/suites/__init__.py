"""The suites, one file each, and the texts and items they are made of. A suite knows no command line."""
