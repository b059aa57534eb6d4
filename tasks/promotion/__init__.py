"""Whether a version may become the champion, and how it does: gates, lease, moves; no MLflow."""
