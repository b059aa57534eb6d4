"""What is promised, as tests; and what makes the pages that are not written by hand."""
