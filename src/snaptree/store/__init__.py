"""What is remembered: SQLite for standalone machines and for the journal."""
