"""Benchmarks of lsgm_fast. Run from the repository; not part of the installed package. See ``README.md`` here."""
