"""Reports: JSON (versioned schema), Markdown and self-contained HTML."""
