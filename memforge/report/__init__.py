"""What users see. Nothing outside this package and the CLI prints."""
