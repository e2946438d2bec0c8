"""Records to tables, plots, traces, a progress line, and a summary of a run."""
