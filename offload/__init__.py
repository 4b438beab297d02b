"""See README.md: nothing lives here yet."""
