"""Where pipelines that were exported with format 1 look for their classes."""
