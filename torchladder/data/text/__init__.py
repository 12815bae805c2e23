"""Raw text: where documents come from, and how they are read from files."""
