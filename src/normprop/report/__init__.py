"""The HTML page of a comparison: ``normprop.report.html.write``."""
