"""What is kept: the database, the record of who trains which trial, the run folder, and backups."""
