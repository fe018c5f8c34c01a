"""Files that the command writes and resumes: checked outputs, results, precomputed proposals."""
