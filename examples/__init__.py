"""Programs that stand on the package; none of it is installed. Run them from the checkout."""
