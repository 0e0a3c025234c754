"""One script a question; each prints what it measured and writes it as JSON with device, versions, commit and date."""
