"""`petractl bench`: how fast several methods and schedules train one recipe, measured side by side."""
