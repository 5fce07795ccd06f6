"""What stands beside the chapters: python -m tools.prepare, use, reproduce, measure, plot."""
