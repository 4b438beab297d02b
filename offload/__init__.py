"""See README.md. Importing this imports nothing else."""
