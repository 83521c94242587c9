"""All measurements of a GPU in one run: jobs.py says which, pool.py runs them, report.py tells."""
