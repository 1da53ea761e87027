"""Does a course's notebook give the same numbers under the alias as on transformer-lens 3.9.0? ``compare.py`` says."""
