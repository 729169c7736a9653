"""What watches a run: journal, console, MLflow and curves, each a listener of `petractl.events`."""
