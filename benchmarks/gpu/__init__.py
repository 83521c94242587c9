"""Two calls that check and measure a GPU: jobs.py says what, pool.py runs it, report.py tells."""
